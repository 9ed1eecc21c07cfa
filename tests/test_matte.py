"""What support/matte.py makes of shapes whose coverage is known, and what lab/matte.py prints."""

import sys

import numpy as np
import pytest
from PIL import Image

from lab import matte as lab_matte
from support.common import UserError
from support.matte import NEARLY, cut_out

SIDE = 48
RED = np.array([220, 40, 60])


def coverage(radius, y=0.0, x=0.0, fine=8):
    """Share of every pixel that a disc covers: (SIDE, SIDE) of 0..1, from fine^2 points each."""
    at = (np.arange(SIDE * fine) + 0.5) / fine - SIDE / 2
    disc = np.hypot(at[:, None] - y, at[None] - x) < radius
    return disc.reshape(SIDE, fine, SIDE, fine).mean(axis=(1, 3))


def paint(picture, share, colour):
    return picture + share[..., None] * (np.array(colour) - picture)


def frames_of(*pictures):
    return np.stack(pictures).round().astype(np.uint8)


WHITE = np.full((SIDE, SIDE, 3), 255.0)
DISC = paint(WHITE, coverage(15), RED)
OUTLINED = paint(paint(WHITE, coverage(17), (20, 20, 20)), coverage(13), (255, 220, 40))
RING = paint(DISC, coverage(7), (255, 255, 255))
LINES = paint(WHITE, np.clip(np.eye(SIDE) + 0.4 * np.eye(SIDE, k=1), 0, 1), (30, 30, 30))
SPECK = paint(WHITE, coverage(1.2, 3, 4), (200, 210, 190))
ALL = frames_of(WHITE, DISC, OUTLINED, RING, LINES, SPECK)


def on(rgba, ground):
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + np.array(ground) * (1 - alpha)


@pytest.mark.parametrize("colour", [RED, (20, 20, 20), (255, 220, 40), (120, 190, 255)])
def test_a_soft_disc_gets_its_coverage_and_keeps_its_colour(colour):
    share = coverage(15, 0.3, -0.4)
    rgba = cut_out(frames_of(paint(WHITE, share, colour)))[0].astype(float)
    assert np.abs(rgba[..., 3] / 255 - share).max() < 0.08  # a tenth of yellow counts as white
    solid = share > 0.2  # below, the rounding of the frame shows in an unmixed colour
    assert np.abs(rgba[solid, :3] - colour).max() < 12
    assert np.abs(on(rgba, 0) - share[..., None] * np.array(colour)).max() < 20  # white would give up to 255


def test_the_outline_is_the_colour_of_the_edge_not_the_filling():
    rgba = cut_out(frames_of(OUTLINED))[0].astype(float)
    assert np.abs(rgba[..., 3] / 255 - coverage(17)).max() < 0.08
    assert (rgba[(coverage(17) > 0.2) & (coverage(14) == 0), :3] < 40).all()


def test_a_thin_outline_leaves_no_light_rim():
    thin = paint(paint(WHITE, coverage(17), (20, 20, 20)), coverage(15.2), (48, 118, 240))
    rim = (coverage(17) < 1) & (coverage(17) > 0)
    assert on(cut_out(frames_of(thin))[0], 0)[rim].max() < 40


def test_on_white_it_is_the_frames_again():
    noisy = ALL + np.random.default_rng(0).normal(0, 3, ALL.shape)
    for frames in (ALL, noisy.round().clip(0, 255).astype(np.uint8)):
        rgba = cut_out(frames)
        ground = rgba[..., 3] == 0
        assert np.abs(on(rgba, 255) - frames)[~ground].max() <= 1
        assert (255 - frames[ground]).max() <= NEARLY


def test_any_pixels_at_all_come_back_on_white():
    frames = np.random.default_rng(1).integers(0, 256, (3, 20, 31, 3), np.uint8)
    frames[1] |= 0xF0  # pale
    rgba = cut_out(frames)
    assert rgba.shape == (3, 20, 31, 4) and rgba.dtype == np.uint8
    assert np.abs(on(rgba, 255) - frames)[rgba[..., 3] > 0].max() <= 1


@pytest.mark.parametrize("radius, y", [(5, 0), (3, 8), (1.5, 12)])
def test_a_white_eye_stays_opaque_also_near_the_edge(radius, y):
    eye = coverage(radius, y)
    rgba = cut_out(frames_of(paint(DISC, eye, (255, 255, 255))))[0]
    assert (rgba[eye > 0, 3] == 255).all() and (rgba[eye == 1, :3] == 255).all()


