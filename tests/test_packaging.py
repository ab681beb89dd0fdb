"""What is built and installed: the libraries, the build's choices and messages, and a wheel beside another PyTorch."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from hpkernels import __main__ as report
from hpkernels import _native

LIBRARIES = [file for file in map(_native._file, _native.LIBRARIES) if file is not None]
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda file: file.name)
NOT_SOURCES = shutil.ignore_patterns(".*", "build", "dist", "runs", "__pycache__", "*.egg-info", "_C*")


def call(*command, environment=None, **options) -> subprocess.CompletedProcess:
    """Run a command with these changes to the environment; None removes a variable."""
    variables = {name: value for name, value in (os.environ | (environment or {})).items() if value is not None}
    return subprocess.run(
        list(map(str, command)), env=variables, capture_output=True, text=True, check=False, **options
    )


def output_of(*command, **options) -> str:
    done = call(*command, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def tool(name: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"looking into libraries needs {name} (binutils), which is not on PATH")
    return name


def unstable_symbols(table: str) -> list[str]:
    """Of the symbols that `nm -DuC` lists, those that are neither the stable ABI's nor of the system's libraries."""
    names = [line.strip()[2:] for line in table.splitlines() if line.strip().startswith("U ")]
    system = re.compile(r"@(GLIBC|GCC|CXXABI|LIBC)")
    return [name for name in names if not system.search(name) and not re.fullmatch(r"(aoti_)?torch_\w+", name)]


@each_library
def test_only_the_stable_abi_is_used(library):
    table = output_of(tool("nm"), "-DuC", library)
    assert "aoti_torch_library_init_def" in table
    assert unstable_symbols(table) == []


def test_unstable_symbols_are_found():
    table = """
                 U aoti_torch_get_size
                 U torch_library_impl
                 U operator delete(void*)@GLIBCXX_3.4
                 U memcpy@GLIBC_2.14
                 w __gmon_start__
                 U c10::Error::Error(int)
                 U vtable for at::Tensor
                 U torch::Library::def()
    """
    assert unstable_symbols(table) == ["c10::Error::Error(int)", "vtable for at::Tensor", "torch::Library::def()"]


@each_library
def test_libraries_are_found_by_name_alone(library):
    """A path of the machine that built it would be wrong on any other."""
    dynamic = output_of(tool("readelf"), "-d", library)
    assert "libtorch_cpu.so" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_report_of_libraries(capsys):
    report.main([])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line)
    for library, (ok, reason) in _native.LIBRARIES.items():
        assert lines[library] == f"{'loaded' if ok else 'not loaded'}: {reason}"
    cuda = _native._file("_C_cuda")
    if cuda is not None and not _native.EMULATED and (_native.LIBRARIES["_C_cuda"].ok or not torch.cuda.is_available()):
        assert re.search(r"compiled for \d+\.\d", lines["_C_cuda"])


@pytest.fixture
def build_ext(repository, tmp_path):
    """``build_ext(choice, **environment)``: run the build into a folder; the process and the libraries there."""

    def build(choice, **environment):
        environment |= {"HPKERNELS_BUILD": choice}
        command = ["setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
        done = call(sys.executable, *command, cwd=repository, environment=environment, timeout=300)
        assert "Traceback" not in done.stderr
        return done, sorted(file.name for file in tmp_path.glob("lib/hpkernels/*"))

    return build


def assert_one_sentence(done, *parts):
    lines = done.stderr.strip().splitlines()
    assert done.returncode != 0 and len(lines) == 1 and lines[0].startswith("hpkernels: "), done.stderr
    for part in parts:
        assert part in lines[0]


def test_build_choice_that_is_unknown(build_ext):
    done, _ = build_ext("gpu")
    assert_one_sentence(done, "HPKERNELS_BUILD must be one of auto, cuda, cpu, none, got 'gpu'")


def test_build_of_nothing(build_ext, tmp_path):
    stale = tmp_path / "lib" / "hpkernels" / "_C.so"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build")
    done, built = build_ext("none", CXX="/nonexistent/c++")
    assert (done.returncode, done.stderr, built) == (0, "", [])


@pytest.mark.parametrize("name", ["CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS"])
def test_number_of_jobs_that_is_no_number(name, build_ext):
    others = {"CMAKE_BUILD_PARALLEL_LEVEL": "", "MAX_JOBS": "2"}
    done, _ = build_ext("cpu", **others | {name: "many"}, CXX=sys.executable)
    assert_one_sentence(done, f"{name} must be a whole number from 1, got 'many'")


@pytest.fixture
def setup_script(repository, monkeypatch):
    """The functions of setup.py, which does not set anything up here."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    for name in ("CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS"):
        monkeypatch.setenv(name, "")
    return runpy.run_path(str(repository / "setup.py"))


