"""Times of `local_propagation` under pytest-benchmark, at quick sizes."""

from __future__ import annotations

from benchmarks.pytest_cases import bench, each_provider


@each_provider("local_propagation")
def test_local_propagation(benchmark, case, provider):
    """Each provider in each quick case, verified first."""
    bench(benchmark, case, provider)
