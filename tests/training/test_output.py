"""What a run may write over: its own files, and no others."""

import errno
import json
import os
import shutil
import socket
import threading

import pytest

from training import published
from training.results import write_results
from training.run import expected_sizes, open_run
from training.runtime import checkpoint
from training.runtime.output import check_output, check_space, output_of_run, remove_run
from training.runtime.progress import named_errors
from training.train import train

FILES = ("checkpoint.pt", "best.pt", "backbone.pt", "metrics.json", "report.html", "log.jsonl")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_the_user_stay(tiny_config, tmp_path, name, fresh):
    config = tiny_config(str(tmp_path), steps=3, warmup=1)
    (tmp_path / name).write_text(json.dumps({"mine": 1}))
    with pytest.raises(ValueError, match=f"{name}.* (that no run has written: choose another|cannot be read as)"):
        open_run(config, fresh=fresh)
    assert (tmp_path / name).read_text() == json.dumps({"mine": 1})


@pytest.mark.parametrize("first", ['{"step": 9, "val/miou_linear": 5.0}\n', '{"step": 9, "lo', ""])
def test_a_log_may_begin_anywhere(tiny_config, tmp_path, first):
    """With the scores of a look, where a run of an older version went on, or cut off."""
    (tmp_path / "log.jsonl").write_text(first)
    check_output(tiny_config(str(tmp_path), steps=3, warmup=1), fresh=True)


def test_files_of_a_run_may_go(tiny_config, tmp_path):
    run = open_run(tiny_config(str(tmp_path), steps=3, warmup=1))
    train(run)
    write_results(run)
    run.save(run.best_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint.pt.partial").write_text("of a run that was killed")
    check_output(run.config, fresh=True)
    remove_run(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "tensorboard"]
    assert not list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("output", [".", "imgs", "imgs/train", "labels/new"])
def test_the_photographs_are_no_place_for_a_run(tiny_config, photo_folder, output):
    root = photo_folder()
    config = tiny_config(str(root / output), data={"name": "folder", "root": str(root)})
    with pytest.raises(ValueError, match="config: `output` must be another folder than `data.root`, got"):
        check_output(config, fresh=False)
    check_output(tiny_config(str(root / "run"), data={"name": "folder", "root": str(root)}), fresh=False)


def test_a_checkpoint_of_something_else_is_told_as_such(tiny_config, tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {"format": "another"})
    with pytest.raises(ValueError, match="is not a checkpoint of this training loop"):
        open_run(tiny_config(str(tmp_path)))


def test_fresh_starts_anew(tiny_config):
    train(open_run(tiny_config()))
    assert open_run(tiny_config(warmup=3), fresh=True).state.step == 0
    assert open_run(tiny_config()).state.step == 0, "a fresh start removes the old run"


def test_the_best_state_of_a_run_that_is_no_more_is_no_result(tiny_config):
    run = open_run(tiny_config())
    run.save(run.best_path)
    assert not open_run(tiny_config()).best_path.exists()


def test_one_run_at_a_time(tiny_config, tmp_path):
    config = tiny_config()
    with output_of_run(config):
        holder = f"process {os.getpid()} on {socket.gethostname()} since 20"
        for _ in range(2):  # who asks does not change who is named
            with pytest.raises(ValueError, match=rf"run is being written by {holder}"), output_of_run(config):
                pass
        for arguments in (["export", "x.pt", f"{config.output}/y.pth"], ["import", "x.pth", f"{config.output}/y.pt"]):
            with pytest.raises(SystemExit, match=f"^published: .*run is being written by {holder}"):
                published.main(arguments)
    assert not (tmp_path / "run").exists(), "a run that has not begun leaves nothing"
    with output_of_run(config):
        (tmp_path / "run" / "file").write_text("")
    with output_of_run(config):
        pass
    assert (tmp_path / "run" / "file").exists()


def test_a_lock_of_another_program_stays(tiny_config, tmp_path):
    (tmp_path / "run.lock").write_text("mine")
    with (
        pytest.raises(ValueError, match="holds a run.lock that no run has written"),
        output_of_run(tiny_config(tmp_path)),
    ):
        pass
    assert (tmp_path / "run.lock").read_text() == "mine"


@pytest.mark.parametrize("select", [False, True])
def test_expected_sizes_are_those_of_the_files(tiny_config, select):
    """But for the wrapping of each tensor, which counts in so small a run."""
    run = open_run(tiny_config(quirks={"select_on_labels": select}))
    train(run)
    write_results(run)
    config, folder = run.config, run.checkpoint_path.parent
    sizes = expected_sizes(config, run.state, run.backbone.state_dict(), run.images, run.steps)
    logs = sum(file.stat().st_size for file in (folder / "tensorboard").iterdir())
    real = {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in sizes}
    for name, size in (real | {"tensorboard": logs}).items():
        assert size <= sizes[name] + 30_000, name
        assert sizes[name] <= 2 * size + 5_300_000 * (name == "report.html") + 13_000 * (name == "tensorboard"), name


def test_a_disk_that_is_too_small_is_refused_before_features(tiny_config, monkeypatch):
    monkeypatch.setattr("training.run.FeatureBank", lambda *_, **__: pytest.fail("features were computed"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(ValueError, match=r"run is on a disk with 1.0 MiB left, and the run needs about 5.\d MiB$"):
        open_run(tiny_config())


def test_a_disk_need_have_place_only_for_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 890, 110))
    sizes = {"checkpoint.pt": 100, "backbone.pt": 500}
    with pytest.raises(ValueError):
        check_space(tmp_path, sizes)
    (tmp_path / "checkpoint.pt").write_bytes(b"1" * 100)
    (tmp_path / "backbone.pt").write_bytes(b"1" * 500)
    check_space(tmp_path, sizes)


def test_a_log_that_cannot_be_written_is_named_once(capsys):
    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="^a log in runs/x cannot be written: No space left on device$"):  # noqa: SIM117
        with named_errors("runs/x"):
            thread = threading.Thread(target=fail)  # as that of TensorBoard, whose error comes again
            thread.start()
            thread.join()
            fail()
    assert capsys.readouterr().err == ""
    with pytest.raises(OSError, match="own name"), named_errors("runs/x"):
        raise OSError("checkpoint with its own name")
