"""Configuration: presets load, edits apply, mistakes are errors that help."""

import dataclasses
from pathlib import Path

import pytest

from training.config import Config
from training.config_file import config_from_dict, load_config

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


def load(*overrides, preset="quickstart"):
    return load_config(CONFIGS / f"{preset}.yaml", overrides)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_presets_load(file):
    assert isinstance(load_config(file), Config)


@pytest.mark.parametrize(
    "preset, temperature, consistency, rate, size, renew, ema, warmup, dim, epochs, classes",
    [
        ("coco27", 0.8, 0.05, 0.02, 2048, 100, 0.99, 1000, 512, 3, 27),
        ("cityscapes27", 0.6, 0.05, 0.02, 2048, 20, 0.999, 50, 512, 30, 27),
        ("potsdam3", 0.4, 0.0, 1.0, 1024, 20, 0.999, 100, 256, 10, 3),
    ],
)
def test_published_values(preset, temperature, consistency, rate, size, renew, ema, warmup, dim, epochs, classes):
    config = load(preset=preset)
    assert (config.loss.temperature, config.loss.consistency, config.loss.negative_rate) == (
        temperature,
        consistency,
        rate,
    )
    assert (config.pool.size, config.pool.renew_every, config.head.ema, config.warmup) == (size, renew, ema, warmup)
    assert (config.head.dim, config.epochs, config.batch_size, len(config.data.classes)) == (dim, epochs, 64, classes)
    assert (config.optim.head_lr, config.optim.head_weight_decay, config.optim.projection_lr) == (5e-4, 0.1, 5e-4)
    assert (config.optim.linear_probe_lr, config.optim.cluster_probe_lr, config.optim.clip_grad_norm) == (
        1e-3,
        5e-3,
        10.0,
    )


def test_overrides_apply():
    config = load("loss.temperature=0.3", "data.size=[64, 96]", "optim.head_lr=1e-3", "loss.local=false", "seed=4")
    assert config.loss.temperature == 0.3
    assert config.data.size == (64, 96)
    assert config.optim.head_lr == 1e-3
    assert config.loss.local is False
    assert config.seed == 4


def test_none_replaces_a_value():
    assert load("steps=null", "epochs=2").steps is None


def test_quirks_follow_the_preset_unless_set():
    switches = [field.name for field in dataclasses.fields(load().quirks) if field.name != "preset"]
    assert not any(getattr(load().quirks, name) for name in switches)
    assert all(getattr(load("quirks.preset=published").quirks, name) for name in switches)
    mixed = load("quirks.preset=published", "quirks.select_on_labels=false").quirks
    assert not mixed.select_on_labels and mixed.dropout_on_frozen


def test_config_survives_a_checkpoint():
    config = load("quirks.select_on_labels=true")
    assert config_from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    "override, error, message",
    [
        ("loss.temprature=0.3", ValueError, "unknown key `loss.temprature`; did you mean `loss.temperature`?"),
        ("temperature=0.3", ValueError, "unknown key `temperature`; did you mean `loss.temperature`?"),
        ("optimizer.lr=1", ValueError, "unknown key `optimizer`"),
        ("loss.temperature=0", ValueError, "`loss.temperature` must be at least 1e-06, got 0"),
        ("loss.temperature=.nan", ValueError, "`loss.temperature` must be at least 1e-06, got nan"),
        ("loss.negative_rate=2", ValueError, r"`loss.negative_rate` must be in \[0, 1\], got 2"),
        ("loss.variant=both", ValueError, "`loss.variant` must be one of joint, separate, got 'both'"),
        ("loss.local=1", TypeError, "`loss.local` must be bool, got 1"),
        ("batch_size=2.5", TypeError, "`batch_size` must be int, got 2.5"),
        ("batch_size=true", TypeError, "`batch_size` must be int, got True"),
        ("head.dim=many", TypeError, "`head.dim` must be int, got 'many'"),
        ("data.size=[64]", TypeError, r"`data.size` must be tuple\[int, int\], got \[64\]"),
        ("data.classes=[1, 2]", TypeError, "`data.classes` must be"),
        ("loss=3", TypeError, "`loss` must be a section of keys, got 3"),
        ("loss.temperature", ValueError, "an override must read key=value, got 'loss.temperature'"),
        ("seed.deeper=1", ValueError, "`seed.deeper` goes into `seed`, which is not a section"),
        ("epochs=3", ValueError, "give one of `epochs` and `steps`"),
        ("steps=null", ValueError, "give one of `epochs` and `steps`"),
    ],
)
def test_mistakes(override, error, message):
    with pytest.raises(error, match=message):
        load("seed=1", override)


def test_missing_file_names_the_presets():
    with pytest.raises(ValueError, match="no file .*nothing.yaml; beside it there are .*quickstart.yaml"):
        load_config(CONFIGS / "nothing.yaml")


def test_home_folders_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load("output=~/runs/a", "data.root=~/camvid", "backbone.weights=~/vit.pth")
    assert (config.output, config.data.root, config.backbone.weights) == (
        "/home/me/runs/a",
        "/home/me/camvid",
        "/home/me/vit.pth",
    )
