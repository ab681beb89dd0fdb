from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn import functional as F

from training.evaluation import kmeans as module
from training.evaluation.kmeans import closeness, kmeans


def blobs(per_cluster: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (N, 16) of any length around five directions, and the direction of each."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(5, 16)
    label = torch.arange(5).repeat(per_cluster)
    noise = 0.1 * torch.randn(len(label), 16, generator=generator)
    return (directions[label] + noise) * (0.1 + 9 * torch.rand(len(label), 1, generator=generator)), label


def inertia(vectors: torch.Tensor, centres: torch.Tensor) -> float:
    return (F.normalize(vectors, dim=1) - centres[closeness(vectors, centres).argmax(dim=1)]).square().sum().item()


def test_finds_directions_whatever_the_lengths():
    vectors, label = blobs()
    centres = kmeans(vectors, 5, seed=0, restarts=3)
    cluster = closeness(vectors, centres).argmax(dim=1)
    assert centres.shape == (5, 16) and centres.dtype == torch.float32
    # One cluster a direction, one direction a cluster.
    assert len({*zip(cluster.tolist(), label.tolist(), strict=True)}) == 5


def test_centres_are_means_of_their_vectors():
    vectors, _ = blobs()
    centres = kmeans(vectors, 5, seed=0, restarts=3)
    cluster, rows = closeness(vectors, centres).argmax(dim=1), F.normalize(vectors, dim=1)
    means = torch.stack([rows[cluster == index].mean(dim=0) for index in range(5)])
    torch.testing.assert_close(centres, means, rtol=0, atol=1e-5)


def test_sampled_starts_are_refined_on_all_vectors(monkeypatch):
    vectors, _ = blobs()
    monkeypatch.setattr(module, "_SAMPLE", 40)
    centres = kmeans(vectors, 5, seed=0, restarts=5)
    rows = F.normalize(vectors, dim=1).numpy()
    best = KMeans(5, n_init=20, random_state=1).fit(rows).inertia_
    assert inertia(vectors, centres) == pytest.approx(best, rel=1e-4)


def test_closeness_is_greatest_for_the_nearest_centre():
    generator = torch.Generator().manual_seed(0)
    vectors, centres = (torch.randn(count, 6, generator=generator) for count in (50, 7))
    nearest = torch.cdist(F.normalize(vectors, dim=1), centres).argmin(dim=1)
    assert torch.equal(closeness(vectors, centres).argmax(dim=1), nearest)


def test_deterministic():
    vectors = torch.randn(2000, 12, generator=torch.Generator().manual_seed(0))
    first = kmeans(vectors, 20, seed=3, restarts=2)
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(first, kmeans(vectors, 20, seed=3, restarts=2))
    assert not torch.equal(first, kmeans(vectors, 20, seed=4, restarts=2))


def test_more_restarts_are_no_worse():
    vectors = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    one, many = (inertia(vectors, kmeans(vectors, 30, seed=0, restarts=restarts)) for restarts in (1, 12))
    assert many < one


def test_input_untouched():
    vectors, _ = blobs()
    before = vectors.clone()
    kmeans(vectors.requires_grad_(), 5, seed=0, restarts=1)
    assert torch.equal(vectors, before)


def test_too_few_vectors():
    with pytest.raises(ValueError, match="`vectors` must have at least 3 rows.*got 2"):
        kmeans(torch.randn(2, 4), 3, seed=0, restarts=1)
