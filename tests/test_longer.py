"""Stickers of any length, between frames, without an end: what the windows show the network."""

import json

import numpy as np
import pytest
import torch

import sample
from lab import longer, metrics
from masks import ROWS, condition_mask, loss_mask
from model import make_scheduler
from support.ring import Ring
from tests.checkpoints import CHANNELS, SIDE, toy_model
from tests.toys import given_frames

STEPS = dict(num_inference_steps=2)


@pytest.fixture(scope="module")
def model():
    return toy_model()


def make(model, count, given=(), **form):
    """A sticker of `count` frames of which some are given: uint8 (T, R, R, 3)"""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(1, count, CHANNELS, SIDE, SIDE, generator=g)
    return sample.generate(
        *model, ["a heart"], latents, given_frames(*given, count=count, batch=1), **form, **STEPS
    )[0]


def patterns(*plan):
    """What each window of sample.windows shows: [(its frames, which of them were drawn before)]"""
    done, shown = set(), []
    for window in sample.windows(*plan):
        shown.append((window.frames, [frame in done for frame in window.frames]))
        done |= set(window.frames)
    return shown


@pytest.mark.parametrize("count", [3, 8, 9, 10, 11, 20, 23])
@pytest.mark.parametrize("interpolate", [1, 2, 3])
@pytest.mark.parametrize("loop", [False, True])
def test_windows_draw_every_frame_and_are_not_longer_than_the_network(count, interpolate, loop):
    plan, total = sample.windows(count, interpolate, loop), sample.count_frames(count, interpolate, loop)
    assert sorted({f for window in plan for f in window.frames}) == list(range(total))
    assert all(3 <= len(window.frames) <= 8 for window in plan[loop:])  # a loop is cut anew at every step
    assert sum(not known for _, shown in patterns(count, interpolate, loop) for known in shown) == total


@pytest.mark.parametrize("count", [9, 10, 15, 16, 20, 21, 23])
def test_what_goes_on_is_a_row_of_table_7(count):
    """The given frames of every window beyond the first are those of row G1, cut at its length."""
    for frames, shown in patterns(count)[1:]:
        k = len(frames)
        assert shown == condition_mask(ROWS["G1"], k)[loss_mask(k)].tolist()
        assert frames == list(range(frames[0], frames[0] + k))


@pytest.mark.parametrize("interpolate, name", [(2, "I2"), (3, "I3")])
def test_what_lies_between_is_a_row_of_table_7(interpolate, name):
    for loop in (False, True):
        windows = patterns(8, interpolate, loop)[1:]
        assert windows
        for frames, shown in windows:
            assert shown == condition_mask(ROWS[name], len(frames))[: len(frames)].tolist()


def test_a_longer_sticker_begins_as_the_short_one_and_goes_on_with_other_noise(model):
    short, long = make(model, 8), make(model, 20)
    assert short.shape[0] == 8 and long.shape[0] == 20
    assert np.array_equal(short, long[:8])
    assert np.array_equal(long, make(model, 20))
    later = sample.windows(20)[1].frames[-1]  # the same slot of the next window
    assert not np.array_equal(long[7], long[later])


def test_interpolation_keeps_the_frames_that_it_goes_between(model):
    short = make(model, 8)
    for interpolate in (2, 3):
        clip = make(model, 8, interpolate=interpolate)
        assert len(clip) == 7 * interpolate + 1 and np.array_equal(clip[::interpolate], short)


def test_between_frames_that_are_all_given_nothing_else_is_drawn(model, monkeypatch):
    seen, draw = [], sample.generate_latents
    monkeypatch.setattr(
        sample, "generate_latents", lambda *a, **k: seen.append(a[4].tolist()) or draw(*a, **k)
    )
    assert len(make(model, 4, given=range(4), interpolate=2)) == 7
    assert seen == [[[True, False, True, False, True, False, True]]]


