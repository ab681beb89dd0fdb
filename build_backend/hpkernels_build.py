"""The build backend: that of setuptools, which asks for torch and the build tools only when something is compiled."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

COMPILED = ["torch>=2.11", "cmake>=3.24", "ninja>=1.11"]
CUTLASS = "nvidia-cutlass==4.2.0.0"


def compile_requirements() -> list[str]:
    """What the choice of HPKERNELS_BUILD is compiled with; CUTLASS, of which the headers matter, only with an nvcc."""
    choice = os.environ.get("HPKERNELS_BUILD") or "auto"
    if choice == "none":
        return []
    return (
        [*COMPILED, CUTLASS] if choice != "cpu" and has_nvcc() and not os.environ.get("HPKERNELS_CUTLASS") else COMPILED
    )


def has_nvcc() -> bool:
    """Whether setup.py would find an nvcc."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"]) is not None
    home = os.environ.get("CUDA_HOME")
    path = str(Path(home) / "bin") if home else os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    return shutil.which("nvcc", path=path) is not None


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """What building a wheel needs beside setuptools."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *compile_requirements()]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """What an editable install needs beside setuptools."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *compile_requirements()]
