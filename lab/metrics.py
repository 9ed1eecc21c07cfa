"""
The metrics that need no weights: numbers from frames, uint8 (..., R, R, 3) of 0..255. No model, no files.

    psnr, ssim                      of one frame against its ground truth
    repeat_nearest, cross_fade,
    copy_first                      what unknown frames would be without a model: the baselines
    motion, distinct_frames, seam   how much happens in a clip, and whether it does at some places alone
    features, frechet_distance      how far one set of clips is from another, in features of a fixed network

The Frechet distance is over OUR OWN features, of a network with fixed random weights: it tells a better run
from a worse one under equal settings. It is not FVD and not FID, and compares with no number outside of this
project.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from support.common import UserError


def mean_se(values):
    """{"mean", "se"} of some numbers."""
    values = np.asarray(values, np.float64)
    se = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return dict(mean=float(values.mean()), se=float(se))


# ------------------------------------------------------------------------------------------------------------
# Frames against their ground truth

WINDOW_SIGMA, WINDOW_REACH = 1.5, 5  # of SSIM, in pixels


def psnr(made, real):
    """Decibels, 10 log10(255^2 / mean squared error). made, real: (..., R, R, 3) -> (...). Equal frames:
    100."""
    error = np.square(made.astype(np.float64) - real).mean(axis=(-3, -2, -1))
    return 10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10))


def structural_similarity():
    """The function of torchmetrics. Raises UserError without that package."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise UserError("SSIM needs a package: pip install torchmetrics") from error
    return structural_similarity_index_measure


def ssim(made, real):
    """Structural similarity (Wang et al. 2004), -1..1: Gaussian window of 11 x 11 pixels, sigma 1.5, only
    where it lies within the frame; the mean over places and colour channels. made, real: (..., R, R, 3), R >=
    11 -> (...)."""
    # (N, 3, R, R)
    x, y = (torch.as_tensor(a.reshape(-1, *a.shape[-3:])).permute(0, 3, 1, 2).double() for a in (made, real))
    window = dict(sigma=WINDOW_SIGMA, kernel_size=2 * WINDOW_REACH + 1, data_range=255)
    _, similarity = structural_similarity()(x, y, **window, reduction="none", return_full_image=True)
    # torchmetrics mirrors frames at their edges, and windows there see the mirror image: those places are
    # left out
    inside = similarity[:, :, WINDOW_REACH:-WINDOW_REACH, WINDOW_REACH:-WINDOW_REACH]
    return inside.mean(dim=(1, 2, 3)).numpy().reshape(made.shape[:-3])


# ------------------------------------------------------------------------------------------------------------
# Baselines. frames: uint8 (F, R, R, 3), of which those of `given`, bool (F,), at least one, are known


def repeat_nearest(frames, given):
    """Every frame is the nearest given one, of two equally near the earlier."""
    places = np.flatnonzero(given)
    return frames[[places[np.abs(places - i).argmin()] for i in range(len(frames))]]


def cross_fade(frames, given):
    """Between two given frames the pixels change linearly; beyond the ends the last given frame stays."""
    places = np.flatnonzero(given)
    after = np.searchsorted(places, np.arange(len(frames))).clip(max=len(places) - 1)
    before = np.where(places[after] > np.arange(len(frames)), after - 1, after).clip(min=0)
    left, right = places[before], places[after]
    weight = (np.arange(len(frames)) - left) / np.maximum(right - left, 1)
    weight = weight.clip(0, 1)[:, None, None, None]
    return ((1 - weight) * frames[left] + weight * frames[right]).round().astype(np.uint8)


def copy_first(frames, given):
    """Every frame is the first given one."""
    return frames[np.full(len(frames), np.flatnonzero(given)[0])]


BASELINES = {"nearest given frame": repeat_nearest, "cross-fade": cross_fade, "first given frame": copy_first}

# ------------------------------------------------------------------------------------------------------------
# Movement

SAME = 1.0  # of 255; frames that differ by less on average look the same


