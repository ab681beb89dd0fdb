"""What a run may write over: its own files, and no others."""

import json

import pytest

from training import checkpoint
from training.output import check_output, remove_run
from training.results import write_results
from training.run import open_run
from training.train import train

FILES = ("checkpoint.pt", "best.pt", "metrics.json", "report.html", "log.jsonl")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_the_user_stay(tiny_config, tmp_path, name, fresh):
    config = tiny_config(str(tmp_path), steps=3, warmup=1)
    (tmp_path / name).write_text(json.dumps({"mine": 1}))
    with pytest.raises(ValueError, match=f"{name}.* (that no run has written: choose another|cannot be read as)"):
        open_run(config, fresh=fresh)
    assert (tmp_path / name).read_text() == json.dumps({"mine": 1})


def test_files_of_a_run_may_go(tiny_config, tmp_path):
    run = open_run(tiny_config(str(tmp_path), steps=3, warmup=1))
    train(run)
    write_results(run)
    run.save(run.best_path)
    (tmp_path / "notes.txt").write_text("mine")
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
