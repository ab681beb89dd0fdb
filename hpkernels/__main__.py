"""What hpkernels does on this machine.

``python -m hpkernels``: the versions, and what ``backend="auto"`` takes here and why. ``python -m hpkernels check``:
compare the kernels with the reference on each device, so that ``auto`` knows. ``python -m hpkernels explain
ghp_contrastive N=50176 device=H100``: what a call of these sizes takes, what it costs, and why not the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import hpkernels
from hpkernels import _native, backends, cost, explanation, selfcheck

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VARIABLES = re.compile(r"(HPKERNELS|OMP|GOMP|KMP|MKL|TORCH|PYTORCH|TRITON|CUDA|NVIDIA_TF32)_\w+|CXX|MAX_JOBS")


_UNCHECKED = " (not checked yet)"


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
        "self_checks": [entry for device in _gpus() for entry in self_checks(device)],
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
            row[_name(dtype)] = _taken(op, device, dtype)
        except ValueError as error:
            row[_name(dtype)] = f"none: {error}"
    return row


def _taken(op: str, device: str, dtype: torch.dtype) -> str:
    asked = backends.requested("auto", op)
    if asked != "auto":
        ok, reason = backends.availability(op, asked, device, dtype)
        return asked if ok else f"none: backend '{asked}' is not available: {reason}"
    for backend in backends.BACKENDS:
        state = backends.automatic(op, backend, device, dtype)
        if state.ok or state == selfcheck.UNKNOWN:
            return backend if state.ok else backend + _UNCHECKED
    return "none: no backend takes it"


def self_checks(device: str) -> list[dict[str, Any]]:
    """The verdict of each GPU backend on `device` for each dtype that it can run."""
    return [
        {"backend": backend, "device": device, "dtype": _name(dtype)} | selfcheck.known(*of)._asdict()
        for backend in backends.BACKENDS
        for dtype in DTYPES
        if (of := _checkable(backend, device, dtype))
    ]


def _checkable(backend: str, device: str, dtype: torch.dtype) -> tuple[str, torch.device, torch.dtype] | None:
    """What to ask `hpkernels.selfcheck` about a backend that can run on `device`, and is not the reference itself."""
    # `contrastive` has no CUDA kernels of its own.
    ops = [op for op in backends.registered_ops() if backends.is_registered(op, backend)]
    able = ops and all(backends.availability(op, backend, device, dtype).ok for op in ops)
    return (backend, torch.device(device), dtype) if able and backend != "reference" else None


def _gpus() -> list[str]:
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


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
    out += [
        "",
        f"{'what auto takes':28} {'for tensors on':15}" + "".join(f"{_name(dtype):11}" for dtype in DTYPES).rstrip(),
    ]
    for row in told["auto"]:
        shown = [row[_name(dtype)].partition(":")[0].replace(_UNCHECKED, "*") for dtype in DTYPES]
        choices = "".join(f"{choice:11}" for choice in shown)
        out.append(f"{row['op']:28} {row['device']:15}{choices}".rstrip())
    out.append(f"{'ghp_contrastive':28} composed of masked_topk, hidden_positives and multi_positive_contrastive")
    choices_made = {row[_name(dtype)] for row in told["auto"] for dtype in DTYPES}
    if any(choice.endswith(_UNCHECKED) for choice in choices_made):
        out.append("* if its self-check passes, which the first call makes, or `python -m hpkernels check`")
    errors = {choice for choice in choices_made if choice.startswith("none: ")}
    out += ["", *sorted(errors)] if errors else []
    if told["self_checks"]:
        out += ["", "self-checks", *(_verdict_line(entry) for entry in told["self_checks"])]
    out += ["", "not taken, and why"]
    for entry in told["not_taken"]:
        every = len(entry["ops"]) == len(backends.registered_ops())
        what = [] if every else [", ".join(entry["ops"])]
        what += [] if len(entry["dtypes"]) == len(DTYPES) else [", ".join(entry["dtypes"])]
        where = f" ({'; '.join(what)})" if what else ""
        out.append(f"{entry['backend']:10} on {entry['device']:5} {entry['reason']}{where}")
    return out


def _verdict_line(entry: dict[str, Any]) -> str:
    state = "right" if entry["ok"] else "unknown" if entry["reason"] == selfcheck.UNKNOWN.reason else "FAILED"
    return f"{entry['backend']:10} on {entry['device']:7} {entry['dtype']:10} {state:8} {entry['reason']}"


def check(devices: list[str], limit_s: float, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Check the kernels on each device, each in a process of its own; `show` gets a line for each."""
    found = []
    for device in devices:
        for backend in backends.BACKENDS:
            for dtype in DTYPES:
                # Simulated kernels take minutes, and nobody gets them unasked.
                simulated = device == "cpu" and backend != "cpu"
                if simulated or not _checkable(backend, device, dtype):
                    continue
                verdict = _in_a_process(backend, device, _name(dtype), limit_s)
                found.append({"backend": backend, "device": device, "dtype": _name(dtype)} | verdict._asdict())
                show(_verdict_line(found[-1]))
    return found


