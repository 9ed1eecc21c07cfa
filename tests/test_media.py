"""Sticker files in and out, and sheets of them. What an animation must look like is composed independently,
by numpy, from the rules of its format."""

import os
import struct
import time

import av
import numpy as np
import pytest
from PIL import Image

from support import media, pictures
from tests.clips import BLUE, GREEN, PALETTE, RED, WHITE, apng, chunk, clip, gif


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


# ------------------------------------------------------------------------------------------------------------
# GIF


def compose_gif(width, height, patches):
    canvas, frames = np.full((height, width, 3), 255), []
    for x, y, pixels, transparent, disposal, _ in patches:
        before, window = canvas.copy(), canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]]
        colours = np.array(PALETTE)[pixels]
        window[:] = np.where((pixels == 0)[..., None] & bool(transparent), window, colours)
        frames.append(canvas.copy())
        if disposal == 2:
            window[:] = 255
        if disposal == 3:
            canvas = before
    return np.array(frames)


# Not (2, 0): a patch without a transparent colour is cleared to the background colour by Pillow and FFmpeg.
@pytest.mark.parametrize("disposal, transparent", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (3, 0), (3, 1)])
def test_gif_disposal(tmp_path, disposal, transparent):
    rng = np.random.default_rng((disposal, transparent))
    patches = [(0, 0, rng.integers(0, 4, (12, 12)), transparent, 1, 5)]
    for _ in range(6):
        x, y = rng.integers(0, 8, 2).tolist()
        patches.append((x, y, rng.integers(0, 4, (4, 4)), transparent, disposal, 5))
    (tmp_path / "a.gif").write_bytes(gif(12, 12, patches, background=1))  # a red background nobody may see
    frames, durations = media.read_clip(tmp_path / "a.gif", 12)
    assert np.array_equal(frames, compose_gif(12, 12, patches))
    assert durations.tolist() == [50.0] * 7


def test_gif_first_patch_smaller_than_the_canvas_is_on_white(tmp_path):
    patches = [(2, 3, np.full((4, 4), 2), 1, 2, 5), (0, 0, np.full((2, 2), 3), 1, 2, 5)]
    (tmp_path / "a.gif").write_bytes(gif(8, 8, patches, background=1))
    assert np.array_equal(media.read_clip(tmp_path / "a.gif", 8)[0], compose_gif(8, 8, patches))


def test_gif_patch_outside_of_the_canvas_does_not_reach_the_margin(tmp_path):
    patches = [(0, 0, np.full((4, 8), 1), 0, 0, 5), (6, 2, np.full((6, 6), 2), 0, 0, 5)]
    (tmp_path / "a.gif").write_bytes(gif(8, 4, patches))
    frames, _ = media.read_clip(tmp_path / "a.gif", 8)
    assert (frames[:, :2] == 255).all() and (frames[:, 6:] == 255).all()
    assert (frames[1, 4:6, 6:] == GREEN).all() and (frames[1, 2:4] == RED).all()


def test_gif_delays(tmp_path):
    patches = [(0, 0, np.full((4, 4), i % 4), 0, 0, delay) for i, delay in enumerate([0, 1, 2, 7, 250, None])]
    (tmp_path / "a.gif").write_bytes(gif(4, 4, patches))
    assert media.read_clip(tmp_path / "a.gif", 4)[1].tolist() == [100, 100, 20, 70, 2500, 100]


def test_gif_whose_frames_change_mode(tmp_path):
    pictures = [
        Image.new("L", (16, 16), 90),
        Image.fromarray(clip(1, 16)[0]),
        Image.linear_gradient("L").resize((16, 16)),
        Image.new("RGBA", (16, 16), (0, 0, 255, 255)),
        Image.new("RGB", (16, 16), RED).quantize(2),
    ]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=50)
    frames, _ = media.read_clip(tmp_path / "a.gif", 16)
    assert frames.shape == (5, 16, 16, 3)
    for got, picture in zip(frames, pictures):
        assert np.abs(got.astype(int) - np.asarray(picture.convert("RGB"))).max() <= 2


