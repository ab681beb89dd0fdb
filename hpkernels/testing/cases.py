"""Which backends, devices and dtypes an op can be tested with on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from hpkernels import backends


class Case(NamedTuple):
    """One way to run an op; ``str(case)`` names it in a test's id."""

    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


def available_cases(op: str, dtypes: Iterable[torch.dtype]) -> list[Case]:
    """Every backend of `op` on every device of this machine with each of `dtypes` that it takes there.

    Args:
        op: the name under which the op's backends are registered.
        dtypes: of the inputs.

    Returns:
        The cases, backends in the order in which ``auto`` prefers them.

    Raises:
        ValueError: no op of that name is registered.

    Examples:
        >>> import torch
        >>> from hpkernels.testing import available_cases
        >>> cases = available_cases("masked_topk", [torch.float32])
        >>> "reference-cpu-float32" in [str(case) for case in cases]
        True
    """
    if op not in backends.registered_ops():
        raise ValueError(f"available_cases: `op` must be one of {', '.join(backends.registered_ops())}, got {op!r}")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [
        Case(backend, device, dtype)
        for backend in backends.BACKENDS
        for device in devices
        for dtype in dtypes
        if backends.availability(op, backend, device, dtype).ok
    ]
