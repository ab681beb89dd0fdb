"""Helpers for testing the ops and code built on them: problems, tolerances, and what the ops promise as checks."""

from hpkernels.testing.cases import Case, available_cases
from hpkernels.testing.contract import helpful_error, memory_layouts, unchanged
from hpkernels.testing.problem import Problem, random_problem
from hpkernels.testing.rows import assert_rows_close, row_errors

__all__ = [
    "Case",
    "Problem",
    "assert_rows_close",
    "available_cases",
    "helpful_error",
    "memory_layouts",
    "random_problem",
    "row_errors",
    "unchanged",
]