def test_gif_patch_with_its_own_table_of_greys(tmp_path):
    data = gif(4, 4, [(0, 0, np.full((4, 4), 1), 0, 0, 5), (0, 0, np.full((4, 4), 3), 0, 0, 5)])
    at = data.rindex(b",\0\0\0\0\4\0\4\0")  # Pillow sees no palette in 0, 1, 2, ...
    data = data[: at + 9] + b"\x81" + bytes([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]) + data[at + 10 :]
    (tmp_path / "a.gif").write_bytes(data)
    assert media.read_clip(tmp_path / "a.gif", 4)[0][:, 0, 0].tolist() == [list(RED), [3, 3, 3]]


def test_identical_frames_that_the_file_holds_are_all_read(tmp_path):
    (tmp_path / "a.gif").write_bytes(gif(4, 4, [(0, 0, np.full((4, 4), 1), 0, 0, 5)] * 4))
    frames, durations = media.read_clip(tmp_path / "a.gif", 4)
    assert len(frames) == len(durations) == 4 and (frames == RED).all()


# ------------------------------------------------------------------------------------------------------------
# PNG and APNG


def compose_apng(width, height, patches, to_rgba):
    """The rules of the APNG specification on a transparent canvas in floating point; on white at the end."""
    canvas, frames = np.zeros((height, width, 4)), []  # colour times alpha, alpha
    for index, (x, y, pixels, dispose, blend, *_) in enumerate(patches):
        before = canvas.copy()
        window = canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]]
        rgba = to_rgba(pixels) / 255
        source = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
        window[:] = source + window * (1 - source[..., 3:]) * blend
        frames.append(255 * (canvas[..., :3] + 1 - canvas[..., 3:]))
        if dispose == 1:
            window[:] = 0
        if dispose == 2:
            canvas = before
    return np.array(frames)


COLOURS = np.random.default_rng(5).integers(0, 256, (16, 3), np.uint8)
ALPHAS = np.array([0, 255, 128, 255, 60, 0] + [255] * 10, np.uint8)
KINDS = {  # name: (PNG colour type, chunks, random pixels, pixels -> RGBA)
    "palette": (
        3,
        chunk(b"PLTE", COLOURS.tobytes()) + chunk(b"tRNS", ALPHAS[:6].tobytes()),
        lambda rng, h, w: rng.integers(0, 16, (h, w)),
        lambda p: np.concatenate([COLOURS[p], ALPHAS[p][..., None]], -1),
    ),
    "grey with one transparent value": (
        0,
        chunk(b"tRNS", struct.pack(">H", 200)),
        lambda rng, h, w: rng.choice([0, 90, 200], (h, w)),
        lambda p: np.stack([p, p, p, 255 * (p != 200)], -1),
    ),
    "colour with one transparent value": (
        2,
        chunk(b"tRNS", struct.pack(">HHH", 10, 20, 30)),
        lambda rng, h, w: np.array([[10, 20, 30], [200, 0, 90]])[rng.integers(0, 2, (h, w))],
        lambda p: np.concatenate([p, 255 * (p != [10, 20, 30]).any(-1, keepdims=True)], -1),
    ),
    "alpha": (6, b"", lambda rng, h, w: rng.integers(0, 256, (h, w, 4)), lambda p: p),
}


@pytest.mark.parametrize("kind", KINDS)
def test_apng_dispose_and_blend(tmp_path, kind):
    colour_type, extra, random_pixels, to_rgba = KINDS[kind]
    rng = np.random.default_rng(3)
    patches = [(0, 0, random_pixels(rng, 12, 12), 0, 0, 1, 20)]
    for dispose in (0, 1, 2):
        for blend in (0, 1):
            x, y = rng.integers(0, 6, 2).tolist()
            patches.append((x, y, random_pixels(rng, 6, 5), dispose, blend, 1, 20))
    (tmp_path / "a.png").write_bytes(apng(12, 12, colour_type, patches, extra))
    frames, _ = media.read_clip(tmp_path / "a.png", 12)
    expected = compose_apng(12, 12, patches, to_rgba)
    assert frames.shape == expected.shape and np.abs(frames - expected).max() <= 2  # rounding


