"""Who computes an op: the backends of hpkernels, the published way, and (see ``peers.py``) other libraries.

A provider is a function from a case's inputs to the results that are verified, by name: values, and gradients where
the call has a backward pass. A backend that hpkernels gains is a provider without any change here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

import hpkernels
from benchmarks import published
from benchmarks.cases import Case, Inputs
from hpkernels import _native, backends
from hpkernels.ops import _triton
from hpkernels.ops._bits import unpack_bits
from hpkernels.ops._coarse import without_int8
from training.model import to_map, to_rows

Outputs = dict[str, Tensor]

_STEPS = {
    "ghp_contrastive": ("masked_topk", "hidden_positives", "multi_positive_contrastive"),
    "training_step": ("masked_topk", "hidden_positives", "multi_positive_contrastive", "local_propagation"),
}
"""The registered ops that a composed one runs."""


@dataclass(frozen=True)
class Provider:
    """One way to compute some calls of an op.

    Attributes:
        name: of the provider, the same for every op.
        run: the results of a case's inputs.
        calls: the calls that it computes; None: all calls of the op.
        missing: why it cannot run on this machine, or "".
        backend: the backend of hpkernels that it is, if so.
        only: the (device, dtype) that it takes; None: all.
        most_anchors: larger cases are left out, for a provider that holds or computes all pairs.
        compiles: the first call at each size compiles.
    """

    name: str
    run: Callable[[Inputs], Outputs]
    calls: tuple[str, ...] | None = None
    missing: str = ""
    most_anchors: int | None = None
    compiles: bool = False
    backend: str | None = None
    only: tuple[str, str] | None = None

    def reason_missing(self, case: Case) -> str:
        """Why this provider cannot run the op of `case` on its device in its dtype, or ""."""
        place = case.device, case.dtype
        if self.only is not None and place != self.only:
            return f"it takes {self.only[1]} on {self.only[0]}"
        if self.backend is not None:
            arguments = self.backend, case.device, getattr(torch, case.dtype)
            states = [backends.availability(step, *arguments) for step in _STEPS.get(case.op, (case.op,))]
            return next((state.reason for state in states if not state.ok), self.missing)
        return self.missing

    def reason_to_skip(self, case: Case) -> str:
        """Why this provider does not run `case`, or ""."""
        most = self.most_anchors if case.device == "cpu" else _LIMITS_ON_GPU.get(self.most_anchors)
        if most is not None and case.anchors > most:
            return f"left out above {most} anchors: it computes all pairs"
        return self.reason_missing(case)


_registry: dict[str, list[Provider]] = {}
# In anchors. What is published is run as far as its matrices of all pairs fit into the memory of a workstation, and the
# reference, which takes minutes beyond, as far; what is compiled stops before, which shows its growth as well and keeps
# a full run short.
_PAIRS_LIMIT, _COMPILED_LIMIT = 12544, 6272
_PRODUCTS_LIMIT = 3136  # anchors; the broadcast propagation takes seconds an image, the same for each
# The memory of a GPU holds about 20 GB of matrices of the published way at the size of the paper.
_LIMITS_ON_GPU = dict.fromkeys((_PAIRS_LIMIT, _PRODUCTS_LIMIT), 50176)


def provides(
    op: str,
    name: str,
    *calls: str,
    package: str | None = None,
    most_anchors: int | None = None,
    compiles: bool = False,
    only: tuple[str, str] | None = None,
) -> Callable[[Callable[[Inputs], Outputs]], Callable[[Inputs], Outputs]]:
    """Decorate a function that computes `calls` (none: all) of `op` as provider `name`, which may need a package."""
    missing = "" if package is None or importlib.util.find_spec(package) else f"{package} is not installed"

    def enter(run: Callable[[Inputs], Outputs]) -> Callable[[Inputs], Outputs]:
        entry = Provider(name, run, calls or None, missing, most_anchors, compiles, only=only)
        _registry.setdefault(op, []).append(entry)
        return run

    return enter


@cache
def _registered() -> dict[str, list[Provider]]:
    from benchmarks import peers  # noqa: F401, enters its providers

    for op, run in _BACKEND_CALLS.items():
        for backend in backends.BACKENDS:
            for_tests = {"triton": _triton.INTERPRETED, "cuda": _native.EMULATED}.get(backend)
            missing = "interpreted kernels are for tests: their time says nothing" if for_tests else ""
            limit = _PAIRS_LIMIT if backend == "reference" and op != "masked_topk" else None
            call = partial(run, backend=backend)
            entry = Provider(backend, call, None, missing, most_anchors=limit, backend=backend)
            _registry.setdefault(op, []).append(entry)
    without_int8 = Provider("cpu-float32", _masked_topk_without_int8, backend="cpu", only=("cpu", "float32"))
    _registry["masked_topk"].append(without_int8)
    return _registry


def providers(case: Case) -> list[Provider]:
    """Every provider of the case's call, whether it can run or not."""
    return [entry for entry in _registered()[case.op] if entry.calls is None or case.call in entry.calls]


