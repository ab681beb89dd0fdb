"""Build the libraries for the GPU at hand, unless those that are there are of the same sources and run here.

Whether sources are the same is told by their contents: a copy of the checkout has other times. So libraries that were
built elsewhere may be carried along: hpkernels/_C.so, hpkernels/_C_cuda.so, and the file `STAMP`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from hpkernels import _native

_CHECKOUT = Path(__file__).parents[2]
STAMP = Path("build", "libraries.json")
"""Says of which sources the libraries are, in the checkout."""
_SOURCES = ("CMakeLists.txt", "setup.py", "cmake/*", "csrc/**/*")
_TRY = (
    "from hpkernels import _native as n; states = n.LIBRARIES.values();"
    "print(*(s.reason for s in states if not s.ok), sep='\\n'); exit(not all(s.ok for s in states))"
)


def digest(files: Iterable[Path]) -> str:
    """The hash of files, of their names and contents."""
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


def identity(checkout: Path) -> dict[str, str]:
    """What the libraries of a checkout were, or would be, built of, and what they are."""
    sources = (path for pattern in _SOURCES for path in checkout.glob(pattern) if path.is_file())
    return {"sources": digest(sources), "libraries": digest(_libraries(checkout))}


def _libraries(checkout: Path, names: Iterable[str] = tuple(_native.LIBRARIES)) -> list[Path]:
    return [path for name in names for path in (checkout / "hpkernels").glob(f"{name}.*")]


def is_current(checkout: Path, capability: tuple[int, int] | None) -> bool:
    """Whether both libraries are those of the sources, with all that they can have for a GPU of this capability."""
    try:
        known = json.loads((checkout / STAMP).read_text())
    except (OSError, ValueError):
        return False
    cuda = _libraries(checkout, ["_C_cuda"])
    if known != identity(checkout) or not cuda:
        return False
    compiled = _native.architectures(cuda[0])
    # Without wgmma if there was no CUTLASS, which there may be now.
    return capability is None or (_native.has_code_for(compiled, capability) and "without wgmma" not in compiled)


def architecture(capability: tuple[int, int] | None) -> dict[str, str]:
    """The variables by which a build is for this GPU alone, which takes a third of the time."""
    if capability is None:
        return {}
    major, minor = capability
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}{'a' if major == 9 else ''}"}


def build(checkout: Path, capability: tuple[int, int] | None) -> bool:
    """Build unless that has been done, and say so; whether it is, and both libraries load if there is a GPU."""
    if is_current(checkout, capability) and _load(checkout, capability):
        print("the libraries are those of the sources: nothing to build")
        return True
    for path in _libraries(checkout):
        path.unlink()  # not overwritten: processes may have it loaded
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=checkout, env=architecture(capability) | os.environ, check=False)
    if done.returncode == 0:
        (checkout / STAMP).parent.mkdir(exist_ok=True)
        (checkout / STAMP).write_text(json.dumps(identity(checkout)) + "\n")
    return done.returncode == 0 and _load(checkout, capability)


def _load(checkout: Path, capability: tuple[int, int] | None) -> bool:
    """In a process of its own: this one has loaded what was there before."""
    return capability is None or subprocess.run([sys.executable, "-c", _TRY], cwd=checkout, check=False).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """Build for the GPU of this machine, or, if it has none, for those of TORCH_CUDA_ARCH_LIST; the exit status."""
    argparse.ArgumentParser(prog="python -m benchmarks.gpu.build", description=__doc__).parse_args(arguments)
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return 0 if build(_CHECKOUT, found) else 1


if __name__ == "__main__":
    sys.exit(main())
