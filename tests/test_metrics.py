"""Metrics against values known by hand or in closed form."""

import sys

import numpy as np
import pytest

from lab import metrics
from support import stickers
from support.common import UserError
from tests.toys import drawn_clips, grey

RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------------
# Frames against the truth


def test_psnr_by_hand():
    a, b = grey(100, 100), grey(110, 100)
    assert metrics.psnr(a, b) == pytest.approx([10 * np.log10(255**2 / 100), 100])  # error 10; equal
    assert metrics.psnr(grey(0), grey(255)) == pytest.approx([0])


def test_ssim_known_values():
    noise = RNG.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    assert metrics.ssim(noise, noise) == pytest.approx([1, 1])
    c1 = (0.01 * 255) ** 2  # of constant frames only the term of the means is left
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert metrics.ssim(grey(100), grey(150)) == pytest.approx([expected])
    assert abs(metrics.ssim(noise[:1], noise[1:])[0]) < 0.2  # unrelated
    assert metrics.ssim(noise[:1], 255 - noise[:1])[0] < -0.5  # inverted


def test_ssim_without_torchmetrics_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(UserError, match="pip install torchmetrics"):
        metrics.ssim(grey(0), grey(1))


def test_ssim_of_a_window_by_hand():
    """Of 11 x 11 pixels one window fits: weighted moments with the outer product of two Gaussians."""
    a, b = (RNG.integers(0, 256, (1, 11, 11, 3), dtype=np.uint8) for _ in range(2))
    w = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    w = np.outer(w, w) / w.sum() ** 2
    expected = []
    for channel in range(3):
        x, y = a[0, ..., channel].astype(float), b[0, ..., channel].astype(float)
        mx, my = (w * x).sum(), (w * y).sum()
        vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
        c1, c2 = 2.55**2, 7.65**2
        expected.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert metrics.ssim(a, b) == pytest.approx([np.mean(expected)])


def test_baselines_by_hand():
    clip = grey(0, 10, 20, 60, 40, 50)
    given = np.array([False, True, False, False, True, False])

    def level(frames):
        return frames[:, 0, 0, 0].tolist()

    assert level(metrics.repeat_nearest(clip, given)) == [10, 10, 10, 40, 40, 40]
    assert level(metrics.cross_fade(clip, given)) == [10, 10, 20, 30, 40, 40]  # ends repeat
    assert level(metrics.copy_first(clip, given)) == [10] * 6
    tie = np.array([True, False, True, False, False, False])
    assert level(metrics.repeat_nearest(clip, tie))[:3] == [0, 0, 20]  # of two equally near the earlier


def test_baselines_never_see_unknown_frames():
    clip = RNG.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    given = np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    blind = clip * given[:, None, None, None]
    for baseline in metrics.BASELINES.values():
        assert np.array_equal(baseline(clip, given), baseline(blind, given))


# ------------------------------------------------------------------------------------------------------------
# Movement


def test_motion_by_hand():
    clip = grey(0, 10, 40)
    assert metrics.motion(clip) == 20 and metrics.motion(clip, block=8) == 20
    assert metrics.distinct_frames(grey(0, 0, 10, 0)) == 2 and metrics.distinct_frames(clip) == 3
    board = (np.indices((16, 16)).sum(0) % 2 * 100).astype(np.uint8)[..., None].repeat(3, -1)
    grain = np.stack([board, 100 - board])
    assert metrics.motion(grain) == 100 and metrics.motion(grain, block=8) == 0  # flicker is no motion


# ------------------------------------------------------------------------------------------------------------
# Frechet distance


def exactly(mean, covariance, count=50):
    """Vectors whose sample mean and covariance are the given ones."""
    x = RNG.standard_normal((count, len(mean)))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x, rowvar=False)))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_in_closed_form():
    a = exactly([0, 0], np.diag([4.0, 1.0]))
    b = exactly([3, 4], np.diag([1.0, 9.0]))
    # diagonal covariances: |mean|^2 + sum (sigma_a - sigma_b)^2 = 25 + (2 - 1)^2 + (1 - 3)^2
    assert metrics.frechet_distance(a, b) == pytest.approx(30)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(30)  # symmetric
    one = exactly([1.0], np.array([[4.0]])), exactly([3.0], np.array([[25.0]]))
    assert metrics.frechet_distance(*one) == pytest.approx(4 + 9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    A, B = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 1.0]])
    # the trace of the root of a 2 x 2 matrix M is sqrt(trace M + 2 sqrt(det M))
    M = A @ B
    expected = np.trace(A + B) - 2 * np.sqrt(np.trace(M) + 2 * np.sqrt(np.linalg.det(M)))
    assert metrics.frechet_distance(exactly([0, 0], A), exactly([0, 0], B)) == pytest.approx(expected)


def test_our_features_tell_frozen_and_blurred_clips_from_real_ones():
    some = np.random.default_rng(0).permutation(len(stickers.COMBINATIONS))[:48]
    clips, _ = drawn_clips([stickers.COMBINATIONS[i] for i in some], 5, 32)

    def features(some):
        return [metrics.features(clip) for clip in some]

    real, rest = features(clips[:24]), clips[24:]
    same = metrics.standardized_frechet(features(rest), real)
    frozen = metrics.standardized_frechet(features(rest[:, :1].repeat(8, 1)), real)
    blocks = rest.reshape(24, 8, 8, 4, 8, 4, 3).mean(axis=(3, 5)).astype(np.uint8)
    blurred = metrics.standardized_frechet(features(blocks.repeat(4, 2).repeat(4, 3)), real)
    assert same < 0.5 * frozen and same < 0.5 * blurred
    pairs = np.array([1, 0, 0, 1, 1, 1, 1], bool)  # those without slot 2
    assert np.array_equal(metrics.features(clips[0], pairs), metrics.features(clips[0])[pairs])
