"""Times of `hidden_positives` under pytest-benchmark, at quick sizes."""

from __future__ import annotations

from benchmarks.pytest_cases import bench, each_provider


@each_provider("hidden_positives")
def test_hidden_positives(benchmark, case, provider):
    """Each provider in each quick case, verified first."""
    bench(benchmark, case, provider)
