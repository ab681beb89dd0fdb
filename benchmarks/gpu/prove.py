"""What gpu-check proves of a GPU backend beyond single calls: threads, a second GPU, sizes, engines, graphs, repeats.

Each proof returns what is wrong, a sentence each; none is all right. Features are multiples of 2^-8, whose inner
products are exact in whatever order summed, so that indices and packed bits must be equal.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.goldens import DTYPES, goldens
from benchmarks.gpu.tasks import engines as engines_of
from benchmarks.timing.timers import captured
from hpkernels import PositiveMask, _native, backends, examination, ghp_contrastive, multi_positive_contrastive
from hpkernels.examination import Sizes
from hpkernels.launches import Calls, Inputs, kernel_calls
from hpkernels.launches import Sizes as CallSizes
from hpkernels.ops._bits import unpack_bits
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.multi_positive_contrastive.reference import anchor_coefficients
from hpkernels.testing import row_errors

_DIMENSIONS = (8, 90, 384, 512, 520)
_FEW = Sizes(images=5, grid=(6, 7), pool_size=96, attention=(1, 6, 7, 2, 24))
_PAPER = Sizes(images=64, grid=(28, 28), pool_size=2048)
_TEMPERATURE = 0.6
_SCRATCH = 2**24  # bytes


def threads(backend: str, device: torch.device, sizes: Sizes = _FEW) -> list[str]:
    """Each call in a thread of its own, which has not used CUDA before: it has no current context."""
    wrong = []
    for dtype in (torch.float16, torch.float32):
        given = {name: value.to(device) for name, value in examination.problem(dtype, sizes).items()}
        expected = examination.results("reference", backend, _exact(given), sizes)
        results = examination.results(backend, backend, given, sizes)
        for what, wanted in expected:
            found: list[Tensor] = []
            thread = threading.Thread(target=_next, args=(results, found))
            thread.start()
            thread.join()
            if not found or examination.wrong_rows(found[0].cpu(), wanted, dtype):
                wrong.append(f"{what}, {dtype}, in a fresh thread")
                break
    return wrong


def _next(results: Iterator[tuple[str, Tensor]], found: list[Tensor]) -> None:
    found.append(next(results)[1])


def second_gpu(backend: str, device: torch.device, sizes: Sizes = _FEW) -> list[str]:
    """Everything on another GPU than the current one, where there are two."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        print("one GPU: nothing to prove of a second")
        return []
    other = torch.device("cuda", 1) if device.type == "cuda" else device
    return [wrong.replace("fresh thread", f"fresh thread on {other}") for wrong in threads(backend, other, sizes)]


def dimensions(backend: str, device: torch.device, sizes: Sizes = _FEW) -> list[str]:
    """Rows of any length, in all dtypes."""
    wrong = []
    for dim in _DIMENSIONS:
        for dtype in DTYPES:
            ok, reason = examination.examine(backend, device, dtype, replace(sizes, dim=dim, feature_dim=dim))
            wrong += [] if ok else [f"D = {dim}, {dtype}: {reason}"]
    return wrong