def motion(clip, block=1):
    """Mean absolute difference of consecutive frames, 0..255. Grain that flickers counts as well; in the
    means of `block` x `block` pixels hardly. clip: (F, R, R, 3), R at least `block`."""
    count, side = len(clip), clip.shape[1] // block
    x = clip[:, : side * block, : side * block].astype(np.float32)
    x = x.reshape(count, side, block, side, block, 3).mean(axis=(2, 4))
    return float(np.abs(np.diff(x, axis=0)).mean())


def seam(clip, places=(0,)):
    """How much larger the change into the frames `places` is than into the others, as a ratio of means: 1 is
    no seam. Frame 0 follows the last one: by default, how well a clip loops. clip: (F, R, R, 3)"""
    x = clip.astype(np.float32)
    changes = np.abs(x - np.roll(x, 1, axis=0)).mean(axis=(1, 2, 3))  # (F,)
    here = np.isin(np.arange(len(clip)), places)
    ordinary = ~here & (np.arange(len(clip)) > 0)  # the wrap is a place or left out
    return float(changes[here].mean() / max(changes[ordinary].mean(), 1e-6))


def distinct_frames(clip):
    """How many frames differ from all distinct frames before them by SAME or more on average: 1..F."""
    distinct = []
    for frame in clip.astype(np.float32):
        if all(np.abs(frame - other).mean() >= SAME for other in distinct):
            distinct.append(frame)
    return len(distinct)


# ------------------------------------------------------------------------------------------------------------
# A Frechet distance of our own

SIDE, DIMENSIONS = 64, 32  # pixels that the network sees; features, few enough for some dozens of clips


@lru_cache(maxsize=1)
def fixed_network():
    """Weights of three convolutions and a projection, drawn from a fixed seed: the same on every machine."""
    rng = np.random.default_rng(20250321)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    channels = (6, 32, 64, 64)
    layers = [draw(b, a, 3, 3) * (2 / (9 * a)) ** 0.5 for a, b in zip(channels, channels[1:])]
    projection = torch.linalg.qr(draw(64 * 4 * 2, DIMENSIONS))[0]
    return layers, projection


@torch.no_grad()
def features(clip, pairs=None):
    """One vector for each two consecutive frames of a clip: of the first frame and its change to the second.

    clip: uint8 (F, R, R, 3); pairs: bool (F - 1,), which of them count; all by default.
    Returns float32 (pairs, DIMENSIONS).
    """
    layers, projection = fixed_network()
    x = torch.as_tensor(np.ascontiguousarray(clip)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-1] != SIDE:
        x = F.interpolate(x, (SIDE, SIDE), mode="area" if x.shape[-1] > SIDE else "bilinear")
    x = torch.cat([x[:-1], x[1:] - x[:-1]], dim=1)  # (F - 1, 6, SIDE, SIDE)
    if pairs is not None:
        x = x[torch.as_tensor(pairs)]
    for weight in layers:
        x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
    mean, largest = F.adaptive_avg_pool2d(x, 2).flatten(1), F.adaptive_max_pool2d(x, 2).flatten(1)
    return (torch.cat([mean, 0.3 * largest], dim=1) @ projection).numpy()


def frechet_distance(a, b):
    """Between the Gaussians of two sets of vectors (N, D) and (M, D), N, M >= 2:
    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) with the covariances A and B."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    A, B = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    # A B has the eigenvalues of root B root, which is symmetric: no complex square root is needed
    mixed = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(min=0)).sum()
    return float(np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.trace(A) + np.trace(B) - 2 * mixed)


def standardized_frechet(made, real):
    """Frechet distance of two lists of feature arrays, each feature in units of its standard deviation over
    `real`: 0 = equal, 32 = as far off as a constant vector at the mean of `real`."""
    made, real = np.concatenate(made), np.concatenate(real)
    scale = real.std(axis=0) + 1e-6
    return frechet_distance(made / scale, real / scale)
