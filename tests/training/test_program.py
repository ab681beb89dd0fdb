"""A user's mistake is one sentence and exit status 1; a mistake of ours keeps its traceback."""

from pathlib import Path

import pytest
import torch

from training import evaluate, predict, published, train
from training.runtime.program import TRACEBACK_VARIABLE, expanded, one_sentence


@pytest.mark.parametrize("error", [ValueError("a\nb"), OSError("a b"), MemoryError("a  b")])
def test_mistakes_of_users(error):
    with pytest.raises(SystemExit) as stopped, one_sentence("train"):
        raise error
    assert stopped.value.code == "train: a b"


def test_mistakes_of_ours_and_on_request(monkeypatch):
    with pytest.raises(AssertionError), one_sentence("train"):
        raise AssertionError
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError), one_sentence("train"):
        raise ValueError


def test_memory_that_is_not_there():
    with pytest.raises(SystemExit) as stopped, one_sentence("train"):
        torch.empty(2**50)
    assert stopped.value.code == "train: there is not enough memory: 4,194,304.0 GiB were asked for at once"
    with pytest.raises(RuntimeError), one_sentence("train"):
        raise RuntimeError("something else")


def test_frames_of_libraries_are_no_part_of_a_sentence():
    with pytest.raises(SystemExit) as stopped, one_sentence("train"):
        raise ValueError("train: too long\nException raised from here (most recent call first):\nframe #0")
    assert stopped.value.code == "train: too long"


def test_interrupt(capsys):
    with pytest.raises(SystemExit) as stopped, one_sentence("train"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and "train: interrupted" in capsys.readouterr().err


def test_home_folders_in_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/a.pt") == Path("/home/me/a.pt") and expanded("~nobody-here/a") == Path("~nobody-here/a")


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "--loss.temperature=2",
            "^train: edits of the configuration have no dashes: loss.temperature=2, not --loss.temp",
        ),
        ("--seed", "^train: edits of the configuration have no dashes: seed=..., not --seed$"),
        ("--frehs", "^train: there is no option --frehs; --help lists the options"),
        ("=", "^train: config: an override must read key=value, without spaces around the ="),
    ],
)
def test_edits_written_otherwise(argument, message):
    with pytest.raises(SystemExit, match=message):
        train.main(["--config", "training/configs/quickstart.yaml", "steps=3", argument, "3"])


@pytest.mark.parametrize("program", [train, evaluate, predict, published])
def test_a_command_line_that_is_not_one(program):
    name = program.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit, match=f"^{name}: the following arguments are required: .*; --help lists the opti"):
        program.main([])


def test_help_leads_to_presets_and_keys(capsys):
    for option, expected in (
        ("--help", ("  camvid  ", "  cityscapes27  ", "  loss  ", "--keys")),
        ("--keys", ("loss.temperature",)),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.main([option])
        assert not stopped.value.code
        text = capsys.readouterr().out
        assert all(words in text for words in expected)