def test_a_loop_has_no_first_frame():
    """Every step cuts it elsewhere, into windows of neighbours that the network can see."""
    seen = []

    def denoiser(noisy, latents, given, timestep, text):
        seen.append((noisy[0, :, 0, 0, 0].tolist(), given[0].tolist()))
        return noisy

    denoiser.device = "cpu"
    for count in (8, 20):
        seen.clear()
        clip = torch.arange(count).float().view(1, count, 1, 1, 1)
        given = given_frames(0, count=count, batch=1)
        for t in (999, 600, 200):
            ring = Ring(denoiser, 8, seed=0)
            assert torch.equal(ring(clip, clip, given, torch.tensor([t]), ()), clip)
        cuts = {frames[0] for frames, _ in seen}
        assert len(cuts) > 1 and all(3 <= len(frames) <= 8 for frames, _ in seen)
        for frames, known in seen:
            assert all((b - a) % count == 1 for a, b in zip(frames, frames[1:]))
            assert known == [frame == 0 for frame in frames]


def test_loops_of_any_length(model):
    short, loop = make(model, 8), make(model, 8, loop=True)
    assert short.shape == loop.shape and not np.array_equal(short, loop)
    assert np.array_equal(loop, make(model, 8, loop=True))
    both = make(model, 8, interpolate=2, loop=True)
    assert len(both) == 16 and np.array_equal(both[::2], loop)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_loop_may_have_more_frames_than_the_network_sees(preconditioned):
    unet, encoders = toy_model(preconditioned)
    denoiser = sample.precondition(unet, encoders.prior, make_scheduler().alphas_cumprod)
    assert len(make((denoiser, encoders), 11, loop=True)) == 11


def test_pictures_count_wherever_they_stand(model):
    """A picture among the first frames, in a later window, and in a loop."""
    none, first, later = (make(model, 11, given) for given in ((), (0,), (9,)))
    assert not np.array_equal(none, first) and not np.array_equal(none, later)
    assert np.array_equal(none[:8], later[:8])
    assert not np.array_equal(make(model, 8, loop=True), make(model, 8, (7,), loop=True))


def test_a_seam_is_a_change_beyond_the_others():
    clip = np.arange(12)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3).astype(np.uint8)
    assert metrics.seam(clip, [4, 8]) == pytest.approx(1)
    assert metrics.seam(clip) == pytest.approx(11)  # from the last frame to the first
    jump = clip + 10 * (np.arange(12) >= 6)[:, None, None, None].astype(np.uint8)
    assert metrics.seam(jump, [6]) == pytest.approx(11)
    there_and_back = np.concatenate([clip[:7], clip[5:0:-1]])
    assert metrics.seam(there_and_back) == pytest.approx(1)


def test_the_program_measures_and_draws_what_it_made(model, tmp_path, monkeypatch, capsys):
    settings = dict(guidance_scale=2.0, image_guidance_scale=1.0, num_inference_steps=1)
    settings |= dict(resolution=16, mixed_precision="no")
    monkeypatch.setattr(sample, "load", lambda *args: (*model, settings))
    monkeypatch.setattr(longer.stickers, "PROMPTS", ("a red heart", "a blue cat"))
    monkeypatch.setattr(longer.stickers, "draw_stickers", lambda folder: folder)
    real = np.arange(8).repeat(16 * 16 * 3).reshape(8, 16, 16, 3).astype(np.uint8)
    monkeypatch.setattr(longer, "held_out_stickers", lambda folder, side, count: [("", real)] * count)
    flags = ["--checkpoint", "x", "--output_dir", str(tmp_path), "--picture", str(tmp_path / "a.webp")]
    monkeypatch.setattr("sys.argv", ["longer", *flags])
    longer.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["20 frames"]["seam"]["values"]) == 4 and "motion" not in report["8 frames"]
    assert report["8 key frames of real stickers"]["wrap"]["median"] == pytest.approx(7)
    assert report["20 frames: the 8 again"]["seam"]["median"] > 0
    assert "| 8 frames, loop |" in capsys.readouterr().out
    for name in ("longer.png", "loops.png", "a.webp"):
        assert (tmp_path / name).is_file()