@pytest.mark.parametrize(
    ("files", "jobs"),
    [
        ({}, 8),
        ({"proc/meminfo": "MemFree: 9 kB\nMemAvailable:    3145728 kB\n"}, 2),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": f"{8 * 2**30}\n",
                "sys/fs/cgroup/a/memory.current": f"{2 * 2**30}\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/of/the/host\n3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{9 * 2**30}",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "0",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "500000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            5,
        ),
    ],
)
def test_number_of_jobs(files, jobs, setup_script, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in ({"proc/meminfo": "MemAvailable: 104857600 kB\n"} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert setup_script["parallel_jobs"](tmp_path) == jobs
    monkeypatch.setenv("MAX_JOBS", "11")
    assert setup_script["parallel_jobs"](tmp_path) == 11


def test_an_empty_choice_is_the_default(build_ext):
    done, built = build_ext("", CXX="/nonexistent/c++")
    assert (done.returncode, built) == (0, [])
    assert done.stderr.count("going on without") == 2


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_build_without_the_named_compiler(build_ext, choice):
    done, built = build_ext(choice, CXX="/nonexistent/c++")
    assert_one_sentence(done, "CXX is /nonexistent/c++", "set it to a C++17 compiler")
    assert built == []


def test_build_without_any_compiler(build_ext):
    beside_python = str(Path(sys.executable).parent)
    if any(shutil.which(name, path=beside_python) for name in ("c++", "g++", "clang++")):
        pytest.skip("there is a compiler in the folder of this Python")
    done, built = build_ext("cpu", CXX=None, PATH="")
    assert_one_sentence(done, "there is no C++ compiler on PATH", "install g++ or clang++")
    assert built == []


def test_build_without_nvcc(build_ext):
    # As CXX any program does: the build must fail before a compiler starts.
    if not (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
        done, built = build_ext("cuda", CXX=sys.executable)
        assert_one_sentence(done, "the installed torch is built without CUDA")
    else:
        done, built = build_ext("cuda", CXX=sys.executable, CUDACXX=None, CUDA_HOME="/nonexistent")
        assert_one_sentence(done, "there is no nvcc in CUDA_HOME (/nonexistent)", "install the CUDA toolkit")
    assert built == []


def test_build_of_what_is_possible(build_ext):
    """Where nothing is possible ``auto`` says so, once for each library, and succeeds."""
    done, built = build_ext("auto", CXX="/nonexistent/c++")
    assert (done.returncode, built) == (0, [])
    lines = done.stderr.strip().splitlines()
    assert [line.split(":")[1] for line in lines] == [
        f" going on without the {kind} kernels" for kind in ("CUDA", "CPU")
    ]


def wheel_of_cutlass(folder: Path, major: int) -> Path:
    """What matters of a wheel of nvidia-cutlass."""
    path = folder / "nvidia_cutlass.whl"
    with zipfile.ZipFile(path, "w") as archive:
        headers = "cutlass_library/source/include"
        archive.writestr(f"{headers}/cute/tensor.hpp", "")
        archive.writestr(f"{headers}/cutlass/version.h", f"#define CUTLASS_MAJOR {major}\n")
    return path


@pytest.mark.parametrize(
    ("major", "architectures", "succeeds", "said"),
    [
        (4, "7.5 9.0a", True, r"Not for 7\.5.*wgmma\) with CUTLASS in .*include.*kernels for 9\.0a by nvcc [\d.]+\n"),
        (3, "9.0a", False, r"HPKERNELS_CUTLASS must be the headers of CUTLASS 4, .*got .*nvidia_cutlass\.whl"),
        (None, "8.0 9.0a", True, r"kernels for 8\.0 9\.0a by nvcc .*, without wgmma: built without nvidia-cutlass"),
    ],
)
def test_search_for_cutlass(major, architectures, succeeds, said, repository, tmp_path):
    beside_python = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for program in ("cmake", "nvcc", "c++"):
        if shutil.which(program, path=beside_python) is None:
            pytest.skip(f"configuring the CUDA library needs {program}, which is not on PATH")
    torch_folder = Path(torch.__file__).parent
    if not (torch_folder / "lib" / "libtorch_cuda.so").exists():
        pytest.skip("configuring the CUDA library needs a torch with CUDA")
    chosen = "" if major is None else wheel_of_cutlass(tmp_path, major)
    options = ["-DHPKERNELS_CPU=OFF", "-DHPKERNELS_CUDA=ON", f"-DHPKERNELS_TORCH={torch_folder}"]
    # What this machine has of its own is not to be found.
    options += [f"-DHPKERNELS_CUTLASS={chosen}", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"]
    environment = {"PATH": beside_python, "TORCH_CUDA_ARCH_LIST": architectures}
    done = call("cmake", "-S", repository, "-B", tmp_path / "build", *options, environment=environment, timeout=120)
    assert (done.returncode == 0) == succeeds, done.stderr
    assert re.search(said, re.sub(r"\s*\n\s+", " ", done.stdout + done.stderr), re.DOTALL)


@pytest.fixture
def sources(repository, tmp_path):
    """A copy of the checkout without what was built in it; removed afterwards with everything made in it."""
    yield shutil.copytree(repository, tmp_path / "hpkernels", ignore=NOT_SOURCES)
    shutil.rmtree(tmp_path)


def test_a_wheel_of_nothing_compiled_serves_every_platform(sources):
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    output_of(*command, cwd=sources, environment={"HPKERNELS_BUILD": "none"}, timeout=120)
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    (metadata,) = (
        zipfile.Path(wheel) / name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA")
    )
    required = re.findall(r"^Requires-Dist: (.+)$", metadata.read_text(), re.MULTILINE)
    assert [each for each in required if "extra ==" not in each] == ["filelock>=3.12", "torch>=2.11"]
    assert all(">=" in each for each in required)


@pytest.mark.parametrize(
    ("choice", "nvcc", "names"),
    [
        ("none", True, []),
        ("cpu", True, ["torch", "cmake", "ninja"]),
        ("", False, ["torch", "cmake", "ninja"]),
        ("", True, ["torch", "cmake", "ninja", "nvidia-cutlass"]),
    ],
)
def test_what_a_build_asks_for(choice, nvcc, names, repository, tmp_path, monkeypatch):
    backend = runpy.run_path(str(repository / "build_backend" / "hpkernels_build.py"))
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    if nvcc:
        compiler.touch(mode=0o755)
    settings = {"HPKERNELS_BUILD": choice, "CUDA_HOME": str(tmp_path), "CUDACXX": "", "HPKERNELS_CUTLASS": ""}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert [re.split("[>=]", each)[0] for each in backend["compile_requirements"]()] == names


def test_an_sdist_needs_setuptools_alone(sources):
    command = "import hpkernels_build as b; print(b.get_requires_for_build_sdist()); b.build_sdist('dist')"
    environment = {"PYTHONPATH": str(sources / "build_backend")}
    said = output_of(sys.executable, "-c", command, cwd=sources, environment=environment)
    assert "[]" in said.splitlines()
    (archive,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    kept = ["CMakeLists.txt", "setup.py", "cmake/cuda.cmake", "build_backend/hpkernels_build.py"]
    kept += [str(file.relative_to(sources)) for file in sources.glob("csrc/**/*.*")]
    assert set(kept) <= names
    assert not any(name.startswith("tests") for name in names)


def test_an_editable_install_is_a_path(sources):
    """Type checkers and editors follow a path to the package; they do not run the import hook that it could be."""
    command = "import hpkernels_build as b; b.build_editable('dist')"
    environment = {"PYTHONPATH": str(sources / "build_backend"), "HPKERNELS_BUILD": "none"}
    output_of(sys.executable, "-c", command, cwd=sources, environment=environment)
    (wheel,) = (sources / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        files = [name for name in opened.namelist() if ".dist-info/" not in name]
        assert len(files) == 1 and files[0].endswith(".pth")
        assert Path(opened.read(files[0]).decode().strip()).resolve() == sources.resolve()
    assert (sources / "hpkernels" / "py.typed").exists()


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    """The wheel that `make wheel` builds of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(repository, folder / "hpkernels", ignore=NOT_SOURCES)
    # What it needs is installed, in the environment that runs the tests.
    made = ["--old-file", f"{sys.prefix}/release", f"VENV={sys.prefix}", f"RUN={sys.executable}"]
    output_of("make", "wheel", *made, cwd=copy, environment={"MAKEFLAGS": None})
    (built,) = (copy / "dist").glob("*.whl")
    yield built
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["oldest", "newest"])
def environment(request, repository, wheel, tmp_path_factory):
    """``environment(*command)``: the output of Python in an environment with the wheel beside another PyTorch."""
    oldest = re.search(r'"torch>=([\d.]+)"', (repository / "pyproject.toml").read_text())[1]
    folder = tmp_path_factory.mktemp(request.param)
    output_of(sys.executable, "-m", "venv", folder)
    clean = {"cwd": folder, "environment": {"PYTHONPATH": None, "HPKERNELS_BACKEND": None}}

    def python(*command):
        return output_of(folder / "bin" / "python", *command, **clean)

    required = f"torch=={oldest}.*" if request.param == "oldest" else "torch"
    python("-m", "pip", "install", required, "mypy>=1.18", wheel)
    yield python
    shutil.rmtree(folder)


@pytest.mark.packaging
def test_contents_of_a_wheel(wheel):
    assert re.fullmatch(r"hpkernels-[\w.]+-py3-none-manylinux_2_\d+_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hpkernels/_C.so", "hpkernels/py.typed"} <= set(names)
    assert not any(name.startswith(f"{library}.") for name in names for library in ("libtorch", "libc10", "libcudart"))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hpkernels"}


@pytest.mark.packaging
def test_a_wheel_serves_another_torch(environment, repository):
    lines = environment("-m", "hpkernels").splitlines()
    assert any(re.fullmatch(r"_C +loaded: compiled, _C\.so", line) for line in lines)
    said = environment(repository / "tests" / "installed.py").splitlines()[-1]
    assert said.endswith(": right")
    print(said)


@pytest.mark.packaging
def test_a_wheel_loads_into_cuda(environment):
    """Whether or not there is a GPU: the CUDA library, if there is one, loads into a PyTorch with CUDA."""
    environment(
        "-c",
        "import pathlib, torch, hpkernels\n"
        "for file in pathlib.Path(hpkernels.__file__).parent.glob('_C_cuda.so') if torch.version.cuda else ():\n"
        "    torch.ops.load_library(str(file))",
    )


@pytest.mark.packaging
def test_type_checkers_follow_a_wheel(environment, repository):
    said = environment("-m", "mypy", "--strict", repository / "tests" / "typing" / "user_program.py")
    assert said.startswith("Success")


@pytest.mark.packaging
def test_without_nvcc_the_cpu_library_is_built(build_ext):
    done, built = build_ext("auto", CUDACXX=None, CUDA_HOME="/nonexistent")
    assert (done.returncode, built) == (0, ["_C.so"])
    assert done.stderr.startswith("hpkernels: going on without the CUDA kernels: ")