def provider(case: Case, name: str) -> Provider:
    """The provider of this name of the case's call."""
    return next(entry for entry in providers(case) if entry.name == name)


def known_names() -> list[str]:
    """The names of all providers."""
    return sorted({entry.name for entries in _registered().values() for entry in entries})


def differentiate(loss: Tensor, **leaves: Tensor) -> Outputs:
    """The loss and its gradients."""
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach()} | dict(zip((f"grad_{name}" for name in leaves), gradients, strict=True))


def leaf(value: Tensor) -> Tensor:
    """`value` as a tensor that gradients are asked for."""
    return value.detach().requires_grad_()


def _masked_topk(inputs: Inputs, backend: str) -> Outputs:
    top = hpkernels.masked_topk(inputs["query"], inputs["pool"], inputs["k"], backend=backend)
    return {"values": top.values, "indices": top.indices}


def _masked_topk_without_int8(inputs: Inputs) -> Outputs:
    with without_int8():
        return _masked_topk(inputs, "cpu")


def _hidden_positives(inputs: Inputs, backend: str) -> Outputs:
    return {"bits": hpkernels.hidden_positives(inputs["features"], inputs["threshold"], backend=backend).bits}


def _multi_positive_contrastive(inputs: Inputs, backend: str) -> Outputs:
    z = leaf(inputs["z"])
    loss = hpkernels.multi_positive_contrastive(z, inputs["positives"], **inputs["settings"], backend=backend)
    return differentiate(loss, z=z)


def _local_propagation(inputs: Inputs, backend: str) -> Outputs:
    query, key = inputs["query"], inputs["key"]
    if inputs["call"] == "weights":
        return {"weights": hpkernels.local_propagation_weights(query, key, inputs["grid"], backend=backend)}
    if inputs["call"] == "whole+backward":
        return applied(inputs, lambda code: hpkernels.local_propagation(code, query, key, backend=backend))
    return applied(inputs, lambda code: hpkernels.apply_local_propagation(code, inputs["weights"], backend=backend))


def applied(inputs: Inputs, apply: Callable[[Tensor], Tensor]) -> Outputs:
    """The mixed codes of `apply`, and the gradient of the codes if the call has a backward pass."""
    if inputs["call"] == "apply":
        with torch.no_grad():
            return {"mixed": apply(inputs["code"])}
    code = leaf(inputs["code"])
    mixed = apply(code)
    (grad,) = torch.autograd.grad(mixed, code, inputs["grad"])
    return {"mixed": mixed.detach(), "grad_code": grad}


def _contrastive(inputs: Inputs, backend: str) -> Outputs:
    labels, own = inputs["labels"], inputs["keys"] is None
    positives = hpkernels.Labels(labels, None if own else inputs["key_labels"])
    settings = inputs["settings"] | {"positives": positives, "backend": backend}
    return contrasted(inputs, lambda anchors, keys: hpkernels.contrastive(anchors, keys, **settings))


def contrasted(inputs: Inputs, loss_of: Callable[[Tensor, Tensor | None], Tensor]) -> Outputs:
    """The loss of anchors and keys, and their gradients, but for the keys of a queue, which are from earlier steps."""
    leaves, keys = {"anchors": leaf(inputs["anchors"])}, inputs["keys"]
    if keys is not None and inputs["call"] != "queue":
        leaves["keys"] = keys = leaf(keys)
    return differentiate(loss_of(leaves["anchors"], keys), **leaves)


def _ghp_contrastive(inputs: Inputs, backend: str) -> Outputs:
    z, z_mixed = leaf(inputs["z"]), leaf(inputs["z_mixed"])
    return differentiate(_ghp_loss(inputs, z, z_mixed, backend), z=z, z_mixed=z_mixed)


def _ghp_loss(inputs: Inputs, z: Tensor, z_mixed: Tensor, backend: str) -> Tensor:
    return hpkernels.ghp_contrastive(
        z,
        inputs["features"],
        inputs["pool"],
        specific=inputs["specific"],
        specific_pool=inputs["specific_pool"],
        z_mixed=z_mixed,
        **inputs["settings"],
        backend=backend,
    )


def _training_step(inputs: Inputs, backend: str) -> Outputs:
    def apply(code: Tensor) -> Tensor:
        return hpkernels.apply_local_propagation(code, inputs["weights"], backend=backend)

    return training_step(inputs, apply, lambda z, z_mixed: _ghp_loss(inputs, z, z_mixed, backend))


def training_step(inputs: Inputs, apply: Callable, loss_of: Callable) -> Outputs:
    """Forward and backward of head, projection and contrastive loss; the results are the head's gradients."""
    head, projection, grid = inputs["head"], inputs["projection"], inputs["grid"]
    code = head(inputs["features"].unflatten(0, (-1, grid[0] * grid[1])))
    mixed = to_rows(apply(to_map(code, grid)))
    loss = loss_of(projection(code).flatten(0, 1), projection(mixed).flatten(0, 1))
    return differentiate(loss, **{name.replace(".", "_"): value for name, value in head.named_parameters()})


