"""Self-supervised training of a ViT: it learns, goes on bit by bit, opens no label, and says what is wrong."""

import json
import math
import os
import re
import shutil
import signal

import PIL.Image
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from training import pretrain, train
from training.backbones.timm_vit import TimmViT
from training.config_file import load_config
from training.pretraining import views
from training.pretraining.distillation import assign, health, tokens_at
from training.pretraining.run import check_config
from training.runtime import checkpoint

VIT = "test_vit"  # timm's smallest, with patches of 16 pixels


def tiny(output, **top):
    """The configuration of a pretraining of a few steps on built-in images, as nested values."""
    return {
        "output": str(output),
        "device": "cpu",
        "steps": 6,
        "batch_size": 4,
        "log_every": 1,
        "checkpoint_every": 2,
        "data": {"name": "procedural", "size": [96, 96], "train_images": 10},
        "backbone": {"name": VIT, "layer": 2},
        "pretraining": {"crop": [64, 80], "prototypes": 16},
    } | top


@pytest.fixture
def run(tmp_path):
    """Pretrain with a tiny configuration into a folder of a name; returns that folder."""

    def run(name="run", *arguments, **top):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tiny(tmp_path / name, **top)))
        pretrain.main(["--config", str(file), *arguments])
        return tmp_path / name

    return run


def figures(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_learns_to_know_a_place_again(run, capsys):
    """In the other view of a photograph: a student that cannot has the loss log K, or a greater one."""
    settings = {"crop": [64, 64], "prototypes": 64, "least_scale": 0.3, "peak_lr": 3e-3}
    data = {"name": "procedural", "size": [96, 96], "train_images": 64}
    options = {"batch_size": 8, "log_every": 4, "checkpoint_every": 100, "data": data, "steps": 60}
    folder = run(pretraining=settings, **options, backbone={"name": VIT, "layer": 3})
    assert f"backbone.name={VIT} backbone.weights={folder / 'backbone.safetensors'}" in capsys.readouterr().out
    lines = figures(folder)
    assert sum(line["loss"] for line in lines[-4:]) / 4 < math.log(64) - 0.05 < lines[0]["loss"]
    assert lines[-1]["effective_rank"] > 3 and lines[-1]["by_position"] < 0.5 and lines[-1]["prototypes_used"] > 32


def test_weights_are_the_teacher_and_train_takes_them(run, tmp_path):
    folder = run()
    weights = folder / "backbone.safetensors"
    teacher = checkpoint.load(folder / "checkpoint.pt")["pretraining"]["teacher"]
    for name, tensor in load_file(weights).items():
        assert torch.equal(tensor, teacher[f"vit.{name}"])
    quickstart = ["data.size=64", "data.train_images=8", "data.val_images=2", "steps=2", "warmup=1", "pool.size=16"]
    vit = [f"backbone.name={VIT}", f"backbone.weights={weights}", "backbone.layer=2"]
    train.main(["--config", "quickstart", *quickstart, *vit, f"output={tmp_path / 'hp'}", "device=cpu"])
    assert (tmp_path / "hp" / "metrics.json").exists()


class Killed(BaseException):
    """The process ends at once."""


@pytest.mark.parametrize("moment", ["killed", "terminated"])
def test_a_run_that_was_interrupted_is_the_run_that_was_not(run, moment, monkeypatch):
    whole = run("whole")
    step = pretrain.pretrain_step

    def interrupted(run_, state, *rest, **options):
        if state.step == 3:
            if moment == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run_, state, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises((Killed, SystemExit)) as ended:
        patch.setattr(pretrain, "pretrain_step", interrupted)
        run("other")
    assert moment == "killed" or ended.value.code == 128 + signal.SIGTERM
    other = whole.with_name("other")
    done = checkpoint.load(other / "checkpoint.pt")["pretraining"]["step"]
    assert done == {"killed": 2, "terminated": 4}[moment] and not (other / "backbone.safetensors").exists()
    run("other")
    one, two = ((folder / "backbone.safetensors").read_bytes() for folder in (whole, other))
    assert one == two
    lines = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in figures(folder)] for folder in (whole, other)
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == list(range(6))


TIMES = {"images_per_second", "memory_gb"}


def test_minutes_settle_the_steps_which_repeat_the_run(run, monkeypatch):
    times = iter([0.0, 60.0])  # of the steps that are timed
    monkeypatch.setattr(pretrain, "_now", lambda device: next(times))
    settings = {"crop": [64, 80], "prototypes": 16}
    timed = run("timed", pretraining=settings | {"minutes": 0.2})
    assert checkpoint.load(timed / "checkpoint.pt")["steps"] == 4
    run("timed", pretraining=settings | {"minutes": 0.2})  # is finished, and times nothing
    counted = run("counted", steps=4)
    assert (timed / "backbone.safetensors").read_bytes() == (counted / "backbone.safetensors").read_bytes()


@pytest.mark.parametrize("layout", ["splits", "one folder"])
def test_no_label_is_opened(run, photo_folder, layout, monkeypatch):
    root = photo_folder()
    if layout == "one folder":  # photographs in the root itself, beside the folder of labels
        for file in (root / "imgs" / "train").iterdir():
            file.rename(root / file.name)
        shutil.rmtree(root / "imgs")
        (root / "labels" / "val").rename(root / "labels" / "more")
    for file in (root / "labels").rglob("*.png"):
        file.write_bytes(b"no label")
    opened, files = PIL.Image.open, []
    monkeypatch.setattr(PIL.Image, "open", lambda file, *rest: files.append(str(file)) or opened(file, *rest))
    run(data={"name": "folder", "root": str(root), "size": [96, 96]})
    assert len(set(files)) == 6 and not [file for file in files if "/labels/" in file]