def test_apng_default_image_is_no_frame_and_delays_are_exact(tmp_path):
    pixels = [np.full((4, 4, 3), value) for value in (10, 20, 30, 40, 50, 60)]
    times = [(1, 25), (0, 100), (3, 0), (1, 100), (11, 1000), (1, 3)]  # a denominator of 0 means 100
    patches = [(0, 0, picture, 0, 0, *t) for picture, t in zip(pixels, times)]
    (tmp_path / "a.apng").write_bytes(apng(4, 4, 2, patches, default=np.zeros((4, 4, 3))))
    frames, durations = media.read_clip(tmp_path / "a.apng", 4)
    assert frames[:, 0, 0, 0].tolist() == [10, 20, 30, 40, 50, 60]
    assert np.allclose(durations, [40, 100, 30, 100, 11, 1000 / 3], atol=0.01)  # FFmpeg counts 10 us
    assert (media.read_image(tmp_path / "a.apng", 4) == 10).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_still_png_is_one_frame(tmp_path, mode):
    picture = Image.fromarray(clip(1, 16)[0]).convert("L" if mode == "I;16" else mode)
    expected = np.asarray(picture.convert("RGB"))
    if mode == "I;16":  # the same greys in 16 bits
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    picture.save(tmp_path / "a.png")
    frames, durations = media.read_clip(tmp_path / "a.png", 16)
    assert frames.shape == (1, 16, 16, 3) and durations.tolist() == [100]
    assert np.abs(frames[0].astype(int) - expected).max() <= 1


# ------------------------------------------------------------------------------------------------------------
# WebP, video, JPEG, stills


def test_webp_alpha_and_variable_delays(tmp_path):
    colours = ((*RED, 255), (*GREEN, 0), (*BLUE, 102))
    pictures = [Image.new("RGBA", (16, 16), colour) for colour in colours]
    pictures[0].save(
        tmp_path / "a.webp", save_all=True, append_images=pictures[1:], lossless=True, duration=[40, 10, 170]
    )
    frames, durations = media.read_clip(tmp_path / "a.webp", 16)
    assert durations.tolist() == [40, 100, 170]
    assert np.abs(frames[:, 8, 8].astype(int) - (RED, WHITE, (153, 153, 255))).max() <= 2


def test_video_sticker_with_alpha_is_on_white(tmp_path):
    if "libvpx-vp9" not in av.codecs_available:
        pytest.skip("this FFmpeg cannot write VP9")
    with av.open(str(tmp_path / "a.webm"), "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuva420p"
        stream.metadata["alpha_mode"] = "1"
        for _ in range(4):
            rgba = np.zeros((64, 64, 4), np.uint8)
            rgba[16:48, 16:48] = (255, 0, 0, 255)
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="yuva420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, durations = media.read_clip(tmp_path / "a.webm", 64)
    assert durations.tolist() == [50] * 4
    assert frames[:, :8].min() >= 250 and np.abs(frames[:, 32, 32].astype(int) - RED).max() < 12


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "JPEG"])
def test_read_image_of_any_format_under_a_wrong_suffix(tmp_path, form):
    Image.new("RGB", (20, 10), (200, 40, 90)).save(tmp_path / "a.png", form)
    picture = media.read_image(tmp_path / "a.png", 20)
    assert np.abs(picture[5:15].astype(int) - (200, 40, 90)).max() <= 3 and (picture[:4] == 255).all()
    if form == "GIF":
        assert media.read_clip(tmp_path / "a.png", 20)[0].shape == (1, 20, 20, 3)


def test_padding_is_white_centred_and_does_not_stretch(tmp_path):
    Image.new("RGB", (40, 20), RED).save(tmp_path / "wide.gif")
    Image.new("RGB", (20, 40), RED).save(tmp_path / "tall.gif")
    wide, tall = (media.read_clip(tmp_path / name, 20)[0][0] for name in ("wide.gif", "tall.gif"))
    assert (wide[6:14] == RED).all() and (wide[:4] == 255).all() and (wide[16:] == 255).all()
    assert np.array_equal(tall, wide.transpose(1, 0, 2))


