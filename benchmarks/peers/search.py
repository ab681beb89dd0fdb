"""Libraries that search nearest neighbours, for `masked_topk`. Each fills its index, if it has one, in each call."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Inputs
from benchmarks.registry import Outputs, provides


@provides("masked_topk", "faiss", package="faiss", only=("cpu", "float32"))
def _faiss(inputs: Inputs) -> Outputs:
    import faiss

    index = faiss.IndexFlatIP(inputs["pool"].shape[1])
    index.add(inputs["pool"].numpy())
    values, indices = index.search(inputs["query"].numpy(), inputs["k"])
    return {"values": torch.from_numpy(values), "indices": torch.from_numpy(indices)}


@provides("masked_topk", "faiss-gpu", package="faiss", only=("cuda", "float32", "float16", "bfloat16"))
def _faiss_gpu(inputs: Inputs) -> Outputs:
    faiss = importlib.import_module("faiss")
    importlib.import_module("faiss.contrib.torch_utils")  # makes faiss take tensors where they are
    values, indices = faiss.knn_gpu(
        _faiss_resources(), inputs["query"], inputs["pool"], inputs["k"], metric=faiss.METRIC_INNER_PRODUCT
    )
    return {"values": values, "indices": indices}


@cache
def _faiss_resources() -> Any:
    """What faiss keeps on the device from call to call."""
    faiss = importlib.import_module("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        raise RuntimeError("the installed faiss was built for CPUs: faiss-gpu is needed")
    return faiss.StandardGpuResources()


@provides("masked_topk", "cuvs", package="cuvs", only=("cuda", "float32", "float16"))
def _cuvs(inputs: Inputs) -> Outputs:
    brute_force = importlib.import_module("cuvs.neighbors.brute_force")
    resources = _cuvs_resources(torch.cuda.current_stream().cuda_stream)
    query, pool, k = inputs["query"], inputs["pool"], inputs["k"]
    values = torch.empty((len(query), k), device=query.device)
    indices = torch.empty((len(query), k), dtype=torch.int64, device=query.device)
    index = brute_force.build(pool, metric="inner_product", resources=resources)
    brute_force.search(index, query, k, neighbors=indices, distances=values, resources=resources)
    return {"values": values, "indices": indices}


@cache
def _cuvs_resources(stream: int) -> Any:
    """Handles of cuVS that work on a stream of PyTorch, after what is there and before what follows."""
    return importlib.import_module("cuvs.common").Resources(stream=stream)


@provides("masked_topk", "flashlib", package="flashlib", only=("cuda", "float16", "bfloat16"))
def _flashlib(inputs: Inputs) -> Outputs:
    """By squared distances, |q - p|² = |q|² + |p|² - 2 qp: one more column makes all |p|² the same, R²."""
    flash_knn = importlib.import_module("flashlib").flash_knn
    query, pool = inputs["query"], inputs["pool"]
    squares = _squares(pool)
    missing = (squares.max() - squares).sqrt().to(pool.dtype)
    query, pool = (_widened(rows, column) for rows, column in ((query, query.new_zeros(len(query))), (pool, missing)))
    distances, indices = flash_knn(query, pool, inputs["k"])
    return {"values": (_squares(query)[:, None] + squares.max() - distances) / 2, "indices": indices.long()}


def _squares(rows: Tensor) -> Tensor:
    return rows.float().square().sum(dim=1)


_ALIGNED = 16
"""Columns come in so many, as tiles of a kernel do."""


def _widened(rows: Tensor, column: Tensor) -> Tensor:
    """`rows` with one column more, and columns of zeros up to a multiple of `_ALIGNED`."""
    dim = rows.shape[1]
    wide = rows.new_zeros((len(rows), -(-(dim + 1) // _ALIGNED) * _ALIGNED))
    wide[:, :dim] = rows
    wide[:, dim] = column
    return wide
