"""Damaged, truncated and oversized files (tests/stress/fuzz.py tries ten thousand more)."""

import os
import resource
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data import Clip, load_clip
from support import decode, media
from support.folder import Sticker
from support.workers import in_processes
from tests.clips import apng, chunk, clip, gif, good_folder, write
from tests.stress import fuzz


@pytest.fixture
def place(tmp_path):
    return good_folder(tmp_path / "stickers")


# ------------------------------------------------------------------------------------------------------------
# Files that are refused


def refused(path, resolution=8):
    """The sentence: it names the file, is one line, and came at once."""
    start = time.perf_counter()
    with pytest.raises(media.MediaError) as error:
        media.read_clip(path, resolution)
    sentence = str(error.value)
    assert str(path) in sentence and sentence.endswith(".") and "\n" not in sentence
    assert time.perf_counter() - start < 1
    return sentence


def test_what_is_no_sticker_is_refused(tmp_path):
    (tmp_path / "text.gif").write_text("I was told that I am a GIF.")
    (tmp_path / "empty.gif").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.gif", "JPEG")
    Image.new("RGB", (4, 4)).save(tmp_path / "old.png", "BMP")
    assert "is no GIF" in refused(tmp_path / "text.gif") and "empty" in refused(tmp_path / "empty.gif")
    assert "is no GIF" in refused(tmp_path / "photo.gif") and "is no GIF" in refused(tmp_path / "old.png")
    assert "not a file" in refused(tmp_path / "missing.gif") and "not a file" in refused(tmp_path)
    (tmp_path / "none.gif").write_bytes(gif(4, 4, []))
    assert "cannot be decoded" in refused(tmp_path / "none.gif")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4", ".webm"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path, suffix):
    path, cut = tmp_path / ("whole" + suffix), tmp_path / ("cut" + suffix)
    write(path, clip())
    whole, data = media.read_clip(path, 8)[0], path.read_bytes()
    assert len(whole) == 8
    for size in [1, 7, 13, 20, *np.linspace(30, len(data) - 1, 12).astype(int)]:
        cut.write_bytes(data[:size])
        try:
            frames, _ = media.read_clip(cut, 8)
        except media.MediaError:
            refused(cut)
        else:  # of an MP4 some metadata may be missing, of a GIF its last byte; a WebM is read up to the cut
            assert suffix in (".mp4", ".webm", ".gif") and np.array_equal(frames, whole[: len(frames)])
            assert len(frames) == 8 or suffix == ".webm"


def test_damaged_bytes_raise_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in (".gif", ".webp", ".mp4"):
        media.write_clip(tmp_path / ("a" + suffix), clip(4, 32), 10)
        data = (tmp_path / ("a" + suffix)).read_bytes()
        failures = 0
        for _ in range(40):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), 8):
                damaged[at] = rng.integers(256)
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                media.read_clip(tmp_path / "damaged", 8)
            except media.MediaError:
                failures += 1
        assert failures > 0


