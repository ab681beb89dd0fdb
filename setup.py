"""Builds the compiled libraries with CMake, and makes a description of the README; all else is in pyproject.toml.

Environment:
    HPKERNELS_BUILD: ``auto`` (what the machine can build; the default), ``cuda`` (both libraries, or fail), ``cpu``
        (the CPU library alone, or fail) or ``none`` (Python only: the reference backend).
    CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST: the C++ compiler, the CUDA toolkit, the GPU architectures (cmake/cuda.cmake).
    HPKERNELS_CUTLASS: CUTLASS, for kernels for sm_90a: its headers, the folder above, or a wheel of nvidia-cutlass; the
        default is the nvidia-cutlass that is installed.
    CMAKE_BUILD_PARALLEL_LEVEL, else MAX_JOBS: compilers at a time; the default follows processors and memory.
An empty variable counts as unset.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
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

ROOT = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/hpkernels/hpkernels"
RELATIVE = re.compile(r"""(?:!\[[^]]*\]\(|\]\(|\b(?:src|srcset|href)=")(?![a-z]+:|#)""")
"""What stands before a relative link or picture, in Markdown or HTML."""

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
        choice = os.environ.get("HPKERNELS_BUILD") or "auto"
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
        return getattr(self, "built", [])

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing that an editable install must link to: the libraries are built into the source tree."""
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for any Python on one platform: the libraries do not use Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``, or ``py3-none-any`` where nothing is compiled."""
        if not self.get_finalized_command("build_ext").get_outputs():
            return "py3", "none", "any"
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
    jobs = str(parallel_jobs())
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
    variables = {name: value for name, value in os.environ.items() if value}
    for step, command in {
        "configure": ["cmake", "-S", ROOT, "-B", directory, f"-DHPKERNELS_TORCH={torch}", *options],
        "compile": ["cmake", "--build", directory, "--parallel", jobs],
        "install": ["cmake", "--install", directory, "--prefix", package],
    }.items():
        run(directory, command, step, variables | {"PATH": path})


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
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        try:
            program = shlex.split(chosen)[0]
        except (ValueError, IndexError):  # a quotation that does not end, or nothing in it
            program = chosen
        if shutil.which(program, path=path) is None:
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


def parallel_jobs(root: Path = Path("/")) -> int:
    """As many compilers as the environment says, or as processors and memory allow; `root` has proc and sys."""
    for name in ("CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS"):
        value = os.environ.get(name)
        if value:
            if not re.fullmatch(r"0*[1-9][0-9]*", value):
                sys.exit(f"hpkernels: {name} must be a whole number from 1, got {value!r}")
            return int(value)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_processors(root)
    memory = free_memory(root)
    return max(1, int(min(processors, quota, memory / 2**30 / GIB_PER_COMPILER)))


def free_memory(root: Path) -> float:
    """Bytes that programs may still take, by the system and by the control group."""
    found = re.search(r"^MemAvailable: +(\d+) kB", read(root / "proc/meminfo"), re.MULTILINE)
    free = [int(found[1]) * 1024.0 if found else GIB_PER_COMPILER * 2**30]
    for folder in cgroup_folders(root, "memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, used = read(folder / limit).strip(), read(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                free.append(float(int(most) - int(used)))
    return min(free)


def cgroup_processors(root: Path) -> float:
    """Processors that the control group's quota comes to; infinite where there is none."""
    quotas = [float("inf")]
    for folder in cgroup_folders(root, "cpu"):
        version1 = f"{read(folder / 'cpu.cfs_quota_us')} {read(folder / 'cpu.cfs_period_us')}"
        for text in (read(folder / "cpu.max"), version1):
            quota, period = [*text.split(), "", ""][:2]
            if quota.isdigit() and period.isdigit() and int(period):
                quotas.append(int(quota) / int(period))
    return min(quotas)


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control groups and of those around them, of version 2 and of version 1."""
    folders = []
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controllers
            inner = Path(path.strip("/"))
            # In a container the path may be the host's: then only the top is there.
            folders += [top / inner, *(top / outer for outer in inner.parents)]
            folders.append(root / "sys/fs/cgroup" / (controller if controllers else ""))
    return folders


def read(file: Path) -> str:
    """The text of a file, or nothing if it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""


def description(readme: str) -> str:
    """The README with absolute links to this version: an index shows it without the repository around it."""
    version = runpy.run_path(str(ROOT / "hpkernels" / "_version.py"))["__version__"]

    def absolute(found: re.Match[str]) -> str:
        view = "raw" if found[0].startswith(("!", "src")) else "blob"
        return f"{found[0]}{REPOSITORY}/{view}/v{version}/"

    return RELATIVE.sub(absolute, readme)


setup(
    long_description=description((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("hpkernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