def test_a_white_figure_in_a_thin_outline_stays_opaque():
    white = paint(paint(WHITE, coverage(15), (0, 0, 0)), coverage(13.8), (255, 255, 255))
    assert (cut_out(frames_of(white))[0, coverage(14.5) == 1, 3] == 255).all()


def test_the_hole_of_a_ring_stays_white_and_an_open_one_is_cut():
    assert (cut_out(frames_of(RING))[0, coverage(14) == 1, 3] == 255).all()
    opened = RING.copy()
    opened[: SIDE // 2, SIDE // 2 - 3 : SIDE // 2 + 3] = 255
    alpha = cut_out(frames_of(opened))[0, ..., 3]
    assert (alpha[coverage(7) == 1] == 0).all() and alpha[SIDE // 2 + 11, SIDE // 2] == 255


def test_white_alone_is_transparent_and_a_picture_without_white_opaque():
    assert (cut_out(frames_of(WHITE, WHITE - NEARLY))[..., 3] == 0).all()
    full = frames_of(WHITE - 200, WHITE - NEARLY - 1)
    assert np.array_equal(cut_out(full), np.pad(full, [(0, 0)] * 3 + [(0, 1)], constant_values=255))


def test_white_inside_a_frame_without_white_edge_is_opaque():
    inside = frames_of(paint(WHITE - 200, coverage(9), (255, 255, 255)))
    assert (cut_out(inside)[..., 3] == 255).all()


def test_specks_alone_get_the_least_alpha():
    rgba = cut_out(frames_of(SPECK))[0]
    assert 0 < rgba[..., 3].max() <= 65 and on(rgba, 0).max() < 30


def test_a_frame_alone_is_as_in_a_batch():
    assert np.array_equal(cut_out(ALL), np.concatenate([cut_out(frame[None]) for frame in ALL]))


# ------------------------------------------------------------------------------------------------------------
# The measurement


def write_sticker(path, *shares):
    """An animation of a red disc with soft alpha."""
    pictures = []
    for share in shares:
        rgba = np.concatenate([np.broadcast_to(RED, (SIDE, SIDE, 3)), 255 * share[..., None]], axis=-1)
        pictures.append(Image.fromarray(rgba.round().astype(np.uint8)))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True, exact=True)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lab.matte", *map(str, words)])
    lab_matte.main()


def test_the_program_measures_alpha_and_draws(tmp_path, monkeypatch, capsys):
    write_sticker(tmp_path / "disc.webp", coverage(15), coverage(11))
    write_sticker(tmp_path / "ring.webp", coverage(15) - coverage(7), coverage(16) - coverage(7))
    write_sticker(tmp_path / "opaque.webp", np.ones((SIDE, SIDE)))
    (tmp_path / "damaged.gif").write_bytes(b"GIF89a")
    run(monkeypatch, tmp_path, "--resolution", SIDE, "--sheet", tmp_path / "sheet.png")
    said = capsys.readouterr().out
    assert "2 stickers with alpha of 4 files, 1 not read" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if "|" in line]
    assert [row[0] for row in rows[2:]] == list(lab_matte.RIVALS)
    ours, flood, white = (dict(zip(rows[0][1:], map(float, row[1:]))) for row in rows[2:])
    for name in ("alpha, edge", "on black, edge"):  # the ring's hole is wrong in both
        assert ours[name] < flood[name] - 20
    assert ours["hole stayed, %"] > 1 > white["hole stayed, %"] and ours["figure cut, %"] == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 3 * 4 * SIDE


def test_errors_by_hand():
    truth = np.zeros((1, 6, 6, 4))
    truth[0, 1:5, 1:5] = 1
    truth[0, 2, 2] = 0  # a hole
    found = np.zeros((1, 6, 6, 4))
    found[0, :5, 1:5] = 1  # four outside and the hole stayed
    found[0, 4, 4] = 0  # one cut
    sums, pixels = lab_matte.errors(found, truth)
    assert sums.tolist() == [6 * 255.0] * 4 + [4, 1, 1] and pixels.tolist() == [36, 36]


def test_a_folder_without_alpha_is_a_sentence(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="give"):
            run(monkeypatch, folder)
