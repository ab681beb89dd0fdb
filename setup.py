"""Builds the compiled libraries with CMake; everything else about the package is in pyproject.toml.

Environment:
    HPKERNELS_BUILD: ``auto`` (what the machine can build; the default), ``cpu`` (fail without a C++ compiler) or
        ``none`` (Python only: the reference backend).
    CMAKE_BUILD_PARALLEL_LEVEL: compilers at a time; the default follows processors and memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CHOICES = ("auto", "cpu", "none")
GIB_PER_COMPILER = 1.5


class CannotBuild(Exception):
    """Why a library cannot be built here, in one sentence that says what to do."""


class CMakeBuild(build_ext):
    """``build_ext`` that leaves the work to CMake and goes on without what cannot be built."""

    def run(self) -> None:
        """Build what HPKERNELS_BUILD asks for into the package."""
        choice = os.environ.get("HPKERNELS_BUILD", "auto")
        if choice not in CHOICES:
            sys.exit(f"hpkernels: HPKERNELS_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = Path("hpkernels") if in_place else Path(self.build_lib) / "hpkernels"
        self.built: list[str] = []
        if choice == "none":
            return
        try:
            build(Path(self.build_temp) / "cmake", package.resolve())
        except CannotBuild as error:
            if choice != "auto":
                sys.exit(f"hpkernels: {error}")
            print(f"hpkernels: installing without compiled kernels: {error}", file=sys.stderr)
            return
        self.built = [str(file) for file in package.glob("_C.*")]

    def get_outputs(self) -> list[str]:
        """The libraries, for the wheel."""
        return self.built

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing that an editable install must link to: the libraries are built into the source tree."""
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for any Python on one platform: the libraries do not use Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``."""
        return "py3", "none", super().get_tag()[2]


def build(directory: Path, package: Path) -> None:
    """Configure and build in `directory`, and install the libraries into `package`."""
    torch = torch_package()
    if shutil.which("cmake") is None:
        raise CannotBuild("there is no cmake on PATH (pip install cmake ninja)")
    directory.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(parallel_jobs()))
    source = Path(__file__).resolve().parent
    run(directory, ["cmake", "-S", source, "-B", directory, *generator, f"-DHPKERNELS_TORCH={torch}"], "configure")
    run(directory, ["cmake", "--build", directory, "--parallel", jobs], "compile")
    run(directory, ["cmake", "--install", directory, "--prefix", package], "install")


def run(directory: Path, command: list[str | Path], step: str) -> None:
    """Run one step of the build; its output goes to a log and, where it fails, the end of that into the error."""
    log = directory / f"{step}.log"
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    log.write_text(done.stdout)
    if done.returncode != 0:
        hint = " (is there a C++17 compiler? set CXX to choose one)" if step == "configure" else ""
        raise CannotBuild(f"CMake could not {step} the libraries{hint}; the log is {log}:\n{done.stdout[-2000:]}")


def torch_package() -> Path:
    """The folder of the installed torch, whose headers the build needs."""
    try:
        import torch
    except ImportError as error:
        raise CannotBuild(
            f"torch cannot be imported ({error}); install it, then use pip --no-build-isolation"
        ) from None
    return Path(torch.__file__).parent


def parallel_jobs() -> int:
    """As many compilers as there are processors and as memory allows."""
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        memory = GIB_PER_COMPILER
    return max(1, min(os.cpu_count() or 1, int(memory / GIB_PER_COMPILER)))


setup(
    ext_modules=[Extension("hpkernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
