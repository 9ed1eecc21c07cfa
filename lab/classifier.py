"""
Can samples be told from real frames? A linear discriminant is fitted to one half of the clips and asked about
the other half, and the other way round: 50 % of single frames right is chance, and what a perfect model would
get; 100 % means that no frame passes for real.

    told_apart(made, real)      # two lists of clips -> {"mean", "se"} of the share of frames told right

What it sees of a frame are histograms, at two scales: of light, ink and hue, of the differences of
neighbours, and of which differences follow each other. They show blur, noise and cross-fades, and
something of what is drawn, too: samples should show what the real clips show. It is fitted anew to every set
of samples, in closed form: no weights, no chance.
"""

import numpy as np

from lab.metrics import mean_se

# Where the bins of a histogram end, of 255: of light and ink, of differences, of pairs of differences
VALUES, LEVELS, COARSE = (8, 32, 64, 96, 128, 160, 192, 224, 248), (1, 3, 6, 12, 24, 48, 96), (3, 12, 48)
FEWEST = 4  # clips of a kind that can be told apart
RIDGE = 0.02  # of the discriminant, as a share of the sum of the features' variances


def in_bins(x, ends):
    """Integers 0..1023 -> number of the bin"""
    return np.searchsorted(ends, np.arange(1024), side="right")[x]


def shares(bins, count):
    """Bins (N, maps, R, R) -> the roots of their shares, so that rare ones count too: (N, maps x count)"""
    rows = np.arange(bins.shape[0] * bins.shape[1]).reshape(*bins.shape[:2], 1, 1)
    hits = np.bincount((count * rows + bins).ravel(), minlength=rows.size * count)
    return np.sqrt(hits / (bins.shape[2] * bins.shape[3])).reshape(len(bins), -1)


def describe(frames):
    """uint8 (N, R, R, 3), R even -> float (N, features)"""
    x = frames.astype(int)
    red, green, blue = np.moveaxis(x, -1, 0)
    maps = np.stack([x.max(axis=-1), x.min(axis=-1), red - green, green - blue], axis=1)  # (N, 4, R, R)
    half = maps[:, :, ::2, ::2] + maps[:, :, 1::2, ::2] + maps[:, :, ::2, 1::2] + maps[:, :, 1::2, 1::2]
    parts = [shares(in_bins(maps[:, :2], VALUES), len(VALUES) + 1)]
    for y in (maps, half // 4):
        for line in (y, y.swapaxes(2, 3)):  # along columns, along rows
            change = np.diff(line, axis=2)
            parts.append(shares(in_bins(np.abs(change), LEVELS), len(LEVELS) + 1))
            parts.append(shares(in_bins(np.abs(np.diff(change, axis=2)), LEVELS), len(LEVELS) + 1))
            step = in_bins(np.abs(change), COARSE)
            parts.append(shares(4 * step[:, :, :-1] + step[:, :, 1:], 16))
    return np.concatenate(parts, axis=1)


def fit(x, y):
    """Ridge regression of y, -1 or 1, on features x (N, D). Returns a function from (M, D) to scores (M,)"""
    mean = x.mean(axis=0)
    scale = x.std(axis=0) + 1e-3
    z = (x - mean) / scale
    kernel = z @ z.T
    ridge = RIDGE * np.trace(kernel) / len(z)
    weight = z.T @ np.linalg.solve(kernel + ridge * np.eye(len(z)), y - y.mean())
    return lambda new: (new - mean) / scale @ weight


def told_apart(made, real):
    """made, real: as many clips, uint8 (F_i, R, R, 3) each; clips at the same place have the same content, or
    unrelated ones, and never stand on two sides of a fold. At least four of each."""
    x = [[describe(clip) for clip in clips] for clips in (made, real)]
    right = []
    for fold in (0, 1):
        known = [np.concatenate(clips[1 - fold :: 2]) for clips in x]
        score = fit(np.concatenate(known), np.repeat([1.0, -1.0], [len(k) for k in known]))
        for sign, clips in zip((1, -1), x):
            right += [np.mean(sign * score(clip) > 0) for clip in clips[fold::2]]
    return mean_se(right)
