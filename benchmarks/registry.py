"""What a provider is, the list of them, and what several of them do alike.

A provider is a function from a case's inputs to the results that are verified, by name: values, and gradients where
the call has a backward pass. Modules that have some import this one, and ``providers.py`` imports those.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.cases import END_TO_END, Case, Inputs
from hpkernels import backends
from training.model import to_map, to_rows

Outputs = dict[str, Tensor]
Run = Callable[[Inputs], Outputs]

STEPS = {
    "ghp_contrastive": ("masked_topk", "hidden_positives", "multi_positive_contrastive"),
    "training_step": ("masked_topk", "hidden_positives", "multi_positive_contrastive", "local_propagation"),
}
"""The registered ops that a composed one runs."""
# In anchors. What is published is run as far as its matrices of all pairs fit into the memory of a workstation, and the
# reference, which takes minutes beyond, as far; what is compiled stops before, which shows its growth as well and keeps
# a full run short.
PAIRS_LIMIT, COMPILED_LIMIT = 12544, 6272
BLOCKS_LIMIT = 16384  # anchors; what goes through all pairs in blocks fits, but takes minutes on a CPU beyond
PRODUCTS_LIMIT = 3136  # anchors; the broadcast propagation takes seconds an image, the same for each
# The memory of a GPU holds about 20 GB of matrices of the published way at the size of the paper.
_LIMITS_ON_GPU = dict.fromkeys((PAIRS_LIMIT, PRODUCTS_LIMIT), 50176)
_CAPTURED = ("cuda", "triton", "torch-topk", "torch-matmul", "torch-bmm", "torch-shifts")
_MOST_COMPILED = 64
"""Sizes that a function is compiled for; PyTorch would take the ninth in eager mode without a word."""


@dataclass(frozen=True)
class Provider:
    """One way to compute some calls of an op.

    Attributes:
        name: of the provider, the same for every op.
        run: the results of a case's inputs.
        calls: the calls that it computes, "rate=" being all that begin so; None: all calls of the op.
        missing: why it cannot run on this machine, or "".
        backend: the backend of hpkernels that it is, if so.
        only: a device and the dtypes that it takes there; None: all of all.
        most_anchors: larger cases are left out, for a provider that holds or computes all pairs.
        compiles: the first call at each size compiles.
    """

    name: str
    run: Run
    calls: tuple[str, ...] | None = None
    missing: str = ""
    most_anchors: int | None = None
    compiles: bool = False
    backend: str | None = None
    only: tuple[str, ...] | None = None

    def computes(self, call: str) -> bool:
        """Whether it computes a call of its op."""
        name, setting, _ = call.partition("=")
        return self.calls is None or call in self.calls or name + setting in self.calls

    def reason_missing(self, case: Case) -> str:
        """Why this provider cannot run the op of `case` on its device in its dtype, or ""."""
        if self.only is not None and (case.device != self.only[0] or case.dtype not in self.only[1:]):
            return f"it takes {' or '.join(self.only[1:])} on {self.only[0]}"
        if case.call == END_TO_END and (package := _lacks_for_training()):
            return f"a whole step needs the extra training: {package} is not installed"
        if self.backend is not None:
            arguments = self.backend, case.device, getattr(torch, case.dtype)
            states = [backends.availability(step, *arguments) for step in STEPS.get(case.op, (case.op,))]
            return next((state.reason for state in states if not state.ok), self.missing)
        return self.missing

    def is_captured(self, case: Case) -> bool:
        """Whether a CUDA graph can hold the call: it then waits for nothing."""
        return self.name in _CAPTURED and case.call != END_TO_END

    def reason_to_skip(self, case: Case) -> str:
        """Why this provider does not run `case`, or ""."""
        most = self.most_anchors if case.device == "cpu" else _LIMITS_ON_GPU.get(self.most_anchors)
        if most is not None and case.anchors > most:
            return f"left out above {most} anchors: it computes all pairs"
        return self.reason_missing(case)


@cache
def _lacks_for_training() -> str:
    """A package that the training loop needs and that is not installed, or ""."""
    try:
        importlib.import_module("training.train")
    except ModuleNotFoundError as error:
        return error.name or str(error)
    return ""


REGISTRY: dict[str, list[Provider]] = {}
"""The providers of each op."""


def provides(
    op: str,
    name: str,
    *calls: str,
    package: str | None = None,
    most_anchors: int | None = None,
    compiles: bool = False,
    only: tuple[str, ...] | None = None,
) -> Callable[[Run], Run]:
    """Decorate a function that computes `calls` (none: all) of `op` as provider `name`, which may need a package."""
    missing = "" if package is None or importlib.util.find_spec(package) else f"{package} is not installed"

    def enter(run: Run) -> Run:
        add(op, Provider(name, run, calls or None, missing, most_anchors, compiles, only=only))
        return run

    return enter


def add(op: str, entry: Provider) -> None:
    """Enter a provider of an op."""
    REGISTRY.setdefault(op, []).append(entry)


@cache
def compiled(function: Callable) -> Callable:
    """``torch.compile`` of a function, once."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_COMPILED)
    # The number of rows and columns differs from case to case; fixed ones give code that is at least as fast.
    return torch.compile(function, dynamic=False)


def leaf(value: Tensor) -> Tensor:
    """`value` as a tensor that gradients are asked for."""
    return value.detach().requires_grad_()


def differentiate(loss: Tensor, **leaves: Tensor) -> Outputs:
    """The loss and its gradients."""
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach()} | dict(zip((f"grad_{name}" for name in leaves), gradients, strict=True))


def applied(inputs: Inputs, apply: Callable[[Tensor], Tensor]) -> Outputs:
    """The mixed codes of `apply`, and the gradient of the codes if the call has a backward pass."""
    if inputs["call"] == "apply":
        with torch.no_grad():
            return {"mixed": apply(inputs["code"])}
    code = leaf(inputs["code"])
    mixed = apply(code)
    (grad,) = torch.autograd.grad(mixed, code, inputs["grad"])
    return {"mixed": mixed.detach(), "grad_code": grad}


def contrasted(inputs: Inputs, loss_of: Callable[[Tensor, Tensor | None], Tensor]) -> Outputs:
    """The loss of anchors and keys, and their gradients, but for the keys of a queue, which are from earlier steps."""
    leaves, keys = {"anchors": leaf(inputs["anchors"])}, inputs["keys"]
    if keys is not None and inputs["call"] != "queue":
        leaves["keys"] = keys = leaf(keys)
    return differentiate(loss_of(leaves["anchors"], keys), **leaves)


def training_step(inputs: Inputs, apply: Callable, loss_of: Callable) -> Outputs:
    """Forward and backward of head, projection and contrastive loss; the results are the head's gradients."""
    head, projection, grid = inputs["head"], inputs["projection"], inputs["grid"]
    code = head(inputs["features"].unflatten(0, (-1, grid[0] * grid[1])))
    mixed = to_rows(apply(to_map(code, grid)))
    loss = loss_of(projection(code).flatten(0, 1), projection(mixed).flatten(0, 1))
    return differentiate(loss, **{name.replace(".", "_"): value for name, value in head.named_parameters()})
