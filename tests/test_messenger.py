"""Files for messengers, read back: canvas, length, frames and bytes within the limits of each."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from support import messenger
from support.common import UserError
from support.messenger import PLATFORMS, fit, place


def figure(count=8, side=64, noise=0):
    """A red disc with a hard edge that moves, on nothing: uint8 (count, side, side, 4)"""
    frames, rng = np.zeros((count, side, side, 4), np.uint8), np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    for i in range(count):
        centre = side / 2 + side / 4 * np.sin(2 * np.pi * i / count)
        disc = (y - side / 2) ** 2 + (x - centre) ** 2 < (side / 5) ** 2
        frames[i][disc] = (220, 30, 40, 255)
        frames[i, ..., :3] += rng.integers(0, noise + 1, (side, side, 3), np.uint8)
    return frames


def read(data, suffix):
    """(frames uint8 (N, H, W, 4), milliseconds of each, times it plays, 0 = for ever) by the format's own
    library: libvpx for WebM, since FFmpeg's decoder of VP9 does not know alpha."""
    if suffix != ".webm":
        with Image.open(io.BytesIO(data)) as picture:
            frames, times = [], []
            for i in range(picture.n_frames):
                picture.seek(i)
                frames.append(np.asarray(picture.convert("RGBA")))
                times.append(picture.info["duration"])
            return np.stack(frames), times, picture.info["loop"]
    with av.open(io.BytesIO(data)) as video:
        assert not video.streams.audio
        stream = video.streams.video[0]
        tags = {key.lower(): value for key, value in stream.metadata.items()}
        assert stream.codec_context.name == "vp9" and {"alpha_mode": "1"}.items() <= tags.items()
        decoder = av.CodecContext.create("libvpx-vp9", "r")
        frames = [
            f.to_ndarray(format="rgba") for packet in video.demux(stream) for f in decoder.decode(packet)
        ]
        seconds = float(len(frames) / stream.average_rate)
    return np.stack(frames), [1000 * seconds / len(frames)] * len(frames), 0


@pytest.mark.parametrize("count, fps", [(8, 8), (45, 8)])
@pytest.mark.parametrize("name", PLATFORMS)
def test_files_keep_to_the_limits(name, count, fps):
    platform = PLATFORMS[name]
    data, note = fit(figure(count), fps, name)
    frames, times, plays = read(data, platform.suffix)
    assert len(data) <= platform.max_bytes
    assert frames.shape[1:] == (platform.canvas, platform.canvas, 4)
    assert platform.frames[0] <= len(frames) <= platform.frames[1]
    assert sum(times) / 1000 <= platform.max_seconds + 1e-6
    assert 1000 / min(times) <= platform.max_fps + 0.5
    if platform.whole_seconds:
        assert (
            sum(times) == pytest.approx(1000 * round(sum(times) / 1000))
            and 1 <= plays <= 4
            and plays * sum(times) <= 4000
        )
    else:
        assert plays == 0
    corners = frames[:, [0, 0, -1, -1], [0, -1, 0, -1], 3]
    assert corners.max() == 0 and frames[..., 3].max() == 255
    fitting = count / fps <= platform.max_seconds and count <= platform.frames[1]
    assert ("speed" in note or "frames" in note) == (not fitting), note


def test_the_figure_fills_the_canvas_within_its_margin_and_keeps_its_shape():
    frames, platform = figure(), PLATFORMS["whatsapp"]
    placed = place(frames, platform)
    shown = placed[..., 3].max(axis=0) > 127
    columns, rows = (np.flatnonzero(shown.any(axis=axis)) for axis in (0, 1))
    assert abs(columns[0] - 16) <= 2 and abs(columns[-1] - 495) <= 2  # it moves sideways
    assert abs((rows[0] + rows[-1]) / 2 - 255.5) <= 1
    before = np.ptp(np.flatnonzero(frames[0, ..., 3].any(axis=0))) + 1
    after = np.ptp(np.flatnonzero((placed[0, ..., 3] > 127).any(axis=0))) + 1
    high = np.ptp(np.flatnonzero((placed[0, ..., 3] > 127).any(axis=1))) + 1
    assert after / before > 5 and abs(after / high - 1) < 0.06
    opaque = placed[..., 3] == 255
    assert (
        np.abs(placed[opaque][:, :3].astype(int) - (220, 30, 40)).max() <= 40
    )  # of resizing; the ground is farther away


@pytest.mark.parametrize("name", PLATFORMS)
def test_what_is_too_large_is_encoded_more_coarsely_and_says_so(name, monkeypatch):
    frames = figure(5, noise=60)
    whole, _ = fit(frames, 8, name)
    smaller = PLATFORMS[name]._replace(max_bytes=int(0.6 * len(whole)))
    monkeypatch.setitem(messenger.PLATFORMS, name, smaller)
    data, note = fit(frames, 8, name)
    assert len(data) <= smaller.max_bytes and "quality, " in note
    monkeypatch.setitem(messenger.PLATFORMS, name, smaller._replace(max_bytes=2000))
    monkeypatch.setattr(messenger, "encode", lambda *args: bytes(2001))
    with pytest.raises(UserError, match=f"--for {name}: the sticker stays above 2 KB"):
        fit(frames, 8, name)


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match="--for line wants 5 frames or more, these are 3"):
        fit(figure(3), 8, "line")
    for name, repeated, left in (("line", 5, 4), ("discord", 8, 1), ("whatsapp", 8, 1)):
        frames = figure()
        frames[-repeated:] = frames[-1]  # of which encoders make one
        with pytest.raises(UserError, match=f"frames that differ, these have {left}"):
            fit(frames, 8, name)
    with pytest.raises(UserError, match="white all over"):
        fit(np.zeros((8, 16, 16, 4), np.uint8), 8, "discord")
