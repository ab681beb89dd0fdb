"""Run by an environment that has the wheel and not the checkout: what is installed works, and is not the checkout.

Tests of the packaging and the workflow that publishes wheels run it, so it needs PyTorch and hpkernels alone.
"""

from __future__ import annotations

import doctest
import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

import hpkernels


def check_losses_agree() -> None:
    """The compiled library and plain PyTorch have the same losses and gradients."""
    torch.manual_seed(0)
    features, pool, rows = normalize(torch.randn(64, 16)), normalize(torch.randn(8, 16)), normalize(torch.randn(64, 8))
    labels = torch.arange(64) % 5
    losses: dict[str, Callable[[Tensor, str], Tensor]] = {
        "ghp_contrastive": lambda z, backend: hpkernels.ghp_contrastive(
            z, features, pool, anchors_per_image=16, negative_rate=0.3, seed=3, backend=backend
        ),
        "contrastive": lambda z, backend: hpkernels.contrastive(z, positives=labels, backend=backend),
    }
    for name, loss in losses.items():
        values, gradients = {}, {}
        for backend in ("reference", "cpu"):
            z = rows.clone().requires_grad_()
            values[backend] = loss(z, backend)
            (gradients[backend],) = torch.autograd.grad(values[backend], z)
        assert values["reference"] > 0.01 and gradients["reference"].abs().max() > 1e-4, name
        torch.testing.assert_close(values["cpu"], values["reference"], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients["cpu"], gradients["reference"], rtol=1e-4, atol=1e-7)


def check_doctests() -> int:
    """Every example in the package does what it says; returns how many there are."""
    examples = 0
    root = Path(hpkernels.__file__).parent
    for file in sorted(root.rglob("*.py")):
        if ">>> " in file.read_text(encoding="utf-8"):
            name = ".".join(file.relative_to(root.parent).with_suffix("").parts)
            result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
            assert result.failed == 0, name
            examples += result.attempted
    return examples


def check_programs() -> None:
    """``python -m hpkernels`` and what it explains."""
    for arguments in ([], ["explain", "ghp_contrastive", "N=50176", "device=H100"]):
        sys.argv = ["hpkernels", *arguments]
        try:
            runpy.run_module("hpkernels", run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"python -m hpkernels {' '.join(arguments)} ended with {end.code}"


if __name__ == "__main__":
    installed = Path(hpkernels.__file__)
    assert installed.is_relative_to(sys.prefix), f"hpkernels must be imported from {sys.prefix}, got {installed}"
    check_losses_agree()
    check_programs()
    print(f"{check_doctests()} examples, Python {sys.version.split()[0]}, torch {torch.__version__}: right")
