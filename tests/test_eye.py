"""What lab/eye.py and lab/classifier.py see in drawn stickers, sound ones and spoiled ones."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lab import eye
from lab.classifier import told_apart
from support import stickers
from tests.toys import drawn_clips

SIDE = 64


@pytest.fixture(scope="module")
def clips():
    """uint8 (24, 8, 64, 64, 3): different stickers in random order."""
    some = np.random.default_rng(1).permutation(len(stickers.COMBINATIONS))[:24]
    return drawn_clips([stickers.COMBINATIONS[i] for i in some], 3, SIDE)[0]


def noisy(frames, sigma):
    noise = sigma * np.random.default_rng(0).standard_normal(frames.shape)
    return (frames + noise).round().clip(0, 255).astype(np.uint8)


def blurred(frames, sigma=0.7):
    flat = frames.reshape(-1, *frames.shape[-3:])
    blur = [np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(sigma))) for frame in flat]
    return np.stack(blur).reshape(frames.shape)


def faded(clips):
    """The mean of each frame and the one after the next: (N, F, ...) -> (N, F - 2, ...)"""
    return ((clips[:, :-2].astype(int) + clips[:, 2:]) // 2).astype(np.uint8)


def seen(clips):
    """Means over some of the frames."""
    return {name: x.mean() for name, x in eye.see(clips[::2, ::4].reshape(-1, SIDE, SIDE, 3)).items()}


def disc(gap=0, side=SIDE):
    """One frame: a red disc in a dark outline of three pixels, with a gap of some rows on its right."""
    y, x = np.indices((side, side)) - side // 2
    frame = np.full((side, side, 3), 255, np.uint8)
    radius = np.hypot(x, y)
    frame[radius < 20] = 20
    frame[(radius < 17) | ((radius < 20) & (np.abs(y) < gap) & (x > 0))] = (232, 38, 48)
    return frame[None]


# ------------------------------------------------------------------------------------------------------------
# Measures


def test_a_sound_figure_by_hand():
    sound = {name: x.tolist() for name, x in eye.see(disc()).items()}
    assert sound["edges"] == pytest.approx([235])  # from white, 255, to outline, 20
    assert all(sound[name] == [0] for name in ("grain", "patches", "specks", "leak"))
    assert sound["pieces"] == [1]


def test_an_outline_with_a_gap_leaks():
    assert eye.see(disc(gap=3))["leak"] == [1] and eye.see(disc())["leak"] == [0]


def test_specks_beside_a_figure_are_seen_and_counted():
    frame = disc()
    frame[0, 2:4, 2:6] = (200, 255, 255)
    both = eye.see(frame)
    assert 0.1 < both["specks"] < 0.2  # 8 pixels of 55 among 2700 of ground
    assert both["pieces"] == [1] and both["grain"] == [0]  # too pale to be a piece
    frame[0, 2:4, 2:6] = (0, 255, 255)
    assert eye.see(frame)["pieces"] == [2]


def test_noise_is_grain(clips):
    clean, light, strong = (seen(x)["grain"] for x in (clips, noisy(clips, 6), noisy(clips, 20)))
    assert clean < 3 and clean + 2 < light and light + 5 < strong


def test_a_figure_of_many_colours_is_patched(clips):
    rng = np.random.default_rng(0)
    blocks = rng.normal(0, 40, (*clips.shape[:2], 8, 8, 3)).repeat(8, axis=2).repeat(8, axis=3)
    figure = (eye.ink(clips) > eye.INKED)[..., None]
    patched = (clips + figure * blocks).round().clip(0, 255).astype(np.uint8)
    assert seen(patched)["patches"] > 10 + seen(clips)["patches"]


def test_blur_softens_edges_and_opens_outlines(clips):
    clean, once, twice = (seen(x) for x in (clips, blurred(clips), blurred(clips, 1.5)))
    assert clean["edges"] > 30 + once["edges"] > 60 + twice["edges"]
    assert clean["leak"] < 0.1 < once["leak"] < twice["leak"]


def test_white_frames_are_seen_without_a_figure():
    assert all(x.tolist() == [0, 0] for x in eye.see(np.full((2, 16, 16, 3), 255, np.uint8)).values())


def test_what_strays_from_given_frames():
    clip, given = np.concatenate(4 * [disc()]), np.array([1, 0, 0, 0], bool)
    assert eye.strayed(clip, given) == dict(colour=0, size=0, outline=0)
    clip[1:, :, : SIDE // 2] = 255  # half of it is gone
    half = eye.strayed(clip, given)
    assert half["colour"] == 0 and half["size"] == pytest.approx(50, abs=3)
    clip[1:] = disc()[..., ::-1]  # blue
    other = eye.strayed(clip, given)
    assert other["colour"] == pytest.approx((232 - 48) * 2 / 3) and other["size"] == 0


# ------------------------------------------------------------------------------------------------------------
# The classifier


def test_real_frames_cannot_be_told_from_other_real_ones(clips):
    told = told_apart(clips[::2], clips[1::2])
    assert abs(told["mean"] - 0.5) < 2.5 * told["se"] + 0.02 and told["mean"] < 0.7


@pytest.mark.parametrize("spoil, least", [(blurred, 0.97), (lambda x: noisy(x, 6), 0.97), (faded, 0.7)])
def test_what_a_person_sees_is_told_from_real_frames(clips, spoil, least):
    assert told_apart(spoil(clips[::2]), clips[1::2])["mean"] > least
