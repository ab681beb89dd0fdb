"""Checkpoints are whole or absent, and never run code."""

import argparse
import pickle
import resource
import shutil

import pytest
import torch

from training.runtime import checkpoint


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
    with pytest.raises(
        ValueError, match=r"cannot be read as plain tensors: it needs code, \w*.?open, to be unpickled$"
    ):
        checkpoint.load(path)
    assert not marker.exists()


def test_missing_damaged_and_foreign_files(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        checkpoint.load(tmp_path / "nothing.pt")
    torch.save({"values": torch.zeros(1000)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for content in (b"", b"not a checkpoint", b"import", whole[:10], whole[:1000], whole[:-50]):
        (tmp_path / "damaged.pt").write_bytes(content)
        with pytest.raises(ValueError, match="read as plain tensors: it is damaged, cut off, or something else$"):
            checkpoint.load(tmp_path / "damaged.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of this training loop"):
        checkpoint.load(tmp_path / "foreign.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dictionary, got list"):
        checkpoint.load_tensors(tmp_path / "list.pt")


def test_options_of_a_training_script_are_read(tmp_path):
    torch.save({"teacher": {}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "c.pt")
    assert checkpoint.load_tensors(tmp_path / "c.pt")["args"].lr == 0.1


@pytest.fixture
def small_files():
    """Let no file grow beyond some kilobytes, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named_and_leaves_the_old_file_alone(tmp_path, small_files):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1})
    with pytest.raises(OSError, match=r"c.pt cannot be written: File too large$"):
        checkpoint.save(path, {"step": torch.zeros(100_000)})
    page = checkpoint.written_whole(tmp_path / "page.html")
    with pytest.raises(OSError, match=r"page.html cannot be written: File too large$"), page as file:
        file.write(b"a" * 100_000)
    assert checkpoint.load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "c.pt").mkdir()
    with pytest.raises(OSError, match="c.pt cannot be written: "):
        checkpoint.save(tmp_path / "c.pt", {})
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_a_backbone_is_written_once_and_named_by_its_weights(tmp_path):
    weights = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(2), "c": torch.zeros(0, dtype=torch.bfloat16)}
    sha256 = checkpoint.write_backbone(tmp_path, weights)
    written = (tmp_path / "backbone.pt").stat()
    assert checkpoint.write_backbone(tmp_path, dict(reversed(weights.items()))) == sha256
    assert (tmp_path / "backbone.pt").stat() == written
    read = checkpoint.read_backbone(tmp_path / "checkpoint.pt", sha256)
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    for other in (
        {"a": weights["a"].reshape(2, 3)},
        {"a": weights["a"] + 1},
        {"b": torch.tensor(2.0)},
        {"d": weights["a"]},
    ):
        assert checkpoint.write_backbone(tmp_path / "other", weights | other) != sha256
    shutil.copy(tmp_path / "other" / "backbone.pt", tmp_path)
    with pytest.raises(
        ValueError, match="backbone.pt holds other weights than .*checkpoint.pt was trained with: copy the"
    ):
        checkpoint.read_backbone(tmp_path / "checkpoint.pt", sha256)
    (tmp_path / "backbone.pt").unlink()
    with pytest.raises(
        ValueError, match="checkpoint.pt needs the backbone.pt .* beside it, and there is none: copy it along"
    ):
        checkpoint.read_backbone(tmp_path / "checkpoint.pt", sha256)
    (tmp_path / "backbone.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="backbone.pt cannot be read as plain tensors"):
        checkpoint.read_backbone(tmp_path / "checkpoint.pt", sha256)