def _in_a_process(backend: str, device: str, dtype: str, limit_s: float) -> _native.Availability:
    """The verdict of a new check. If its process ends without one, another makes a verdict of the marker it left."""
    done = _child("--one", backend, device, dtype, limit_s)
    if done is None:
        ended = f"did not end within {limit_s:g} s"
    else:
        try:
            return _native.Availability(**json.loads(done.stdout))
        except (TypeError, ValueError):
            last_line = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            ended = f"ended with status {done.returncode} and said: {last_line}"
    _child("--settle", backend, device, dtype, 60.0)
    return _native.Availability(False, f"its process {ended}")


def _child(task: str, backend: str, device: str, dtype: str, limit_s: float) -> subprocess.CompletedProcess[str] | None:
    """What a process of this command did; None if it took longer."""
    command = [sys.executable, "-m", "hpkernels", "check", task, backend, device, dtype]
    environment = os.environ | {selfcheck.VARIABLE: "again"}
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return None


def main(arguments: list[str] | None = None) -> int:
    """Print the report, check or explain; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hpkernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_report)
    commands = parser.add_subparsers(metavar="COMMAND")
    to_check = "compare the kernels with the reference on each device, and keep the verdict"
    checking = commands.add_parser("check", help=to_check, description=to_check)
    checking.add_argument("--device", action="append", choices=["cpu", *_gpus()], help="only this; may be repeated")
    checking.add_argument(
        "--limit", type=_seconds, default=300.0, metavar="S", help="seconds of a check (default: 300)"
    )
    for task in ("--one", "--settle"):  # of the processes that it starts
        checking.add_argument(task, nargs=3, help=argparse.SUPPRESS)
    checking.set_defaults(command=_check)
    to_explain = "say which backend, engine and route a call takes, why, and what it costs"
    explaining = commands.add_parser("explain", help=to_explain, description=to_explain)
    explaining.add_argument("op", help=f"one of {', '.join(cost.OPS)}")
    explaining.add_argument(
        "sizes",
        nargs="*",
        metavar="NAME=VALUE",
        help=f"device ({', '.join(cost.DEVICES)}), dtype, or a size of `hpkernels.estimate`, as N=50176:"
        f" {', '.join(explanation.SIZES)}",
    )
    explaining.set_defaults(command=_explain)
    for command in (checking, explaining):  # before the command or after it
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    options = parser.parse_args(arguments)
    try:
        told, text, status = options.command(options)
    except ValueError as error:  # of an argument or a variable, in a sentence
        sys.exit(str(error))
    _print(json.dumps(told, indent=2) if options.json else text)
    return int(status)


_Told = tuple[Any, str, int]
"""What a command tells as plain values and for people, and its exit status."""


def _report(options: argparse.Namespace) -> _Told:
    selfcheck.mode()  # a wrong one is said here, and not by each line
    told = report()
    return told, "\n".join(lines(told)), 0


def _check(options: argparse.Namespace) -> _Told:
    if options.one or options.settle:
        backend, device, dtype = options.one or options.settle
        of = backend, torch.device(device), getattr(torch, dtype)
        if options.settle:
            selfcheck.settle(*of)
            return None, "", 0
        told = selfcheck.check(*of)._asdict()
        return told, json.dumps(told), 0
    silent = options.json
    found = check(options.device or ["cpu", *_gpus()], options.limit, (lambda line: None) if silent else _print)
    failed = [entry for entry in found if not entry["ok"]]
    text = f"{len(found) - len(failed)} of {len(found)} are right" if found else "no kernels can run here"
    return found, text, 1 if failed else 0


def _explain(options: argparse.Namespace) -> _Told:
    told = hpkernels.explain(**{"op": options.op} | dict(map(_assignment, options.sizes)))
    return dataclasses.asdict(told), str(told), 0


def _assignment(text: str) -> tuple[str, Any]:
    """The name and the value of "N=50176"; a value is a number, true, false, or a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"explain: sizes must be NAME=VALUE, got {text!r}")
    try:
        known = json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        known = value
    return name, known if isinstance(known, int | float) else value


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text}")


def _print(text: str) -> None:
    try:
        print(text, flush=True)
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
    sys.exit(main())
