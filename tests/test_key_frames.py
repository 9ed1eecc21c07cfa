"""Key frames: k-means and what is chosen by it."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from data import THUMBNAIL, assign, equal_frames, extract_key_frames, kmeans
from masks import LENGTHS


def test_kmeans_is_as_good_as_scikit_learns():
    ours, theirs = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        n, k = int(rng.integers(8, 60)), int(rng.integers(3, 9))
        centers = rng.normal(0, 3, (k, 20))
        x = centers[rng.integers(k, size=n)] + rng.normal(0, 1, (n, 20))
        assignment, distances = kmeans(torch.from_numpy(x), k, np.random.default_rng((0, k)))
        assignment, distances = assignment.numpy(), distances.numpy() ** 2
        # the distances are those to the means of the clusters
        means = np.stack([x[assignment == c].mean(axis=0) for c in range(k)])
        np.testing.assert_allclose(distances, ((x[:, None] - means) ** 2).sum(-1), atol=1e-6)
        ours.append(distances[np.arange(n), assignment].sum())
        theirs.append(KMeans(k, n_init=4, random_state=seed).fit(x).inertia_)
    ratio = np.array(ours) / np.array(theirs)
    assert ratio.mean() < 1.02 and ratio.max() < 1.15


def test_key_frames_are_one_per_scene_in_order_of_time():
    scenes = np.random.default_rng(0).integers(0, 255, (4, THUMBNAIL**2 * 3))
    order = [2] * 7 + [0] * 1 + [3] * 9 + [1] * 4
    noise = np.random.default_rng(1).integers(-3, 4, (len(order), scenes.shape[1]))
    features = np.clip(scenes[order] + noise, 0, 255).astype(np.uint8)
    key_frames = extract_key_frames(features)
    assert list(key_frames) == list(LENGTHS)
    assert [order[i] for i in key_frames[4]] == [2, 0, 3, 1]
    for k, indices in key_frames.items():
        assert len(set(indices)) == k and (np.diff(indices) > 0).all()


@pytest.mark.parametrize("distinct", [1, 2, 3, 5, 8])
def test_k_never_exceeds_the_distinct_frames(distinct):
    base = np.random.default_rng(0).integers(0, 255, (distinct, 3072)).astype(np.uint8)
    key_frames = extract_key_frames(np.repeat(base, 4, axis=0))
    assert list(key_frames) == [k for k in LENGTHS if k <= distinct]
    for k, indices in key_frames.items():
        assert (
            len(set(indices)) == k and (indices % 4 == 0).all()
        )  # of equal frames the first, and none twice


def test_equal_frames_span_the_clip():
    assert equal_frames(8).tolist() == list(range(8))
    frames = equal_frames(40)
    assert frames[[0, -1]].tolist() == [0, 39] and (np.diff(frames) > 0).all()


def test_an_empty_cluster_takes_the_farthest_frame():
    distances = torch.tensor([[1.0, 9, 9], [2, 9, 9], [5, 9, 9], [9, 3, 9]])
    assert assign(distances).tolist() == [0, 0, 2, 1]
