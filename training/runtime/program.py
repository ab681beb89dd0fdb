"""How every program of this folder answers a user's mistake: in one sentence, with exit status 1."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from hpkernels import BackendUnavailableError
from training.config_file import key_table, known_keys
from training.runtime import parallel
from training.runtime.stopping import Stopped

TRACEBACK_VARIABLE = "HPKERNELS_TRACEBACK"
"""Set it to see where an error came from."""

_MISTAKES = (
    ValueError,
    TypeError,
    OSError,
    MemoryError,
    BackendUnavailableError,
    np.linalg.LinAlgError,
    torch.OutOfMemoryError,
)


_LINES = 10  # of several mistakes that are told


class SeveralMistakes(ValueError):
    """A sentence, and what is wrong with each of several things: a line each, of which the first are told."""

    def __init__(self, sentence: str, mistakes: Sequence[str]) -> None:
        super().__init__(sentence)
        more = [f"and {len(mistakes) - _LINES} more"] if len(mistakes) > _LINES else []
        self.lines = [*mistakes[:_LINES], *more]


def expanded(path: str) -> Path:
    """`path` with ``~`` as the home folder; for arguments, which a shell has not always expanded."""
    if not path:
        raise argparse.ArgumentTypeError("a path must not be empty")
    return Path(os.path.expanduser(path))


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one sentence and exit status 1 as well."""

    def __init__(self, program: str, doc: str | None, **options: Any) -> None:
        self.program = program
        options.setdefault("description", (doc or "").partition("\n")[0])
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=f"python -m training.{program}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Leave with `message`."""
        _leave(self.program, f"{message}; --help lists the options")


class _PrintKeys(argparse.Action):
    """``--keys``: print the keys of the configuration and leave."""

    def __call__(self, *_: object) -> None:
        print(key_table())
        sys.exit(0)


def add_overrides(parser: Parser, text: str, *, keys: bool = True) -> None:
    """Let a program take ``key=value`` edits of the configuration, and with `keys` also ``--keys``."""
    if keys:
        parser.add_argument(
            "--keys", nargs=0, action=_PrintKeys, help="list all keys of the configuration: default, bounds, meaning"
        )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def parse_with_overrides(parser: Parser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line on which options and ``key=value`` come in any order."""
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        key, _, value = unknown[0].lstrip("-").partition("=")
        if key in known_keys():
            _leave(
                parser.program,
                f"edits of the configuration have no dashes: {key}={value or '...'}, not {unknown[0]}",
            )
        parser.error(f"there is no option {unknown[0]}")
    return options


@contextmanager
def one_sentence(program: str) -> Iterator[None]:
    """Leave the program with one sentence where the block raises what a user's input can cause.

    Anything else is a mistake of ours and keeps its traceback.
    """
    try:
        yield
    except Stopped as stopped:
        if parallel.may_speak():
            print(f"\n{program}: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        if parallel.may_speak():
            print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = _sentence(error) or parallel.lost_rank(error)
        if sentence is not None and not os.environ.get(TRACEBACK_VARIABLE):
            _leave(program, sentence, error.lines if isinstance(error, SeveralMistakes) else ())
        if not parallel.may_speak(consequence=sentence is None):
            sys.exit(1)
        raise


def _sentence(error: Exception) -> str | None:
    """What to say of an error that a user's input can cause; None of others."""
    if isinstance(error, _MISTAKES):
        return str(error) or type(error).__name__
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))  # PyTorch has no class for the memory of a CPU
    if not isinstance(error, RuntimeError) or asked is None:
        return None
    return f"there is not enough memory: {int(asked[1]) / 2**30:,.1f} GiB were asked for at once"


def _leave(program: str, text: str, lines: Sequence[str] = ()) -> NoReturn:
    if not parallel.may_speak():
        sys.exit(1)
    text = text.removeprefix(f"{program}: ").partition("Exception raised from")[0]  # what follows are frames of C++
    said = "\n  ".join(" ".join(line.split()) for line in (f"{program}: {text}{':' if lines else ''}", *lines))
    before = "" if parallel.is_first() else "\n"  # after the bar of the first rank
    sys.exit(f"{before}{said.encode('utf-8', 'backslashreplace').decode()}")
