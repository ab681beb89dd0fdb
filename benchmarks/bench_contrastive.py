"""Times of `contrastive` under pytest-benchmark, at quick sizes."""

from __future__ import annotations

from benchmarks.pytest_cases import bench, each_provider


@each_provider("contrastive")
def test_contrastive(benchmark, case, provider):
    """Each provider in each quick case, verified first."""
    bench(benchmark, case, provider)
