"""A user's mistake is one sentence and exit status 1; a mistake of ours keeps its traceback."""

from pathlib import Path

import pytest

from training.program import TRACEBACK_VARIABLE, expanded, one_sentence


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


def test_interrupt(capsys):
    with pytest.raises(SystemExit) as stopped, one_sentence("train"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and "train: interrupted" in capsys.readouterr().err


def test_home_folders_in_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/a.pt") == Path("/home/me/a.pt") and expanded("~nobody-here/a") == Path("~nobody-here/a")