@pytest.mark.parametrize("resolution", [31, 64, 100, 257])
def test_resizing_is_that_of_pillow(resolution):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (90, 100, 4), dtype=np.uint8)
    pixels[20:60, 30:70] = 255, 0, 0, 255  # hard edges
    pixels[..., 3] = 255
    square = np.full((100, 100, 3), 255, np.uint8)
    square[5:95] = pixels[..., :3]
    expected = Image.fromarray(square).resize((resolution,) * 2, Image.Resampling.BICUBIC)
    frame = media.on_white(Image.fromarray(pixels), resolution)
    assert frame.shape == (resolution, resolution, 3) and frame.dtype == np.uint8 and frame.flags.c_contiguous
    assert np.abs(frame.astype(int) - np.asarray(expected)).max() <= 2


def test_transparent_pixels_do_not_bleed_their_colour_when_resized(tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)  # transparent black ...
    pixels[::2, :] = (255, 255, 255, 255)  # ... between lines of white: everything is white
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (media.read_clip(tmp_path / "a.png", 16)[0] == 255).all()


# ------------------------------------------------------------------------------------------------------------
# Out: files, and sheets for the eye


@pytest.mark.parametrize(
    "suffix, least", [(".gif", 60), (".webp", 90), (".apng", 90), (".mp4", 28), (".webm", 28)]
)
@pytest.mark.parametrize("fps", [8, 12.5])
def test_round_trip(tmp_path, suffix, least, fps):
    frames = clip()
    path = tmp_path / "new" / "folder" / ("a" + suffix)
    media.write_clip(path, frames, fps)
    again, durations = media.read_clip(path, 64)
    assert again.shape == frames.shape and psnr(again, frames) > least
    assert abs(durations.sum() - 8000 / fps) < 6 and np.ptp(durations) <= 10
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("suffix, least", [(".gif", 60), (".webp", 90), (".apng", 90), (".webm", 28)])
def test_alpha_goes_out_with_the_frames(tmp_path, suffix, least):
    """Read back on white, each frame is itself there alone where it is opaque: none of the one before."""
    frames = np.zeros((4, 64, 64, 4), np.uint8)
    for i, (colour, at) in enumerate(zip((RED, GREEN, BLUE, RED), (4, 20, 36, 40))):
        frames[i, at : at + 16, at : at + 16] = (*colour, 255)
    media.write_clip(tmp_path / ("a" + suffix), frames, 8)
    seen, _ = media.read_clip(tmp_path / ("a" + suffix), 64)
    assert psnr(seen, np.where(frames[..., 3:] > 0, frames[..., :3], 255)) > least
    pictures = [np.array(p) for p, _ in media.pictures(tmp_path / ("a" + suffix), False, time.thread_time())]
    assert np.abs(np.stack(pictures)[..., 3] - frames[..., 3].astype(int)).mean() < 3


def test_half_transparent_pixels_are_kept_but_in_a_gif(tmp_path):
    frames = np.full((2, 16, 16, 4), 255, np.uint8)
    frames[0, :8, :, 3], frames[1, :8, :, 3] = 90, 200
    frames[1, :, :, 0] = 0  # else GIF and APNG merge what looks alike
    for suffix, expected in ((".webp", [90, 200]), (".apng", [90, 200]), (".gif", [0, 255])):
        media.write_clip(tmp_path / ("a" + suffix), frames, 8)
        pictures = media.pictures(tmp_path / ("a" + suffix), False, time.thread_time())
        assert [np.asarray(picture)[2, 2, 3] for picture, _ in pictures] == expected
    with pytest.raises(media.MediaError, match="cannot be transparent"):
        media.write_clip(tmp_path / "a.mp4", frames, 8)


def test_gif_of_noisy_frames_keeps_small_areas_of_a_rare_colour(tmp_path):
    noise = np.random.default_rng(0).normal(0, 3, (8, 64, 64, 3))
    frames = np.clip(clip() + noise, 0, 255).astype(np.uint8)
    frames[:, 30:33, 40:43] = (0, 160, 60)
    media.write_clip(tmp_path / "a.gif", frames, 8)
    again, _ = media.read_clip(tmp_path / "a.gif", 64)
    assert psnr(again, frames) > 36
    assert np.abs(again[:, 30:33, 40:43].astype(int) - (0, 160, 60)).max() < 30


