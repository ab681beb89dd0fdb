from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


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


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["0", "1"], ids=["sm_80", "sm_90a"])
def engine(request, monkeypatch):
    """On the CPU the geometry of either engine; on a GPU of another kind than sm_90 both are that of sm_80."""
    monkeypatch.setenv("HPKERNELS_SM90", request.param)
    return request.param
