"""``python -m hpkernels``: versions, devices, libraries, and each op x backend with the reason where missing."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import hpkernels
from hpkernels import _native, backends


def main() -> None:
    """Print the report."""
    print(f"hpkernels {hpkernels.__version__}")
    print(f"python    {platform.python_version()}")
    for package in ("torch", "triton"):
        print(f"{package:9} {_version(package)}")
    print(f"GPU       {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    print(f"CPU       {torch.get_num_threads()} threads")
    print("\nCompiled libraries:")
    for library, (ok, reason) in _native.LIBRARIES.items():
        print(f"  {library:8} {'loaded' if ok else 'not loaded'}: {reason}")
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"\nBackends for float32 tensors on {device_type}, in the order in which 'auto' prefers them:")
    for op in backends.registered_ops():
        print(f"  {op}")
        for backend in backends.BACKENDS:
            ok, reason = backends.availability(op, backend, device_type)
            print(f"    {backend:10} {'available' if ok else 'missing'}: {reason}")
    print("  ghp_contrastive\n    composed of masked_topk, hidden_positives and multi_positive_contrastive")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