def engines(backend: str, device: torch.device, anchors: int = 8192, engine: str = "1") -> list[str]:
    """Ranking and discovery by TMA and wgmma, bit for bit those by mma.sync."""
    if backend != "cuda":
        return []
    wrong = []
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        wrong += ["the library is built without wgmma"] * ("without wgmma" in _native.LIBRARIES["_C_cuda"].reason)
    for dtype in DTYPES[:2]:
        for dim in _DIMENSIONS[:4]:
            make = Inputs(dtype, torch.device("cpu"))
            features, pool = (make.unit_rows(count, dim).to(device) for count in (anchors, max(1, anchors // 16)))
            of = {}
            for choice in (engine, "0"):
                with patch.dict(os.environ, HPKERNELS_SM90=choice):
                    top, indices = backends.implementation("masked_topk", backend).forward(features, pool, 1)
                    more = backends.implementation("masked_topk", backend).forward(features, pool, min(8, len(pool)))
                    bits = backends.implementation("hidden_positives", backend).forward(features, top[:, 0])
                    of[choice] = (top, indices, *more, bits)
            names = ("top-1 values", "top-1 indices", "top-8 values", "top-8 indices", "bits")
            for name, first, second in zip(names, of[engine], of["0"], strict=True):
                if not torch.equal(first, second):
                    wrong.append(f"{name} of D = {dim}, {dtype} differ between the engines")
    return wrong


def uneven(backend: str, device: torch.device, anchors: int = 8192) -> list[str]:
    """float16 gradients of two images of which one keeps two anchors and the other all, row by row."""
    group = anchors // 2
    z = Inputs(torch.float16, torch.device("cpu")).unit_rows(anchors, 64).double()
    z = normalize(z, dim=1).half().to(device)
    image = torch.arange(anchors, device=device) // group
    mask = ((image[:, None] == 1) & (image == 1)).fill_diagonal_(False)
    mask[0, 1] = mask[1, 0] = True
    positives, wrong = PositiveMask.from_dense(mask), []
    del mask
    for rate in (0.02, 1.0):

        def gradient(rows: Tensor, by: str, rate: float = rate) -> Tensor:
            leaf = rows.detach().requires_grad_()
            options: dict[str, Any] = {"anchors_per_image": group, "temperature": 0.4, "reweight": True, "seed": 0}
            loss = multi_positive_contrastive(leaf, positives, negative_rate=rate, backend=by, **options)
            return torch.autograd.grad(loss * 2**14, leaf)[0].double()

        expected = gradient(z.float(), "reference")
        errors = row_errors(gradient(z, backend), expected) / expected.norm(dim=1).cpu().clamp(min=1e-6)
        if not errors.max() < 2e-3:
            wrong.append(f"rate {rate}: row {int(errors.argmax())} of the gradient by {errors.max():.1e} of its length")
    return wrong


def sampled_rows(backend: str, device: torch.device, sizes: Sizes = _PAPER, count: int = 64) -> list[str]:
    """The paper's size in float16, on `count` rows in float64: thresholds, bits, row statistics, gradients.

    A gradient takes the statistics of all rows; they are the backend's own, of which those of the sampled rows are
    proved before.
    """
    dtype, group, rate, weight = torch.float16, sizes.grid[0] * sizes.grid[1], 0.02, 0.5
    anchors = sizes.images * group
    make = Inputs(dtype, device)
    sample = torch.linspace(0, anchors - 1, count, device=device).long()
    own = sample[:, None] == torch.arange(anchors, device=device)
    wrong, packed, dense = [], [], []
    for source, dim in (("features", sizes.feature_dim), ("specific", sizes.dim)):
        features, pool = make.unit_rows(anchors, dim), make.unit_rows(sizes.pool_size, dim)
        top = backends.implementation("masked_topk", backend).forward(features, pool, 1)[0][:, 0]
        threshold = torch.cat([(part.double() @ pool.double().T).amax(dim=1) for part in features.split(4096)])
        bits = backends.implementation("hidden_positives", backend).forward(features, top)
        products = features[sample].double() @ features.double().T
        positive = (products > torch.minimum(threshold[sample, None], threshold)) & ~own
        wrong += [] if torch.equal(top.double(), threshold) else [f"thresholds of {source}"]
        wrong += [] if torch.equal(unpack_bits(bits[sample], anchors), positive) else [f"bits of {source}"]
        packed.append(bits)
        dense.append(positive)

    loss, z = backends.implementation("multi_positive_contrastive", backend), make.unit_rows(anchors, sizes.dim)
    seed = make.scalar(0, torch.int64)
    drawn, options, row_bytes = (None, seed), ("joint", True, False), z.shape[1] * z.element_size()
    pairs = loss.prepare(*packed, make.scalar(weight), *drawn, group, rate, *options, True, row_bytes)
    settings = (group, _TEMPERATURE, 1.0, rate, *options)
    losses, rows = loss.forward([z], *packed, make.scalar(weight), *drawn, pairs, *settings)
    settings = (group, _TEMPERATURE, rate, True)
    scale = 2.0**16  # so that gradients are normal numbers
    (grad,) = loss.backward(torch.full_like(losses, scale), [z], *packed, *drawn, pairs, rows, *settings)

    exact = z.double()
    logits = exact[sample] @ exact.T / _TEMPERATURE
    negative = bernoulli(seed, group, anchors, rate)
    denominator = (dense[0] | negative[sample % group]) & ~own
    log_denominator = logits.masked_fill(~denominator, -torch.inf).logsumexp(dim=1)
    counts = [_counts(bits).double() for bits in packed]
    kept = torch.ones(anchors, dtype=torch.bool, device=device)
    coefficients = anchor_coefficients(
        *counts, kept, weight,
        anchors_per_image=group, scale=1.0, variant="joint", reweight=True, keep_specific_only=False,
    )  # fmt: skip
    expected = torch.stack((log_denominator, *(each[sample] for each in coefficients)), dim=1)
    errors = (rows[0][sample].double() - expected).abs() / expected.abs().clamp(min=1e-12)
    wrong += [] if errors.max() < 1e-5 else [f"row statistics by {errors.max():.1e}"]

    all_rows = rows[0].double().T

    def g(of: Tensor, logits: Tensor, in_denominator: Tensor) -> Tensor:
        log_sum, push, pull, pull_specific = of
        return push * (logits - log_sum).exp().where(in_denominator, 0) - pull * dense[0] - pull_specific * dense[1]

    to_columns = (dense[0] | negative[torch.arange(anchors, device=device) % group][:, sample].T) & ~own
    both = g(all_rows[:, sample, None], logits, denominator) + g(all_rows[:, None], logits, to_columns)
    gradient = both @ exact * (scale / _TEMPERATURE)
    errors = row_errors(grad[sample], gradient) / gradient.norm(dim=1).cpu()
    wrong += [] if errors.max() < 5e-3 else [f"gradients by {errors.max():.1e} of a row's length"]
    return wrong


def _counts(bits: Tensor) -> Tensor:
    """The set bits of each row, some rows at a time."""
    columns = 32 * bits.shape[1]
    return torch.cat([unpack_bits(part, columns).sum(dim=1) for part in bits.split(1024)])


def repeats(backend: str, device: torch.device, sizes: CallSizes | None = None) -> list[str]:
    """Each call of each op at the paper's size, three times: the same bits, whatever memory held before."""
    wrong, tried = [], 0
    for engine in engines_of(backend, device.type):
        for op in backends.registered_ops():
            for dtype in DTYPES:
                if backends.availability(op, backend, device, dtype).ok:
                    with patch.dict(os.environ, HPKERNELS_SM90=engine):
                        differ = _differ(partial(kernel_calls, op, dtype, device, sizes, backend), device)
                    wrong += [f"{op}, {name}, {dtype}, HPKERNELS_SM90={engine}: other bits" for name in differ]
                    tried += 1
    return wrong if tried else ["no op has this backend here"]


def _differ(calls: Callable[[], Calls], device: torch.device) -> list[str]:
    """The names of those that give other bits when all are made, and called, again."""
    first: dict[str, list[Tensor]] = {}
    differ = {}
    for filling in (0, 85, 255):
        for name, call in calls().items():
            torch.full((_SCRATCH,), filling, dtype=torch.uint8, device=device)  # freed: a call may be given it
            tensors = [value for value in tree_leaves(call()) if isinstance(value, Tensor)]
            # As bits, of which NaN has the same as itself.
            bits = [value.detach().contiguous().flatten().view(torch.uint8) for value in tensors]
            if not all(torch.equal(*pair) for pair in zip(first.setdefault(name, bits), bits, strict=True)):
                differ[name] = True
    return list(differ)


Replay = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[tuple[Tensor, ...], Callable[[], None]]]


def graphs(backend: str, device: torch.device, sizes: Sizes = _FEW, capture: Replay = captured) -> list[str]:
    """The loss, forward and backward, captured once and replayed with other data, of which other pairs are positive."""
    given = {name: value.to(device) for name, value in examination.problem(torch.float16, sizes).items()}
    leaves = [given[name].detach().requires_grad_() for name in ("z", "z_mixed")]
    wrong = []
    for rate in (0.02, 1.0):

        def call(rate: float = rate) -> tuple[Tensor, ...]:
            sources = {name: given[name] for name in ("specific", "specific_pool", "seed")}
            options: dict[str, Any] = {"anchors_per_image": sizes.grid[0] * sizes.grid[1], "specific_weight": 0.5}
            loss = ghp_contrastive(
                leaves[0], given["features"], given["pool"], z_mixed=leaves[1], negative_rate=rate, backend=backend,
                **sources, **options,
            )  # fmt: skip
            return loss.detach(), *torch.autograd.grad(loss * 1024, leaves)

        results, replay = capture(call)
        for change in ("the same", "other"):
            if change == "other":
                with torch.no_grad():
                    for value in (*leaves, given["features"], given["specific"]):
                        value.copy_(value.flip(0))
            replay()
            if not all(torch.equal(*pair) for pair in zip(results, call(), strict=True)):
                wrong.append(f"rate {rate}: a graph replayed with {change} data differs from a call")
    return wrong


def _exact(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64 on the CPU."""
    return {name: value.cpu().double() if value.is_floating_point() else value.cpu() for name, value in given.items()}


PROOFS: dict[str, Callable[[str, torch.device], list[str]]] = {
    "threads": threads,
    "goldens": goldens,
    "sampled_rows": sampled_rows,
    "repeats": repeats,
    "uneven": uneven,
    "dimensions": dimensions,
    "graphs": graphs,
    "engines": engines,
    "second_gpu": second_gpu,
}
"""By name, what matters most first; `threads` before anything else has used CUDA."""


def prove(backend: str, device: torch.device, names: Iterable[str] = (), report: Callable[[str], None] = print) -> bool:
    """Make the proofs of these names (none: all), go on after one that fails, and report each; whether all hold."""
    right = True
    for name in names or PROOFS:
        try:
            wrong = PROOFS[name](backend, device)
        except Exception as error:  # whatever it is, the others are worth knowing
            wrong = [f"{type(error).__name__}: {error}"]
        right = right and not wrong
        report(f"{backend} {name}: {'; '.join(wrong) or 'right'}")
    return right


if __name__ == "__main__":
    sys.exit(0 if prove(sys.argv[1], torch.device("cuda", 0), sys.argv[2:]) else 1)
