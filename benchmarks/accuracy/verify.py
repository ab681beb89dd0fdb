"""No provider is timed before its results equal those of the reference, row by row."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Inputs
from benchmarks.providers import Outputs, Provider, provider
from hpkernels.ops._bits import unpack_bits
from hpkernels.testing import assert_rows_close

# Other orders of summation are no mistakes: a row may be off by some units in the last place of the largest row. One
# wrong pair among a few hundred positives of an anchor changes its row by a thousandth, a hundred times more.
_FACTOR, _ROUNDINGS = 8.0, 64
_HALF_ROUNDINGS = 2  # in half precision, whose results are rounded to it


class WrongResultError(AssertionError):
    """A provider's results are not those of the reference."""


def verify(case: Case, tried: Provider) -> int:
    """Compare the results of `tried` on `case`, or on the same case with fewer images, with those of the reference.

    Returns:
        The number of anchors that were compared.

    Raises:
        WrongResultError: a row differs by more than rounding.
    """
    small = case.verified()
    inputs, exact, plain = _expected(small)
    actual = _comparable(tried.run(inputs), inputs)
    if set(actual) != set(plain):
        raise WrongResultError(f"{small}: {tried.name} gives {sorted(actual)}, expected {sorted(plain)}")
    for name, value in actual.items():
        try:
            assert_rows_close(value, exact[name], plain[name], factor=_FACTOR, eps=_slack(exact[name], case))
        except (AssertionError, ValueError) as error:
            raise WrongResultError(f"{small}: {name} of {tried.name}: {error}") from error
    return small.anchors


@cache
def _expected(case: Case) -> tuple[Inputs, Outputs, Outputs]:
    """The inputs, and the results of the reference in float64 and in their own dtype."""
    inputs = case.inputs()
    reference = provider(case, "reference").run
    double = {name: _double(value) for name, value in inputs.items()}
    return inputs, _comparable(reference(double), double), _comparable(reference(inputs), inputs)


def _slack(exact: Tensor, case: Case) -> float:
    rows = exact.reshape(len(exact) if exact.dim() else 1, -1)
    of_results = 0 if case.dtype == "float32" else _HALF_ROUNDINGS * torch.finfo(getattr(torch, case.dtype)).eps
    return (_ROUNDINGS * torch.finfo(torch.float32).eps + of_results + case.tolerance) * rows.norm(dim=1).max().item()


def _double(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return copy.deepcopy(value).double() if isinstance(value, nn.Module) else value


def _comparable(outputs: Outputs, inputs: Inputs) -> Outputs:
    """The results in a form that does not depend on how a provider stores them."""
    outputs = dict(outputs)
    if "indices" in outputs:
        # Ties may be broken in any way, so it is the products at the indices that must be right.
        chosen = inputs["pool"][outputs.pop("indices")]
        outputs["products"] = torch.einsum("nd,nkd->nk", *map(_at_least_single, (inputs["query"], chosen)))
    if "bits" in outputs:
        bits = outputs.pop("bits")
        outputs["mask"] = unpack_bits(bits, len(bits))
    return {name: value.double() if value.dtype == torch.bool else value for name, value in outputs.items()}


def _at_least_single(value: Tensor) -> Tensor:
    return value.float() if value.element_size() == 2 else value
