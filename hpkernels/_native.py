"""The compiled libraries, loaded with the package: `_C` holds the CPU kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from hpkernels.backends import Availability


def _load(library: str) -> Availability:
    """Load ``hpkernels/<library>.*`` and with it the kernels that it registers, or say why that is not possible."""
    files = sorted(Path(__file__).parent.glob(f"{library}.*"))
    if not files:
        return Availability(False, f"this installation has no {library} library; reinstall with a C++ compiler at hand")
    try:
        torch.ops.load_library(files[0])
    except OSError as error:
        return Availability(False, f"{files[0].name} does not load: {error}")
    return Availability(True, f"compiled, {files[0].name}")


# Once and at import, because Dynamo traces the choice of a backend.
_CPU_LIBRARY = _load("_C")


def supports_cpu(device_type: str, dtype: torch.dtype) -> Availability:
    """Whether the CPU kernels can run, which take every floating-point dtype."""
    if device_type != "cpu":
        return Availability(False, f"the CPU kernels take tensors on the CPU, not on {device_type}")
    return _CPU_LIBRARY
