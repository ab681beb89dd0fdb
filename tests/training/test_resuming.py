"""What may change when a run goes on, and what may not."""

import hashlib
import shutil

import pytest
import torch
from PIL import Image

from training import train
from training.config_file import known_keys
from training.evaluation import validation
from training.results import write_results
from training.run import load_run, open_run, open_trained
from training.runtime import checkpoint
from training.runtime.resuming import _CHOOSING, _FREE

CLASSES = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Results without the report, which takes most of their time."""
    monkeypatch.setattr("training.results.describe", lambda *_: None)
    monkeypatch.setattr("training.results.write_report", lambda *_: None)


def test_free_keys_are_keys():
    assert set(_CHOOSING) <= set(_FREE) <= set(known_keys())


@pytest.mark.parametrize("select", [False, True])
def test_settings_of_the_method_stay(tiny_config, select):
    quirks = {"select_on_labels": select}
    train.train(open_run(tiny_config(quirks=quirks)))
    with pytest.raises(ValueError, match="holds a run that differs in warmup, loss.temperature; choose another"):
        open_run(tiny_config(quirks=quirks, warmup=3, loss={"temperature": 0.5}))
    other = {"checkpoint_every": 3, "log_every": 7, "evaluation": {"size": [48, 56], "knn": 3}}
    cache = {"name": "patch_dictionary", "patch_size": 8, "features_dim": 24, "cache": False, "views": 1}
    if select:  # these decide which state is the best
        with pytest.raises(ValueError, match="differs in checkpoint_every, evaluation.size;"):
            open_run(tiny_config(quirks=quirks, **other))
        other = {"evaluation": {"knn": 3}}
    run = open_run(tiny_config(quirks=quirks, backend="reference", backbone=cache, **other))
    assert run.state.step == 6 and run.config.evaluation.knn == 3


def test_keys_that_a_checkpoint_lacks_had_their_default(tiny_config):
    run = open_run(tiny_config())
    train.train(run)
    saved = checkpoint.load(run.checkpoint_path)
    del saved["config"]["loss"]["symmetric"]
    checkpoint.save(run.checkpoint_path, saved)
    assert open_run(tiny_config()).state.step == 6
    with pytest.raises(ValueError, match="differs in loss.symmetric;"):
        open_run(tiny_config(loss={"symmetric": False}))


def test_a_finished_run_goes_on(tiny_config, capsys):
    run = open_run(tiny_config())
    train.train(run)
    write_results(run)
    longer = open_run(tiny_config(steps=9))
    train.announce(longer)
    assert "9 steps instead of 6: lambda was 1.00 and goes on from 0.71" in capsys.readouterr().out
    train.train(longer)
    assert not longer.state.clusterings.fitted, "the centres were those of the codes of before"
    assert [figures["step"] for figures in longer.state.history] == list(range(9))
    write_results(longer)
    assert open_trained(longer.checkpoint_path, "cpu")[2].clusterings.fitted
    for length, message in (({"steps": 8}, "`steps` gives 8"), ({"epochs": 2, "steps": None}, "`epochs` gives 4")):
        with pytest.raises(ValueError, match=f"{message} steps, and the run in .* has done 9: give at least as many"):
            open_run(tiny_config(**length))
    assert open_run(tiny_config(epochs=5, steps=None)).steps == 10


def test_a_run_with_a_best_state_goes_on_from_its_last(tiny_config, monkeypatch):
    figures = iter([30.0, 20.0, 10.0] + [5.0] * 9)

    def scores(state, bank, only, how, images):
        figure = next(figures)
        return {name: {"accuracy": figure, "miou": figure} for name in only}

    monkeypatch.setattr(validation, "evaluate", scores)
    run = open_run(tiny_config(quirks={"select_on_labels": True}))
    train.train(run)
    last = {name: value.clone() for name, value in run.state.head.state_dict().items()}
    write_results(run)
    best = checkpoint.load(run.best_path)["state"]["modules"]["head"]
    _, _, given = open_trained(run.checkpoint_path, "cpu")
    longer = open_run(tiny_config(quirks={"select_on_labels": True}, steps=8))
    for name, value in last.items():
        assert torch.equal(given.head.state_dict()[name], best[name]), "evaluate and predict use the best"
        assert torch.equal(longer.state.head.state_dict()[name], value) and not torch.equal(value, best[name])
    train.train(longer)
    assert checkpoint.load(run.best_path)["state"]["step"] == 2, "still the best"

    saved = load_run(run.checkpoint_path)
    saved["state"]["modules"]["clusterings"]["fitted"].fill_(True)  # as older versions left it
    checkpoint.save(run.checkpoint_path, saved)
    with pytest.raises(ValueError, match="a finished run of an older version, .* so it cannot go on; choose another"):
        open_run(tiny_config(quirks={"select_on_labels": True}, steps=10))


@pytest.fixture
def run_on_photographs(tiny_config, photo_folder):
    """A run of one step on a folder of photographs: opens it anew from where they are, and the folder."""
    root = photo_folder()

    def again(root=root, **top):
        data = {"name": "folder", "root": str(root), "size": [32, 40], "classes": CLASSES}
        return open_run(tiny_config(steps=2, warmup=1, data=data, **top))

    again().save()
    return again, root


def changed(root):
    image = root / "imgs" / "train" / "mosaic_0002.png"
    with Image.open(image) as opened:
        opened.transpose(Image.Transpose.ROTATE_180).save(image, compress_level=0)


def relabelled(root):
    label = root / "labels" / "train" / "mosaic_0003.png"
    with Image.open(label) as opened:
        opened.save(label, compress_level=0)


def added(root):
    for kind in ("imgs", "labels"):
        shutil.copy(root / kind / "train" / "mosaic_0000.png", root / kind / "train" / "another.png")


def removed(root):
    for kind in ("imgs", "labels"):
        (root / kind / "train" / "mosaic_0004.png").unlink()


@pytest.mark.parametrize(
    "change, number, message",
    [
        (changed, 6, r"mosaic_0002 has \d+ bytes, and had \d+ bytes"),
        (relabelled, 6, r"the label of mosaic_0003 has \d+ bytes, and had \d+ bytes"),
        (lambda root: shutil.rmtree(root / "labels"), 6, "the label of mosaic_0000 has no file, and had \\d+ bytes"),
        (added, 7, "another is new"),
        (removed, 5, "mosaic_0004 is gone"),
    ],
)
def test_changed_images_are_noticed(run_on_photographs, change, number, message):
    again, root = run_on_photographs
    change(root)
    sentence = f"a run on 6 training images, and the {number} of now are not the same: {message}; choose another"
    with pytest.raises(ValueError, match=sentence):
        again()


def test_moved_and_touched_images_are_the_same(run_on_photographs, tmp_path):
    again, root = run_on_photographs
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    assert again(tmp_path / "copy").state.step == 0


def test_other_images_made_on_the_spot_are_noticed(tiny_config, monkeypatch):
    open_run(tiny_config()).save()
    monkeypatch.setattr("training.data.procedural._CELLS", 5)
    with pytest.raises(ValueError, match="mosaic_0000 has pixels of checksum .*, and had pixels of checksum "):
        open_run(tiny_config())
    with pytest.raises(ValueError, match="a run on 10 training images, and the 8 of now are not the same: mosaic_0000"):
        open_run(tiny_config(data={"name": "procedural", "size": [32, 40], "train_images": 8, "val_images": 4}))


def test_older_checkpoints_know_names_alone(run_on_photographs, tmp_path):
    again, root = run_on_photographs
    run = again()
    saved = load_run(run.checkpoint_path)
    del saved["backbone_sha256"]
    names = hashlib.sha256("\n".join(f"mosaic_{index:04d}" for index in range(6)).encode()).hexdigest()
    saved["images"] = {"number": 6, "names": names}
    checkpoint.save(run.checkpoint_path, saved)
    assert again().state.step == 0
    added(root)
    with pytest.raises(ValueError, match="not the same: their names are others"):
        again()
