"""What type checkers see of the package: `tests/typing/user_program.py` is checked in strict mode by `make lint`."""

from __future__ import annotations

import inspect
import re
import runpy
from typing import get_args, get_type_hints

import pytest
import torch

import hpkernels
from hpkernels import Backend, Variant, backends, compat, distributed, nn
from hpkernels.compat import SupConLoss
from hpkernels.ops.multi_positive_contrastive.options import VARIANTS

MODULES = (
    nn.ClipLoss.__init__,
    nn.HiddenPositiveLoss.__init__,
    nn.LocalPropagation.__init__,
    nn.SupConLoss.__init__,
    SupConLoss.__init__,
)
FUNCTIONS = [value for name in hpkernels.__all__ if inspect.isfunction(value := getattr(hpkernels, name))]


def test_the_literals_are_the_names_that_run():
    assert get_args(Backend) == ("auto", *backends.BACKENDS)
    assert get_args(Variant) == VARIANTS


@pytest.mark.parametrize("function", [*FUNCTIONS, *MODULES], ids=lambda function: function.__qualname__)
def test_public_functions_are_annotated(function):
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    assert set(hints) >= {*parameters, "return"} - {"self"}
    assert hints.get("backend", Backend) == Backend or function is hpkernels.estimate
    assert hints.get("variant", Variant) == Variant
    assert any("backend" in inspect.signature(one).parameters for one in (*FUNCTIONS, *MODULES))


def test_the_vectors_of_a_pool_are_a_tensor():
    assert get_type_hints(nn.ReferencePool)["vectors"] is torch.Tensor


def test_the_user_program_has_everything_public(repository):
    text = (repository / "tests" / "typing" / "user_program.py").read_text()
    names = {*hpkernels.__all__, *nn.__all__, *compat.__all__} | {f"distributed.{name}" for name in distributed.__all__}
    assert [name for name in sorted(names) if not re.search(rf"\b{re.escape(name)}\b", text)] == []


def test_the_user_program_runs(repository):
    runpy.run_path(str(repository / "tests" / "typing" / "user_program.py"), run_name="__main__")
