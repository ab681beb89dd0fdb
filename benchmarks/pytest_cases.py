"""The quick cases of an op as parameters of its pytest-benchmark test, and what that test does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.accuracy.verify import verify
from benchmarks.cases import Case, cases
from benchmarks.providers import Provider, providers


def each_provider(op: str) -> pytest.MarkDecorator:
    """Run a test with ``case, provider`` for every provider of every quick case; those that cannot run are skipped."""
    return pytest.mark.parametrize(
        "case, provider",
        [
            pytest.param(case, provider, id=f"{case.call}-{provider.name}", marks=_skip(provider, case))
            for case in cases(op, quick=True)
            for provider in providers(case)
        ],
    )


def _skip(provider: Provider, case: Case) -> list[pytest.MarkDecorator]:
    reason = provider.reason_to_skip(case)
    return [pytest.mark.skip(reason=reason)] if reason else []


def bench(benchmark: Callable, case: Case, provider: Provider) -> None:
    """Verify the provider, then time it with the fixture of pytest-benchmark."""
    verify(case, provider)
    benchmark.group = str(case)
    benchmark.pedantic(provider.run, args=(case.inputs(),), warmup_rounds=1, rounds=5)
