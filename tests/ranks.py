"""Several processes that are the ranks of one group of torch.distributed, for tests."""

from __future__ import annotations

import datetime
import faulthandler
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT = datetime.timedelta(seconds=120)
"""Of a collective: a rank that waits for one that has left fails, and with it the test."""


def run_ranks(function: Callable[..., Any], ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` returns on each of `ranks` ranks over gloo.

    Each is a new process, which takes seconds to import PyTorch: one function should check many things. It stands at
    the top of its module; its results can be saved by ``torch.save``.
    """
    multiprocessing.spawn(_run_rank, (function, ranks, folder, arguments), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run_rank(rank: int, function: Callable[..., Any], ranks: int, folder: Path, arguments: Any) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    dist.barrier()  # before a rank leaves the others have what they wait for
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may outlive the interpreter, and abort the process while it ends


def raised(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """``"Type: message"`` of what a call raises, "" for nothing."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