def test_what_fills_the_canvas_does_not_stay_under_the_next_frame_of_a_transparent_gif(tmp_path):
    frames = np.zeros((3, 32, 32, 4), np.uint8)
    frames[[0, 2], 4:9, 4:9] = (220, 30, 40, 255)
    frames[1] = (30, 60, 220, 255)
    media.write_clip(tmp_path / "a.gif", frames, 8)
    with Image.open(tmp_path / "a.gif") as picture:
        for f, frame in enumerate(frames):
            picture.seek(f)
            assert np.array_equal(np.asarray(picture.convert("RGBA"))[..., 3], frame[..., 3])


@pytest.mark.parametrize("suffix", [".webp", ".apng"])
def test_no_delay_is_one_that_browsers_stretch(tmp_path, suffix):
    media.write_clip(tmp_path / f"a{suffix}", clip(), 1000)
    assert (media.read_clip(tmp_path / f"a{suffix}", 64)[1] == 11).all()


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_loop_for_ever_and_merged_frames_keep_the_time(tmp_path, suffix):
    frames = clip(4).repeat(2, axis=0)
    media.write_clip(tmp_path / ("a" + suffix), frames, 8)
    with Image.open(tmp_path / ("a" + suffix)) as picture:
        assert picture.info["loop"] == 0
    assert media.read_clip(tmp_path / ("a" + suffix), 64)[1].sum() == 1000


def test_odd_sides_in_mp4_are_padded_with_white(tmp_path):
    media.write_clip(tmp_path / "a.mp4", np.zeros((3, 31, 33, 3), np.uint8), 10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert frame.shape == (32, 34, 3) and frame[31:].min() > 150 and frame[:28, :28].max() < 20


def test_an_unknown_suffix_names_the_known_ones(tmp_path):
    for call in (media.check_suffix, lambda path: media.write_clip(path, clip(), 8)):
        with pytest.raises(media.MediaError, match=r"\.gif, \.webp, \.apng, \.mp4, \.webm, \.png"):
            call(tmp_path / "a.avi")
    media.check_suffix("A.GIF")
    assert os.listdir(tmp_path) == []


def test_a_failure_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    media.write_clip(tmp_path / "a.gif", clip(), 8)
    old = (tmp_path / "a.gif").read_bytes()

    def disk_full(file, frames, fps):
        file.write(b"GIF89a")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(media.SAVERS, ".gif", disk_full)
    with pytest.raises(media.MediaError, match="a.gif cannot be written .No space left"):
        media.write_clip(tmp_path / "a.gif", clip(3), 8)
    assert (tmp_path / "a.gif").read_bytes() == old and os.listdir(tmp_path) == ["a.gif"]
    with pytest.raises(media.MediaError, match="cannot be written"):
        media.write_clip(tmp_path / "a.gif" / "inside_a_file.gif", clip(3), 8)


def test_sheet_geometry(tmp_path):
    long, short = clip(8, 32), np.full((3, 32, 32, 3), 7, np.uint8)
    plain = np.asarray(pictures.sheet([long, short], scale=2))
    assert plain.shape == (2 * 64 + 3 * 4, 8 * 64 + 9 * 4, 3)
    for index in range(8):  # nearest enlargement: every second pixel is the frame
        left = 4 + 68 * index
        assert np.array_equal(plain[4:68:2, left : left + 64 : 2], long[index])
    assert (plain[72:136, 4:68] == 7).all() and (plain[72:136, 3 * 68 + 4 :] == 255).all()

    labelled = np.asarray(pictures.sheet([long, short], labels=["a cat", "a dog " * 30], scale=2))
    assert labelled.shape[0] > plain.shape[0] + 2 * 18 and labelled.shape[1] == plain.shape[1]
    assert labelled[:18].min() < 100 and np.array_equal(labelled[-68:], plain[-68:])

    marks = [[True] + [False] * 7, [False, False, True]]
    marked = np.asarray(pictures.sheet([long, short], scale=2, marks=marks))
    changed = (marked != plain).any(-1)
    assert changed[1:4, 1:71].all() and not changed[:, 72:137].any() and changed[100, 137:140].all()
    assert np.array_equal(marked[4:68, 4:68], plain[4:68, 4:68])  # a border covers no pixel of a frame

    media.write_clip(tmp_path / "a.png", long, 8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(pictures.sheet([long])))
