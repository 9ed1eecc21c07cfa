"""
Clustering-based extraction (section 4.2, Figure 3): a clip of any length becomes k frames, k = 3..8.

    features = thumbnails(frames)                # what is compared: 32 x 32 pixels
    key_frames = extract_key_frames(features)    # {3: indices (3,), 4: indices (4,), ... 8: indices (8,)}

Frames are grouped into k clusters by k-means, and the frame nearest each centroid stands for its cluster, in
the order of time. A short clip loses nothing, a long one is condensed to what is different in it.
"""

import numpy as np
import torch
from PIL import Image

from curriculum import LENGTHS
from masks import NUM_FRAMES

THUMBNAIL = 32


def thumbnails(frames):
    """frames uint8 (N, R, R, 3) -> uint8 (N, 32 * 32 * 3), one feature vector per frame"""
    size, box = (THUMBNAIL, THUMBNAIL), Image.Resampling.BOX
    small = [np.asarray(Image.fromarray(f).resize(size, box, reducing_gap=1.0)) for f in frames]
    return np.stack(small).reshape(len(frames), -1)


def product(a, b):
    """Matrix product by torch: processes that decode side by side hold it to a thread each, numpy's would take all cores."""
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


def kmeans(gram, k, rng, restarts=6, iterations=50):
    """Lloyd's k-means with k-means++ starts, on inner products alone: the clips are short and their features
    long, so the N x N Gram matrix holds all that is needed. All R restarts advance together. An empty cluster takes
    the frame farthest from its centroid.

    gram: float64 (N, N) inner products of the features; at least k of them distinct
    Returns (assignment int (N,), squared distances float (N, k) to the centroids)
    of the best of `restarts` runs.
    """
    n, runs = len(gram), np.arange(restarts)
    norms = np.diag(gram)
    pairwise = np.maximum(norms[:, None] + norms[None] - 2 * gram, 0)  # (N, N) squared distances

    def to_centroids(assignment):
        member = np.eye(k)[assignment]  # (R, N, k)
        share = member / member.sum(axis=1, keepdims=True)
        inner = product(gram, share)
        return norms[:, None] - 2 * inner + (inner * share).sum(axis=1, keepdims=True)  # |x|^2 - 2 x c + |c|^2

    centers = [rng.integers(n, size=restarts)]  # k times (R,)
    nearest = pairwise[centers[0]]  # (R, N)
    while len(centers) < k:  # greedy k-means++: the best of three centers drawn by their squared distance
        total = nearest.cumsum(axis=1)
        drawn = rng.random((restarts, 3)) * total[:, -1:]
        candidates = (total[:, None] <= drawn[..., None]).sum(axis=2).clip(max=n - 1)  # (R, 3)
        reduced = np.minimum(nearest[:, None], pairwise[candidates])  # (R, 3, N)
        best = reduced.sum(axis=2).argmin(axis=1)
        centers.append(candidates[runs, best])
        nearest = reduced[runs, best]
    assignment = pairwise[np.stack(centers, axis=1)].argmin(axis=1)  # (R, N)
    for _ in range(iterations):
        distances = to_centroids(assignment)  # (R, N, k)
        new = distances.argmin(axis=2)
        for run in np.flatnonzero((new[..., None] == np.arange(k)).any(axis=1).sum(axis=1) < k):
            for cluster in np.flatnonzero(np.bincount(new[run], minlength=k) == 0):
                stays = np.bincount(new[run], minlength=k)[new[run]] == 1  # the only member of its cluster
                far = np.where(stays, -np.inf, distances[run, np.arange(n), new[run]])
                new[run, far.argmax()] = cluster
        if (new == assignment).all():
            break
        assignment = new
    distances = to_centroids(assignment)
    inertia = np.take_along_axis(distances, assignment[..., None], axis=2).sum(axis=(1, 2))
    best = inertia.argmin()
    return assignment[best], distances[best]


def extract_key_frames(features, lengths=LENGTHS, seed=0):
    """Clustering-based frame extraction for every k that the clip allows (section 4.2).

    features: (N, D), one vector per frame
    lengths: values of k, ascending
    Returns {k: int array (k,)}: for each k of `lengths` up to the number of distinct frames, the frame nearest the
    centroid of each of k clusters, in the order of time; empty where even the first k is beyond it.
    """
    distinct = len({feature.tobytes() for feature in features})
    x = features.astype(np.float64)
    x = x - x.mean(axis=0)
    gram = product(x, x.T)
    key_frames = {}
    for k in lengths:
        if k > distinct:
            break
        assignment, distances = kmeans(gram, k, np.random.default_rng((seed, k)))
        masked = np.where(assignment[:, None] == np.arange(k), distances, np.inf)  # (N, k)
        key_frames[k] = np.sort(masked.argmin(axis=0))
    return key_frames


def equal_frames(count):
    """Indices of NUM_FRAMES equally spaced frames of `count` (the ablation without dual masks)."""
    return np.linspace(0, count - 1, NUM_FRAMES).round().astype(int)
