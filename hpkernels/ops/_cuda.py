"""What the CUDA kernels of all ops share: when they can run, and how they take matrices."""

from __future__ import annotations

import importlib
import os

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels._native import EMULATED, Availability, supports_cuda
from hpkernels.ops import _kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_MOST_WGMMA_BYTES = 1024  # kMostSm90Bytes of csrc/common/cuda.h


def register(op: str) -> None:
    """Enter ``hpkernels/ops/<op>/cuda.py``."""
    automatic: backends.Automatic = "on request" if EMULATED else "checked"
    backends.register(op, "cuda", importlib.import_module(f"hpkernels.ops.{op}.cuda"), automatic=automatic)


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Whether the CUDA kernels can run that multiply on tensor cores."""
    if dtype not in DTYPES:
        return Availability(False, f"the CUDA kernels take float16, bfloat16 and float32, not {dtype}")
    return supports_cuda(device, dtype)


def without_wgmma(capability: tuple[int, int], dtype: torch.dtype, row: int) -> str:
    """Why products of rows of `row` elements are not computed by TMA and wgmma but by mma.sync, or "".

    The rule of ``runs_on_sm90`` in csrc/common/cuda.h, which decides.
    """
    if dtype == torch.float32:
        return "wgmma is used for float16 and bfloat16"
    if row * dtype.itemsize > _MOST_WGMMA_BYTES:
        return f"rows have {row * dtype.itemsize} bytes, and the kernels with wgmma take {_MOST_WGMMA_BYTES}"
    if capability[0] != 9:
        return "wgmma is of compute capability 9.0"
    return "HPKERNELS_SM90=0 is set" if os.environ.get("HPKERNELS_SM90") == "0" else ""


def aligned_rows(matrix: Tensor) -> Tensor:
    """A matrix (R, D) as the kernels read it: rows of whole 16 bytes that start at multiples of 16."""
    return _kernels.aligned_rows(matrix, _kernels.ALIGNMENT // matrix.element_size())
