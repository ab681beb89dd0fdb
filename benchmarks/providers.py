"""All providers: the backends of hpkernels, which are here, and those of ``peers``.

A backend that hpkernels gains is a provider without any change here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial

from torch import Tensor

import hpkernels
from benchmarks import peers  # noqa: F401, enters its providers
from benchmarks.cases import END_TO_END, Case, Inputs
from benchmarks.end_to_end import end_to_end
from benchmarks.pages import catalogue
from benchmarks.registry import (
    PAIRS_LIMIT,
    REGISTRY,
    Outputs,
    Provider,
    add,
    applied,
    contrasted,
    differentiate,
    leaf,
    training_step,
)
from hpkernels import _native, backends
from hpkernels.ops import _triton
from hpkernels.ops._coarse import without_int8

__all__ = ["Outputs", "Provider", "known_names", "limits", "provider", "providers"]


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


def _contrastive(inputs: Inputs, backend: str) -> Outputs:
    labels, own = inputs["labels"], inputs["keys"] is None
    positives = hpkernels.Labels(labels, None if own else inputs["key_labels"])
    settings = inputs["settings"] | {"positives": positives, "backend": backend}
    return contrasted(inputs, lambda anchors, keys: hpkernels.contrastive(anchors, keys, **settings))


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
    if inputs["call"] == END_TO_END:
        return end_to_end(inputs, backend)

    def apply(code: Tensor) -> Tensor:
        return hpkernels.apply_local_propagation(code, inputs["weights"], backend=backend)

    return training_step(inputs, apply, lambda z, z_mixed: _ghp_loss(inputs, z, z_mixed, backend))


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
def _registered() -> dict[str, list[Provider]]:
    for op, run in _BACKEND_CALLS.items():
        for backend in backends.BACKENDS:
            for_tests = {"triton": _triton.INTERPRETED, "cuda": _native.EMULATED}.get(backend)
            missing = "interpreted kernels are for tests: their time says nothing" if for_tests else ""
            limit = PAIRS_LIMIT if backend == "reference" and op != "masked_topk" else None
            add(op, Provider(backend, partial(run, backend=backend), None, missing, limit, backend=backend))
    add("masked_topk", Provider("cpu-float32", _masked_topk_without_int8, backend="cpu", only=("cpu", "float32")))
    return REGISTRY


def providers(case: Case) -> list[Provider]:
    """Every provider of the case's call, whether it can run or not."""
    return [entry for entry in _registered()[case.op] if entry.computes(case.call)]


def provider(case: Case, name: str) -> Provider:
    """The provider of this name of the case's call."""
    return next(entry for entry in providers(case) if entry.name == name)


def known_names() -> list[str]:
    """The names of all providers."""
    return sorted({entry.name for entries in _registered().values() for entry in entries})


def limits(cases: Iterable[Case], names: Iterable[str] | None) -> list[str]:
    """What the providers of these names (None: all) that run a case cannot express of its op, a line each."""
    of_ops: dict[tuple[str, str], dict[str, None]] = {}
    for case in cases:
        for entry in providers(case):
            wanted = (names is None or entry.name in names) and not entry.reason_missing(case)
            if wanted and (cannot := catalogue.cannot(entry.name, case.op)):
                of_ops.setdefault((entry.name, cannot), {})[case.op] = None
    return [f"{', '.join(ops)}: {name} cannot express {cannot}" for (name, cannot), ops in sorted(of_ops.items())]
