"""``python -m hpkernels [--json]``: the machine, the versions, and what ``backend="auto"`` takes here and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

import hpkernels
from hpkernels import _native, backends

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VARIABLES = re.compile(r"(HPKERNELS|OMP|GOMP|KMP|MKL|TORCH|PYTORCH|TRITON|CUDA|NVIDIA_TF32)_\w+|CXX|MAX_JOBS")


class _Call(NamedTuple):
    """What `backends.select` asks of a tensor."""

    device: torch.device
    dtype: torch.dtype


def report() -> dict[str, Any]:
    """All that the command tells, as plain values."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": versions(),
        "machine": machine(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
        "libraries": {name: state._asdict() for name, state in _native.LIBRARIES.items()},
        "auto": [taken(op, device) for op in backends.registered_ops() for device in devices],
        "not_taken": [entry for device in devices for entry in not_taken(device)],
    }


def versions() -> dict[str, str]:
    """The version of each package, with what PyTorch was built for."""
    return {
        "hpkernels": hpkernels.__version__,
        "Python": platform.python_version(),
        "PyTorch": str(torch.__version__),
        "CUDA of PyTorch": torch.version.cuda or "none",
        "Triton": _version("triton"),
        "NVIDIA driver": _driver(),
    }


def machine() -> dict[str, Any]:
    """Operating system, processor and GPUs."""
    names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "CPU": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "GPU": ", ".join(names) or "none",
    }


def taken(op: str, device: str) -> dict[str, str]:
    """The backend that ``auto`` takes for `op` with each dtype on `device`, or why there is none."""
    row = {"op": op, "device": device}
    for dtype in DTYPES:
        try:
            call: Any = _Call(torch.device(device), dtype)
            row[_name(dtype)] = backends.select(op, "auto", call)
        except (ValueError, backends.BackendUnavailableError) as error:
            row[_name(dtype)] = f"none: {error}"
    return row


def not_taken(device: str) -> list[dict[str, Any]]:
    """Each reason why ``auto`` does not take a backend on `device`, with the ops and dtypes that it is true of."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for op in backends.registered_ops():
        for dtype in DTYPES:
            for backend in backends.BACKENDS:
                ok, reason = backends.automatic(op, backend, device, dtype)
                if not ok:
                    found.setdefault((backend, reason), {}).setdefault(_name(dtype), []).append(op)
    entries = []
    for (passed, reason), ops_of in found.items():
        ops = sorted({op for ops in ops_of.values() for op in ops})
        entries.append({"backend": passed, "device": device, "dtypes": list(ops_of), "ops": ops, "reason": reason})
    return entries


def lines(told: dict[str, Any]) -> list[str]:
    """The report for people."""
    out = []
    for part in ("versions", "machine", "variables"):
        out += [f"{name:28} {value}" for name, value in told[part].items()] or ["no variables are set"]
        out += [""]
    out += [f"{name:28} {'loaded' if state['ok'] else 'not loaded'}: {state['reason']}"
            for name, state in told["libraries"].items()]  # fmt: skip
    out += ["", f"{'what auto takes':28} {'device':7}" + "".join(f"{_name(dtype):11}" for dtype in DTYPES).rstrip()]
    for row in told["auto"]:
        choices = "".join(f"{row[_name(dtype)].partition(':')[0]:11}" for dtype in DTYPES)
        out.append(f"{row['op']:28} {row['device']:7}{choices}".rstrip())
    out.append(f"{'ghp_contrastive':28} composed of masked_topk, hidden_positives and multi_positive_contrastive")
    errors = {row[_name(dtype)] for row in told["auto"] for dtype in DTYPES} - set(backends.BACKENDS)
    out += ["", *sorted(errors)] if errors else []
    out += ["", "not taken, and why"]
    for entry in told["not_taken"]:
        every = len(entry["ops"]) == len(backends.registered_ops())
        what = [] if every else [", ".join(entry["ops"])]
        what += [] if len(entry["dtypes"]) == len(DTYPES) else [", ".join(entry["dtypes"])]
        where = f" ({'; '.join(what)})" if what else ""
        out.append(f"{entry['backend']:10} on {entry['device']:5} {entry['reason']}{where}")
    return out


def main(arguments: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m hpkernels", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    told = report()
    try:
        print(json.dumps(told, indent=2) if options.json else "\n".join(lines(told)), flush=True)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # of a disk that is full
        sys.exit(f"python -m hpkernels: the report cannot be written: {error.strerror}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "none found"
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "unknown"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