@pytest.mark.parametrize("side", [5000, 16000])  # beyond Pillow's own limit, too
def test_a_huge_canvas_is_refused_from_its_header(tmp_path, side):
    (tmp_path / "a.gif").write_bytes(gif(side, side, [(0, 0, np.ones((2, 2), int), 0, 0, 5)]))
    (tmp_path / "a.apng").write_bytes(apng(side, side, 2, [(0, 0, np.zeros((2, 2, 3)), 0, 0, 1, 10)]))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(
        data[:8] + chunk(b"IHDR", struct.pack(">II", side, side) + data[24:29]) + data[33:]
    )
    media.write_clip(tmp_path / "a.webp", clip(), 8)
    data = bytearray((tmp_path / "a.webp").read_bytes())
    assert data[12:16] == b"VP8X"
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    (tmp_path / "a.webp").write_bytes(data)
    for name in ("a.gif", "a.apng", "a.png", "a.webp"):
        assert "a side that is not 1 to 4096 pixels" in refused(tmp_path / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(media.MediaError, match="a side that is not 1 to 4096 pixels"):
        media.read_image(tmp_path / "a.jpg", 8)


# 13000: once within Pillow's own limit. A patch to be cleared to the background (2) is one to be allocated.
@pytest.mark.parametrize("disposal", [0, 2])
@pytest.mark.parametrize("side", [5000, 13000, 60000])
def test_a_huge_patch_is_refused(tmp_path, side, disposal):
    data = bytearray(gif(4, 4, [(0, 0, np.ones((4, 4), int), 0, disposal, 5)] * 2))
    second = data.rindex(b",\0\0\0\0\4\0\4\0")
    data[second + 5 : second + 9] = struct.pack("<HH", side, side)
    (tmp_path / "patch.gif").write_bytes(data)
    assert "a side that is not 1 to 4096 pixels" in refused(tmp_path / "patch.gif")


def test_pixels_are_those_of_the_square_around_the_canvas(tmp_path, monkeypatch):
    """A long thin canvas costs as much as its square: 2 KB of 4096 x 1 pixels took 7 seconds."""
    patches = [(0, 0, np.full((1, 1), i % 4), 0, 0, 5) for i in range(10)]
    for size in ((200, 1), (1, 200)):
        (tmp_path / "thin.gif").write_bytes(gif(*size, patches))
        monkeypatch.setattr(decode, "MAX_PIXELS", 10 * 200 * 200)
        assert len(media.read_clip(tmp_path / "thin.gif", 8)[0]) == 10
        monkeypatch.setattr(decode, "MAX_PIXELS", 10 * 200 * 200 - 1)
        assert "399,999 pixels in all frames, made square" in refused(tmp_path / "thin.gif")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4", ".webm"])
def test_too_many_frames_pixels_or_bytes(tmp_path, suffix, monkeypatch):
    path = tmp_path / ("a" + suffix)
    write(path, clip())
    for module, limit, value, word in (
        (decode, "MAX_FRAMES", 7, "frames"),
        (decode, "MAX_PIXELS", 7 * 64 * 64, "pixels"),
        (decode, "MAX_SIDE", 63, "side"),
        (media, "MAX_BYTES", 100, "MiB"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, value)
            if suffix in (".mp4", ".webm") and word in ("frames", "pixels"):
                assert len(media.read_clip(path, 8)[0]) == 4  # of a video every second frame is read
            else:
                assert word in refused(path)
    assert len(media.read_clip(path, 8)[0]) == 8


def test_nothing_of_a_file_reaches_the_terminal(tmp_path, monkeypatch):
    """The words of a decoder's error may be those of the file."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(data, form, start):
        raise OSError("bad chunk \x1b[2J\n\udcff" + "x" * 10**6)

    monkeypatch.setattr(media, "pillow_pictures", fail)
    with pytest.raises(media.MediaError) as error:
        media.read_clip(tmp_path / "a.png", 8)
    assert fuzz.is_sentence(str(error.value)) and r"\x1b[2J\n\udcff" in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# Damaged files


def test_damaged_files_become_clips_or_sentences(tmp_path):
    outcomes = []
    for number, result in enumerate(in_processes(FuzzCase(tmp_path), range(150), 1)):
        assert not isinstance(result, str), f"case {number}: {result}"
        outcome, fault, *_ = result
        assert fault is None, f"case {number}: {fault}"
        outcomes.append(outcome)
    assert outcomes.count("decoded") > 15 and outcomes.count("refused") > 50
    assert not list(tmp_path.iterdir())


class FuzzCase:
    def __init__(self, place):
        self.place = place
        fuzz.good_files()

    def __call__(self, number):
        return fuzz.try_file(number, seed=100, place=self.place)


def test_damaged_metadata_becomes_captions_or_problems(tmp_path):
    files = fuzz.metadata_folder(tmp_path)
    faults = [fuzz.try_metadata(number, 100, tmp_path, files) for number in range(300)]
    assert not any(faults), [fault for fault in faults if fault]


def test_the_fuzzer_finds_faults(tmp_path, monkeypatch):
    """The checks can fail: a reader that lets an error through, or gives a wrong shape, is seen."""
    monkeypatch.setattr(media, "read_clip", lambda path, resolution: 1 / 0)
    monkeypatch.setattr(fuzz, "load_clip", lambda sticker, resolution: "distinct frames")
    assert "ZeroDivisionError" in fuzz.try_file(0, 0, tmp_path)[1]
    monkeypatch.setattr(media, "read_clip", lambda *_: (np.zeros((1, 8, 8, 3), np.uint8), np.ones(1)))
    assert "(1, 8, 8, 3)" in fuzz.try_file(0, 0, tmp_path)[1]
    monkeypatch.setattr(fuzz, "load_clip", lambda sticker, resolution: "unreadable")
    assert "unreadable" in fuzz.try_file(0, 0, tmp_path)[1]
    assert len(list(tmp_path.iterdir())) == 1  # kept, to be tried again


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4"])
def test_a_file_that_takes_long_is_refused_between_frames(tmp_path, monkeypatch, suffix):
    write(tmp_path / ("a" + suffix), clip())
    now = iter(range(0, 1000, 10))  # seconds: every look at the clock is ten later
    monkeypatch.setattr(media.time, "thread_time", lambda: next(now))
    with pytest.raises(media.MediaError, match=f"more than {decode.MAX_SECONDS} seconds to decode; "):
        media.read_clip(tmp_path / ("a" + suffix), 8)
    assert next(now) <= decode.MAX_SECONDS + 20  # at once, not at the end
    monkeypatch.setattr(media.time, "thread_time", lambda: 0)
    assert len(media.read_clip(tmp_path / ("a" + suffix), 8)[0]) == 8


# ------------------------------------------------------------------------------------------------------------
# Memory and time


def grown(path):
    """load_clip, and the MiB by which the process had grown at most."""
    before = fuzz.memory_at_start(os.getpid())
    return load_clip(Sticker(path, path.name, "", "train"), 16), fuzz.memory("VmHWM") - before


def test_small_files_do_not_take_all_memory(place, monkeypatch):
    monkeypatch.setattr(decode, "MAX_MEMORY_BYTES", 2**27)  # forked processes inherit it
    paths = []
    for name, content in fuzz.bombs().items():
        (place / name).write_bytes(content)
        assert len(content) < 2**21
        paths += [place / name, place / "good.gif"]
    results = list(in_processes(grown, paths, 1))
    refused = 0
    for path, result in zip(paths, results):
        loaded, most = (result, 0) if isinstance(result, str) else result
        assert most < 220, f"{path.name}: {most} MiB"  # what is mapped from files counts too
        assert isinstance(loaded, Clip if path.name == "good.gif" else Clip | str)
        refused += isinstance(loaded, str) and media.NO_MEMORY in loaded and path.name == "run.mp4"
    assert refused == 1
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY  # of this process: as it was


def test_the_clock_is_looked_at_where_no_frame_comes_out(tmp_path, monkeypatch):
    """A packet may hold a frame that is never shown."""
    write(tmp_path / "a.webm", clip())
    content, looks = (tmp_path / "a.webm").read_bytes(), []
    monkeypatch.setattr(decode, "check_time", looks.append)

    class Mute:
        width = height = 64
        name, decode = "mute", staticmethod(lambda packet: [])

    class Container:
        def __init__(self, *_, **__):
            self.streams = self

        video = property(
            lambda self: [
                SimpleNamespace(
                    codec_context=Mute(),
                    metadata={},
                    disposition=decode.Disposition(0),
                    sample_aspect_ratio=None,
                )
            ]
        )

        def demux(self, stream):
            return [SimpleNamespace(size=1)] * 8

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(decode.av, "open", Container)
    with pytest.raises(EOFError):
        list(decode.ffmpeg_pictures(content, "matroska", 0))
    assert len(looks) == 1 + 8 + 8  # after the header, and at each packet, which is counted first
