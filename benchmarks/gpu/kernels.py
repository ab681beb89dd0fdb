"""The functions of a backend by themselves, at the paper's size: their times, and the kernels that a call launches.

``python -m benchmarks.gpu.kernels FOLDER BACKEND`` writes CSV files like those of ``python -m benchmarks run``. Rates
count what the kernels multiply (`hpkernels.cost`): discovery the upper triangle of all pairs, the dense loss all pairs
forward, and twice backward, again and for the gradient.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.pages import presentation
from benchmarks.providers import provider
from benchmarks.results import Row
from benchmarks.timing import measure, nvml
from hpkernels import backends
from hpkernels.launches import TEMPERATURE, Inputs, Sizes

Calls = Iterator[tuple[str, str, float, Callable[[], object]]]
"""Op, name, FLOPs of the matrix products (0: none, or no fixed number) and function of each call."""
CALLS = 13
_PROFILED = ("forward+backward", "rate=1")
"""The calls of the whole loss of which each kernel is timed."""


def _search_calls(backend: str, make: Inputs, sizes: Sizes) -> Calls:
    topk, discovery = (backends.implementation(op, backend) for op in ("masked_topk", "hidden_positives"))
    for dim in (sizes.feature_dim, sizes.dim):
        rows, pool = make.unit_rows(sizes.anchors, dim), make.unit_rows(sizes.pool_size, dim)
        products = 2.0 * len(rows) * len(pool) * dim
        yield "masked_topk", f"top-1 D={dim}", products, partial(topk.forward, rows, pool, 1)
        products, threshold = float(sizes.anchors) ** 2 * dim, make.threshold(sizes.anchors, dim)
        yield "hidden_positives", f"discovery D={dim}", products, partial(discovery.forward, rows, threshold)


def _loss_calls(backend: str, make: Inputs, sizes: Sizes) -> Calls:
    op, discovery = "multi_positive_contrastive", backends.implementation("hidden_positives", backend)
    loss, z = backends.implementation(op, backend), make.unit_rows(sizes.anchors, sizes.dim)
    threshold = make.threshold(sizes.anchors, sizes.dim)
    bits = [discovery.forward(make.unit_rows(sizes.anchors, sizes.dim), threshold) for _ in range(2)]
    weight, seed, grad = make.scalar(0.5), make.scalar(0, torch.int64), make.scalar(1.0)[None]
    options, row_bytes = ("joint", True, False), sizes.dim * z.element_size()
    for rate in (0.02, 1.0):
        products = 2.0 * sizes.anchors**2 * sizes.dim if rate == 1 else 0.0
        given = (*bits, weight, None, seed)
        prepare = partial(loss.prepare, *given, sizes.group, rate, *options, True, row_bytes)
        pairs = prepare()
        forward = partial(loss.forward, [z], *given, pairs, sizes.group, TEMPERATURE, 1.0, rate, *options)
        settings = (None, seed, pairs, forward()[1], sizes.group, TEMPERATURE, rate, True)
        yield op, f"prepare rate={rate:g}", 0.0, prepare
        yield op, f"forward rate={rate:g}", products, forward
        yield op, f"backward rate={rate:g}", 2 * products, partial(loss.backward, grad, [z], *bits, *settings)


def _propagation_calls(backend: str, make: Inputs, sizes: Sizes) -> Calls:
    local, (height, width) = backends.implementation("local_propagation", backend), sizes.grid
    # As a ViT computes them: one matrix of queries, keys and values.
    tokens = make.normal(sizes.images, 1 + height * width, 3, sizes.heads, sizes.head_dim).permute(2, 0, 3, 1, 4)
    options = (height, width, 28.0, 0.1, 0.9, 3, 1)
    code = make.normal(sizes.images, sizes.dim, height, width)
    weights = make.normal(sizes.images, 9, height, width).float()
    yield "local_propagation", "weights", 0.0, partial(local.weights_forward, tokens[0], tokens[1], *options)
    yield "local_propagation", "apply forward", 0.0, partial(local.apply_forward, code, weights)
    yield "local_propagation", "apply backward", 0.0, partial(local.apply_backward, code, weights)


_GROUPS = (_search_calls, _loss_calls, _propagation_calls)


def rows_of(backend: str, dtype: str, device: str, environment: dict, sizes: Sizes | None = None) -> Iterator[Row]:
    """A row for each call of a backend; of one that fails, with the reason."""
    sizes = sizes or Sizes()
    for group in _GROUPS:
        make = Inputs(getattr(torch, dtype), torch.device(device), backend)
        try:
            for op, name, flops, call in group(backend, make, sizes):
                row = Row(op, name, sizes.images, *sizes.grid, sizes.anchors, dtype, backend, **environment)
                _time(row, call, flops, device)
                yield row
        except RuntimeError as error:  # while inputs are made
            print(f"{backend}: {error}", flush=True)


def _time(row: Row, call: Callable[[], object], flops: float, device: str) -> None:
    times = measure.times({row.call: call}, device)[row.call]
    row.note = times.note
    if times.seconds:
        row.set_times(times.seconds, times.wall, times.timer)
        row.tflops = float(f"{flops / (1e9 * row.median_ms):.4g}") if flops and row.median_ms else None
    for column, value in nvml.summary(times.samples).items():
        setattr(row, column, value)


def print_kernels(backend: str, case: Case) -> None:
    """Print the kernels that a call of the case launches, with the time of each, the longest first."""
    run, inputs = provider(case, backend).run, case.inputs()
    run(inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run(inputs)
        torch.cuda.synchronize()
    print(f"{case}, {backend}")
    print(
        found.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90), flush=True
    )


def main(folder: Path, backend: str) -> bool:
    """Time all calls of a backend, then print the kernels of the whole loss; whether all could be timed."""
    command = shlex.join(["python", "-m", "benchmarks.gpu.kernels", *sys.argv[1:]])
    environment = results.environment("cuda") | {"command": command}
    timed = []
    for row in rows_of(backend, "float16", "cuda", environment):
        results.write(folder, [row])
        print(presentation.line(row), flush=True)
        timed.append(row.median_ms is not None)
    for call in _PROFILED:
        print_kernels(backend, Case("ghp_contrastive", call, 64, device="cuda", dtype="float16"))
    return len(timed) == CALLS and all(timed)


if __name__ == "__main__":
    sys.exit(0 if main(Path(sys.argv[1]), sys.argv[2]) else 1)