_BACKEND_CALLS = {
    "masked_topk": _masked_topk,
    "hidden_positives": _hidden_positives,
    "multi_positive_contrastive": _multi_positive_contrastive,
    "local_propagation": _local_propagation,
    "contrastive": _contrastive,
    "ghp_contrastive": _ghp_contrastive,
    "training_step": _training_step,
}


@cache
def compiled(function: Callable) -> Callable:
    """``torch.compile`` of a function, once."""
    # The number of rows and columns differs from case to case; fixed ones give code that is at least as fast.
    return torch.compile(function, dynamic=False)


def _published_loss(inputs: Inputs, z: Tensor, z_mixed: Tensor, image_loss: Callable | None = None) -> Tensor:
    # In float32 whatever the inputs: similarities rounded to half precision would change the positives.
    names = ("features", "pool", "specific", "specific_pool")
    similarities = {name: inputs[name].float() for name in names} | {"negatives": inputs["negatives"]}
    settings = {name: value for name, value in inputs["settings"].items() if name not in ("negative_rate", "seed")}
    return published.ghp_contrastive(z.float(), z_mixed.float(), **similarities, **settings, image_loss=image_loss)


_IN_IMAGES = ("sampled", "rate=0.2", "rate=1", "density=0.001", "density=0.1")


@provides("multi_positive_contrastive", "published", *_IN_IMAGES, most_anchors=_PAIRS_LIMIT)
def _published_contrastive(inputs: Inputs, image_loss: Callable = published.image_loss) -> Outputs:
    """The loss of each image with its rows of the masks, which in the published way come unpacked."""
    z, settings = leaf(inputs["z"]), inputs["settings"]
    anchors, group = len(z), settings["anchors_per_image"]
    rows, loss = z.float(), torch.zeros((), device=z.device)
    for start in range(0, anchors, group):
        own = slice(start, start + group)
        positives = unpack_bits(inputs["positives"].bits[own], anchors)
        denominator = torch.logical_or(positives, inputs["negatives"])
        denominator[:, own].fill_diagonal_(False)
        weights = positives.float()
        loss = loss + image_loss(rows[own], rows, weights, weights, denominator.float(), 0.0, settings["temperature"])
    return differentiate(loss * group / anchors, z=z)


@provides("multi_positive_contrastive", "compiled", *_IN_IMAGES, most_anchors=_COMPILED_LIMIT, compiles=True)
def _compiled_contrastive(inputs: Inputs) -> Outputs:
    return _published_contrastive(inputs, compiled(published.image_loss))


@provides("ghp_contrastive", "published", most_anchors=_PAIRS_LIMIT)
def _published_ghp(inputs: Inputs) -> Outputs:
    z, z_mixed = leaf(inputs["z"]), leaf(inputs["z_mixed"])
    return differentiate(_published_loss(inputs, z, z_mixed), z=z, z_mixed=z_mixed)


@provides("ghp_contrastive", "compiled", most_anchors=_COMPILED_LIMIT, compiles=True)
def _compiled_ghp(inputs: Inputs) -> Outputs:
    z, z_mixed = leaf(inputs["z"]), leaf(inputs["z_mixed"])
    loss = _published_loss(inputs, z, z_mixed, compiled(published.image_loss))
    return differentiate(loss, z=z, z_mixed=z_mixed)


@provides("local_propagation", "published", "apply", "apply+backward", "whole+backward", most_anchors=_PRODUCTS_LIMIT)
def _published_propagation(inputs: Inputs) -> Outputs:
    attention = attention_of(inputs)
    return applied(inputs, lambda code: published.propagate(code, attention))


def attention_of(inputs: Inputs) -> Tensor:
    """The masked attention (B, G, G): given, or computed in the published way where the call includes that."""
    if "attention" in inputs:
        return inputs["attention"].to(inputs["code"].dtype)
    attention = published.attention(inputs["query"].float(), inputs["key"].float(), inputs["grid"])
    return attention.to(inputs["code"].dtype)


@provides("local_propagation", "compiled", "apply", "apply+backward", most_anchors=_PRODUCTS_LIMIT, compiles=True)
def _compiled_propagation(inputs: Inputs) -> Outputs:
    propagate = compiled(published.propagate)
    return applied(inputs, lambda code: propagate(code, attention_of(inputs)))


@provides("training_step", "published", most_anchors=_PAIRS_LIMIT)
def _published_step(inputs: Inputs) -> Outputs:
    def apply(code: Tensor) -> Tensor:
        return published.propagate(code, inputs["attention"].to(code.dtype))

    return training_step(inputs, apply, lambda z, z_mixed: _published_loss(inputs, z, z_mixed))
