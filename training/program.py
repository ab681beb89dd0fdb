"""How every program of this folder answers a user's mistake: in one sentence, with exit status 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml

from hpkernels import BackendUnavailableError

TRACEBACK_VARIABLE = "HPKERNELS_TRACEBACK"
"""Set it to see where an error came from."""

_MISTAKES = (
    ValueError,
    TypeError,
    OSError,
    MemoryError,
    yaml.YAMLError,
    BackendUnavailableError,
    np.linalg.LinAlgError,
    torch.OutOfMemoryError,
)


def expanded(path: str) -> Path:
    """`path` with ``~`` as the home folder; for arguments, which a shell has not always expanded."""
    return Path(os.path.expanduser(path))


@contextmanager
def one_sentence(program: str) -> Iterator[None]:
    """Leave the program with one sentence where the block raises what a user's input can cause.

    Anything else is a mistake of ours and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except _MISTAKES as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        sys.exit(f"{program}: {text.encode('utf-8', 'backslashreplace').decode()}")
