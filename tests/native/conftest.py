from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpkernels.ops import _cuda


@pytest.fixture(scope="session")
def build_core(repository, tmp_path_factory):
    """``build_core(*options)``: build the test module with these CMake options and return the file."""
    # The cmake and ninja of the environment, as pip installs them, come before those of the system.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for tool in ("cmake", "c++"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"building the native test module needs {tool}, which is not on PATH")

    def build(*options: str):
        import pybind11

        folder = tmp_path_factory.mktemp("core")
        configure = ["cmake", "-S", repository, "-B", folder, "-DHPKERNELS_CPU=OFF", "-DHPKERNELS_TEST_MODULE=ON"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", *options]
        for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                env=os.environ | {"PATH": path},
            )
            assert done.returncode == 0, done.stdout[-4000:]
        (module,) = folder.glob("_core*.so")
        return module

    return build


@pytest.fixture(scope="session")
def core(build_core):
    """The core of the kernels as a Python module."""
    spec = importlib.util.spec_from_file_location("_core", build_core())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def exercises(repository, tmp_path_factory):
    """emulation_exercises.cpp and the emulator."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"building the emulator needs {compiler[0]}, which is not on PATH")
    roots = [*filter(None, [os.environ.get("CUDA_HOME")]), "/usr/local/cuda", "/usr"]
    headers = [Path(root) / "include" for root in roots if (Path(root) / "include/crt/host_defines.h").exists()]
    if not headers:
        pytest.skip("building the emulator needs CUDA's headers, which are not in CUDA_HOME or /usr/local/cuda")
    library = tmp_path_factory.mktemp("emulation") / "exercises.so"
    parts = ("common/cuda.cpp", "emulation/cuda.cpp", "emulation/hopper.cpp", "emulation/wgmma.cpp")
    sources = [*(repository / "csrc" / part for part in parts), Path(__file__).with_name("emulation_exercises.cpp")]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-xc++"]
    options += ["-DHPK_EMULATED", "-DHPK_WITH_SM90"]
    includes = [f"-I{repository / 'csrc'}", "-isystem", headers[0]]
    subprocess.run([*compiler, *options, *includes, *sources, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def run(exercises):
    """``run(name, *arguments)``: run an exercise; returns what the emulator says of it, "" if nothing."""

    def run(name, *arguments):
        exercise = getattr(exercises, name)
        exercise.restype = ctypes.c_char_p
        is_tensor = torch.is_tensor
        said = exercise(*(ctypes.c_void_p(given.data_ptr()) if is_tensor(given) else given for given in arguments))
        return said.decode()

    return run


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def one_case(request, engine):
    """A case of the module that differs between the engines, of which that of sm_90a takes 16-bit numbers."""
    takes = (torch.float16, torch.bfloat16) if engine == "1" else _cuda.DTYPES
    return next(case for case in request.module.CASES if case.dtype in takes)
