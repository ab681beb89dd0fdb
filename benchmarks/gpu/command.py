"""``python -m benchmarks gpu-check``: the parts of the check, one after another."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments, results
from benchmarks.gpu import gpu_check, plan

MINUTES, MOST_MINUTES = 9.0, 24 * 60.0


def add_gpu_check(commands: Any) -> None:
    """Enter the command `gpu-check` into those of ``python -m benchmarks``."""
    command = commands.add_parser("gpu-check", help="build, test, sanitize and measure on a GPU, in parts")
    command.add_argument(
        "--part", action="append", choices=tuple(plan.PARTS), help="only this part; may be repeated (default: all)"
    )
    command.add_argument("--minutes", type=_minutes, default=MINUTES, help="what each part may take (default: 9)")
    command.add_argument(
        "--output", type=Path, default=Path("gpu-check"), help="folder of logs and results; those of other parts stay"
    )
    command.add_argument("--archive", type=Path, metavar="FILE", help="a .tar.gz that the folder is packed into")
    command.set_defaults(command=_gpu_check)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"must be a number above 0, at most {MOST_MINUTES:g}, got {text}")
    return value


def _gpu_check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not torch.cuda.is_available():
        parser.error("gpu-check needs a GPU, and PyTorch sees none on this machine")
    arguments.check_output(options.output, parser)
    archive = options.archive
    if archive is not None and (archive.is_dir() or not os.access(archive.resolve().parent, os.W_OK)):
        parser.error(f"--archive must be a file in a folder that can be written to, got {archive}")
    device = results.folder_name(results.device_name("cuda"))
    folder = options.output.resolve() / "results" / device
    chosen = [name for name in plan.PARTS if options.part is None or name in options.part]
    plans = [(name, plan.with_caches(plan.PARTS[name](folder))) for name in chosen]
    return 0 if gpu_check.check(options.output, plans, options.minutes, device, archive) else 1
