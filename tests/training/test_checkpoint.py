"""Checkpoints are whole or absent, and never run code."""

import pickle

import pytest
import torch

from training import checkpoint


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "deep" / "c.pt", {"tensor": torch.arange(3), "values": {"a": [1, 2.5, "x"]}})
    contents = checkpoint.load(tmp_path / "deep" / "c.pt")
    assert torch.equal(contents["tensor"], torch.arange(3)) and contents["values"] == {"a": [1, 2.5, "x"]}


def test_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1})
    with pytest.raises((pickle.PicklingError, AttributeError)):
        checkpoint.save(path, {"step": lambda: 2})
    assert checkpoint.load(path)["step"] == 1


def test_files_with_code_are_refused(tmp_path):
    path = tmp_path / "evil.pt"
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, path)
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        checkpoint.load(path)
    assert not marker.exists()


def test_missing_damaged_and_foreign_files(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        checkpoint.load(tmp_path / "nothing.pt")
    (tmp_path / "damaged.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        checkpoint.load(tmp_path / "damaged.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of this training loop"):
        checkpoint.load(tmp_path / "foreign.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dictionary, got list"):
        checkpoint.load_tensors(tmp_path / "list.pt")
