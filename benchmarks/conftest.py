"""``pytest benchmarks`` collects the bench_*.py files, which plain ``pytest`` leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect bench_*.py as a test module; a file that is named on the command line pytest collects by itself."""
    is_benchmark = file_path.suffix == ".py" and file_path.name.startswith("bench_")
    if is_benchmark and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None