def test_views_show_what_matches_says(monkeypatch):
    """Of photographs whose colours are the coordinates."""
    monkeypatch.setattr(views, "photometric", lambda images, parameters: images)
    down, across = torch.meshgrid(torch.linspace(0, 255, 96), torch.linspace(0, 255, 128), indexing="ij")
    photographs = torch.stack([across, down, torch.zeros_like(down)]).byte().expand(8, -1, -1, -1)
    grid = (6, 8)
    drawn = views.draw_views(8, grid, 0.3, 0.5, torch.Generator().manual_seed(0))
    assert drawn.mirrored.any() and not drawn.mirrored.all()
    shown = F.avg_pool2d(views.render(photographs, drawn, (96, 128)), 16)  # the colour of each patch
    places, matched = views.matches(drawn, grid)
    others = tokens_at(shown.flatten(2).mT, places)
    own = shown.flatten(2).mT
    inner = matched & (places.abs() < 1 - 1 / 6).all(dim=3)  # nearer to the border than a patch's middle is no data
    assert 0.2 < inner.float().mean() < 0.9
    assert (own - others)[inner.flatten(1)].abs().max() < 0.02


def test_masks_hide_up_to_their_share():
    hidden = views.draw_views(200, (6, 7), 0.5, 0.6, torch.Generator().manual_seed(0)).hidden
    assert hidden.shape == (400, 6, 7) and 0.25 < hidden.float().mean() < 0.35
    assert not views.draw_views(9, (6, 7), 0.5, 0.0, torch.Generator()).hidden.any()


def test_assignments_are_balanced():
    cosines = torch.rand(400, 8, generator=torch.Generator().manual_seed(0))
    cosines[:, 3] += 1  # all are nearest to one prototype
    found = assign(cosines, 0.5)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(400))
    torch.testing.assert_close(found.sum(dim=0), torch.full((8,), 50.0), rtol=0.05, atol=0)


def test_collapse_is_seen():
    generator = torch.Generator().manual_seed(0)
    spread, scores = torch.randn(12, 20, 16, generator=generator), torch.randn(240, 8, generator=generator)
    fine = health(spread, scores, 1.0)
    assert fine["effective_rank"] > 12 and fine["by_position"] < 0.15 and fine["prototypes_used"] > 6
    of_position = health(spread[:1].expand(12, -1, -1) + 0.01 * spread, scores, 1.0)
    assert of_position["by_position"] > 0.9
    constant = health(torch.ones(12, 20, 16), 50 * F.one_hot(torch.zeros(240, dtype=torch.int64), 8).float(), 1.0)
    assert constant["effective_rank"] == 1 and constant["prototypes_used"] < 1.01


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["loss.temperature=0.3"], "`loss.temperature` means nothing to pretraining, so it must be left out, got 0.3"),
        (["backbone.weights=file.pth"], "`backbone.weights` means nothing to pretraining"),
        (["pretraining.mask=1"], r"`pretraining.mask` must be float, in \[0, 1\), got 1"),
        (["pretraining.crp=64"], "unknown key `pretraining.crp`; did you mean `pretraining.crop`?"),
        (["pretraining.crop=[60, 64]"], "`pretraining.crop` must be a multiple of the patch size 16, got 60 x 64"),
        (
            ["backbone.name=patch_dictionary", "backbone.layer=null"],
            "`backbone.name` must be a ViT of timm, got patch_dictionary",
        ),
        (["backbone.layer=40"], "`backbone.layer` must be at most the 6 blocks of test_vit, got 40"),
        (["data.name=coco27", "data.root=."], "`data.name` must be folder or procedural, got coco27"),
        (["data.name=folder", "data.root=/none"], "the folder of images /none is not there"),
        (["batch_size=11"], "`batch_size` must be at most the 10 training images, got 11"),
    ],
)
def test_mistakes(run, arguments, message, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run("run", *arguments)
    assert re.search(f"^pretrain: .*{message}", stopped.value.code) and "\n" not in stopped.value.code
    assert not (tmp_path / "run").exists()


def test_folders_of_others(run, tmp_path):
    folder = run()
    with pytest.raises(SystemExit, match="holds a run that differs in pretraining.peak_lr; choose another `output`"):
        run("run", "pretraining.peak_lr=0.1")
    with pytest.raises(SystemExit, match="4 steps are fewer than the 6 that the run in .* has done"):
        run("run", "steps=4")
    (folder / "backbone.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, folder / "backbone.safetensors")
    with pytest.raises(SystemExit, match="holds a backbone.safetensors that pretraining has not written"):
        run("run", "--fresh")
    quickstart = ["--config", "quickstart", "device=cpu", f"output={folder}"]
    with pytest.raises(SystemExit, match="checkpoint.pt cannot be used: it has no 'backbone'"):
        train.main(quickstart)


def test_a_loss_that_is_not_finite(run, monkeypatch):
    monkeypatch.setattr(pretrain, "distillation_loss", lambda scores, *rest: scores.sum() * torch.nan)
    with pytest.raises(SystemExit, match="^pretrain: the loss of step 0 is nan: start anew with --fresh and a smaller"):
        run()


@pytest.mark.parametrize("preset", ["pretrain_camvid", "pretrain_camvid_cpu"])
def test_presets(preset):
    config = load_config(preset)
    check_config(config)
    vit = TimmViT(config.backbone.name)
    assert vit.grid(config.pretraining.crop)
