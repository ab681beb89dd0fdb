"""Builds the compiled libraries with CMake; everything else about the package is in pyproject.toml.

Environment:
    HPKERNELS_BUILD: ``auto`` (what the machine can build; the default), ``cuda`` (both libraries, or fail), ``cpu``
        (the CPU library alone, or fail) or ``none`` (Python only: the reference backend).
    CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST: the C++ compiler, the CUDA toolkit, the GPU architectures (cmake/cuda.cmake).
    HPKERNELS_CUTLASS: CUTLASS, for kernels for sm_90a: its headers, the folder above, or a wheel of nvidia-cutlass; the
        default is the nvidia-cutlass that is installed.
    CMAKE_BUILD_PARALLEL_LEVEL: compilers at a time; the default follows processors and memory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    sys.exit("hpkernels: the build needs setuptools 77 or newer: pip install --upgrade 'setuptools>=77'")

# Each library and the name that CMake's options have for it, the more demanding first: what must fail fails soon.
LIBRARIES = {"_C_cuda": "CUDA", "_C": "CPU"}
CHOICES = {"auto": ("_C", "_C_cuda"), "cuda": ("_C", "_C_cuda"), "cpu": ("_C",), "none": ()}
GIB_PER_COMPILER = 1.5
WORTH_SAYING = re.compile(r"\bwarning\b|Performance Loss|without wgmma")
"""What a build that succeeds shows of its log: ptxas calls serialised wgmma a potential performance loss."""


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
        package = (Path("hpkernels") if in_place else Path(self.build_lib) / "hpkernels").resolve()
        self.built: list[str] = []
        for library, kind in LIBRARIES.items():
            built = library in CHOICES[choice] and self.build_library(library, kind, package, choice == "auto")
            for file in package.glob(f"{library}.*"):
                if built:
                    self.built.append(str(file))
                else:
                    file.unlink()  # of an earlier build, whose sources may be gone

    def build_library(self, library: str, kind: str, package: Path, may_fail: bool) -> bool:
        """Build one library, or say why not and return False; where it must not fail, exit with the reason."""
        try:
            build(Path(self.build_temp) / f"cmake{library}", package, kind)
        except CannotBuild as error:
            if not may_fail:
                sys.exit(f"hpkernels: {error}")
            print(f"hpkernels: going on without the {kind} kernels: {error}", file=sys.stderr)
            return False
        return True

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


def build(directory: Path, package: Path, kind: str) -> None:
    """Configure and build the library of `kind` in `directory`, and install it into `package`."""
    # pip installs cmake and ninja beside the interpreter, which is on PATH only in an activated environment.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    torch = torch_package()
    check_compiler(path)
    if kind == "CUDA":
        check_cuda(path, torch)
    if shutil.which("cmake", path=path) is None:
        raise CannotBuild("there is no cmake on PATH (pip install cmake ninja)")
    directory.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja", path=path)
    options = [f"-DHPKERNELS_{other}={'ON' if other == kind else 'OFF'}" for other in LIBRARIES.values()]
    if kind == "CUDA":
        options += [f"-DHPKERNELS_CUTLASS={cutlass()}"]
    options += ["-G", "Ninja"] if ninja else []
    tools = repr([shutil.which("cmake", path=path), ninja, *map(os.environ.get, ("CXX", "CUDACXX", "CUDA_HOME"))])
    if not (directory / "tools").exists() or (directory / "tools").read_text() != tools:
        options += ["--fresh"]  # CMake keeps those of the last build, which with pip are gone with its environment
        (directory / "tools").write_text(tools)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(parallel_jobs()))
    source = Path(__file__).resolve().parent
    for step, command in {
        "configure": ["cmake", "-S", source, "-B", directory, f"-DHPKERNELS_TORCH={torch}", *options],
        "compile": ["cmake", "--build", directory, "--parallel", jobs],
        "install": ["cmake", "--install", directory, "--prefix", package],
    }.items():
        run(directory, command, step, os.environ | {"PATH": path})


def run(directory: Path, command: list[str | Path], step: str, environment: dict[str, str]) -> None:
    """Run one step of the build: its output goes to a log, its warnings are shown, and its end where it fails."""
    log = directory / f"{step}.log"
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    log.write_text(done.stdout)
    if done.returncode != 0:
        raise CannotBuild(f"CMake could not {step} the library; the log is {log} and ends:\n{done.stdout[-2000:]}")
    for line in filter(WORTH_SAYING.search, done.stdout.splitlines()):
        print(f"hpkernels: {line.removeprefix('-- ')}", file=sys.stderr)


def torch_package() -> Path:
    """The folder of the installed torch, whose headers the build needs."""
    # Found, not imported: that takes seconds, and can fail for reasons that do not matter to a compiler.
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise CannotBuild("torch is not installed here; install it first, then use pip --no-build-isolation")
    return Path(found.origin).parent


def cutlass() -> str:
    """Where CUTLASS is: as the environment says or in the installed nvidia-cutlass; "" where there is neither."""
    if os.environ.get("HPKERNELS_CUTLASS"):
        return str(Path(os.environ["HPKERNELS_CUTLASS"]).resolve())
    found = importlib.util.find_spec("cutlass_library")
    return "" if found is None or found.origin is None else str(Path(found.origin).parent / "source")


def check_compiler(path: str) -> None:
    """Make sure that there is a C++ compiler."""
    chosen = os.environ.get("CXX")
    if chosen:
        if shutil.which(shlex.split(chosen)[0], path=path) is None:
            raise CannotBuild(f"CXX is {chosen}, which is no program here; set it to a C++17 compiler, or unset it")
    elif not any(shutil.which(compiler, path=path) for compiler in ("c++", "g++", "clang++")):
        raise CannotBuild("there is no C++ compiler on PATH; install g++ or clang++, or set CXX to one")


def check_cuda(path: str, torch: Path) -> None:
    """Make sure that there is an nvcc, and a torch to link to. Whether there is a GPU does not matter."""
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        raise CannotBuild("the installed torch is built without CUDA; install one with CUDA from https://pytorch.org")
    home = os.environ.get("CUDA_HOME")
    if os.environ.get("CUDACXX"):
        where, nvcc = "CUDACXX", shutil.which(os.environ["CUDACXX"], path=path)
    elif home:
        where, nvcc = f"CUDA_HOME ({home})", shutil.which("nvcc", path=str(Path(home) / "bin"))
    else:
        where, nvcc = "PATH", shutil.which("nvcc", path=os.pathsep.join((path, "/usr/local/cuda/bin")))
    if nvcc is None:
        raise CannotBuild(f"there is no nvcc in {where}; install the CUDA toolkit and set CUDA_HOME to its folder")


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
