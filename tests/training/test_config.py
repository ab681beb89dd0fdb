"""Configuration: presets load, edits apply, mistakes are errors that help."""

from pathlib import Path

import pytest

from training.config import Config
from training.config_file import config_from_dict, edited, key_table, known_keys, load_config, overview, settings_of
from training.data import class_names

ALLOWED = ("data.size", "data.val_images")
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
    assert (config.head.dim, config.epochs, config.batch_size) == (dim, epochs, 64)
    assert len(class_names(config.data)) == classes
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
    switches = [name for name in type(load().quirks).model_fields if name != "preset"]
    assert not any(getattr(load().quirks, name) for name in switches)
    assert all(getattr(load("quirks.preset=published").quirks, name) for name in switches)
    mixed = load("quirks.preset=published", "quirks.select_on_labels=false").quirks
    assert not mixed.select_on_labels and mixed.dropout_on_frozen


def test_config_survives_a_checkpoint():
    config = load("quirks.select_on_labels=true")
    saved = config.model_dump()
    assert config_from_dict(saved) == config
    assert config_from_dict({key: value for key, value in saved.items() if key != "evaluation"}) == config  # older
    assert config_from_dict(saved | {"head": {"dim": 9}}) != config
    with pytest.raises(ValueError, match="unknown key `head.5`"):
        config_from_dict(saved | {"head": {5: 9}})


@pytest.mark.parametrize(
    "override, message",
    [
        ("loss.temprature=0.3", "unknown key `loss.temprature`; did you mean `loss.temperature`?"),
        ("temperature=0.3", "unknown key `temperature`; did you mean `loss.temperature`?"),
        ("optimizer.lr=1", "unknown key `optimizer.lr`; did you mean `optim.head_lr`?"),
        ("los.temperature=1", "unknown key `los.temperature`; did you mean `loss.temperature`?"),
        ("loss.temp=1", "unknown key `loss.temp`; did you mean `loss.temperature`?"),
        ("loss.dim=1", "unknown key `loss.dim`; did you mean `head.dim`?"),
        ("sede=1", "unknown key `sede`; did you mean `seed`?"),
        ("pool.qqq=1", "unknown key `pool.qqq`; the keys of `pool` are pool.size, pool.renew_every"),
        ("qqq.zzz=1", "known are seed, .* and the sections data, backbone, .*; --keys lists all"),
        ("loss.temperature=0", "`loss.temperature` must be float, at least 1e-06, got 0"),
        ("steps=10000000000", r"`steps` must be int, in \[1, 2147483647\] or null, got 10000000000"),
        ("loss.temperature=.nan", "`loss.temperature` must be float, at least 1e-06, got .nan"),
        ("loss.temperature=nan", "`loss.temperature` must be float, at least 1e-06, got nan"),
        ("loss.negative_rate=2", r"`loss.negative_rate` must be float, in \[0, 1\], got 2"),
        ("loss.variant=both", "`loss.variant` must be joint or separate, got both"),
        ("loss.local=2", "`loss.local` must be true or false, got 2"),
        ("batch_size=2.5", r"`batch_size` must be int, in \[1, 1000000\], got 2.5"),
        ("batch_size=true", "`batch_size` must be int, .*, got true"),
        ("batch_size=null", "`batch_size` must be int, .*, got null"),
        ("output=null", "`output` must be text, got null"),
        ("output=", "`output` must be text, got null"),
        ("head.dim=many", "`head.dim` must be int, .*, got many"),
        ("data.size=[64]", r"`data.size` must be \[height, width\] or one number for a square, .*, got \[64\]"),
        ("data.size=[0, 0]", r"`data.size` must be .*, in \[1, 16384\], got \[0, 0\]"),
        ("data.size=[-5, 80]", r"`data.size` must be .*, in \[1, 16384\], got \[-5, 80\]"),
        ("data.size=-5", r"`data.size` must be .*, in \[1, 16384\], got -5"),
        ("data.size=[8, x]", r"`data.size` must be \[height, width\] .*, got \[8, x\]"),
        ("head.dropout=1", r"`head.dropout` must be float, in \[0, 1\), got 1"),
        ("seed=4294967296", r"`seed` must be int, in \[0, 4294967295\], got 4294967296"),
        ("loss.temperature=1" + "0" * 400, "`loss.temperature` must be float, at least 1e-06, got 1000"),
        ("data.classes=[road, sky, road]", "`data.classes` must be different names, got 'road' twice"),
        ("data.classes=road", "`data.classes` must be a list of names, got road"),
        ("data.classes=[[a], b]", r"`data.classes` must be a list of names, got \[\[a\], b\]"),
        ("output=[1", "the value of `output` is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("=", "an override must read key=value, without spaces around the =, got '='"),
        ("loss=3", "`loss` must be a section of keys, got 3"),
        ("loss.temperature", "an override must read key=value, without spaces around the =, got"),
        ("seed.deeper=1", "`seed.deeper` goes into `seed`, which is not a section"),
        ("epochs=3", "give one of `epochs` and `steps`, got 3 and 200: add `steps=null` to train"),
        ("steps=null", "give one of `epochs` and `steps`, got neither"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(ValueError, match=f"^config: .*{message}"):
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


def test_one_number_is_a_square():
    assert load("data.size=224").data.size == (224, 224)


@pytest.mark.parametrize("text", ["2024", "on", "2024-01-01", "12:30", "/a: b", "a #b", "#b", "@b", "010", "1e3"])
def test_text_stays_as_it_is_written(tmp_path, text):
    assert load(f"output={text}").output == load(f'output="{text}"').output == text
    assert load(f'data.classes=["{text}", no]').data.classes == (text, "no")
    (tmp_path / "own.yaml").write_text(f"steps: 1\noutput: '{text}'\ndata: {{classes: ['{text}', 3]}}\n")
    config = load_config(tmp_path / "own.yaml")
    assert config.output == text and config.data.classes == (text, "3")


def test_numbers_and_switches_as_people_write_them():
    config = load("seed=010", "optim.head_lr=1e-3", "loss.local=off", "loss.temperature=2", "seed = 3")
    assert (config.seed, config.optim.head_lr, config.loss.local, config.loss.temperature) == (3, 1e-3, False, 2.0)
    assert load("loss={temperature: 2, variant: separate}").loss.variant == "separate"


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: 1\nseed: [1\n", "line 3 of .*own.yaml is not YAML: expected ',' or ']'"),
        ("steps: 1\nseed: 1\nsteps: 2\n", "line 3 of .*own.yaml is not YAML: the key steps stands twice"),
        ("steps: 1\noutput: [2024]\n", r"`output` must be text, got \[2024\] \(in .*own.yaml\)"),
        ("- steps\n", r"must hold a mapping of keys, got \[steps\]"),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "own.yaml")


def test_a_section_without_keys_has_its_defaults(tmp_path):
    (tmp_path / "own.yaml").write_text("steps: 1\nloss:\n  # temperature: 2\n")
    assert load_config(tmp_path / "own.yaml").loss == Config(steps=1).loss
    assert load_config(tmp_path / "own.yaml", ["loss.temperature=2"]).loss.temperature == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: " + "[" * 3000, "is nested too deeply"),
        ("? [a]\n: 1\n", "line 1 of .*is not YAML: a key must be one word"),
        ("steps: 3\nseed: x\n", r"`seed` must be int, .*, got x \(in .*own.yaml\)"),
        ("steps: 3\nsede: 1\n", r"unknown key `sede`; did you mean `seed`\? \(in .*own.yaml\)"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, text, message):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(file)
    with pytest.raises(ValueError, match="must be a YAML file, got a folder"):
        load_config(tmp_path)


def test_a_preset_by_its_name(tmp_path, monkeypatch):
    assert load_config("quickstart") == load_config(CONFIGS / "quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("steps: 7\nwarmup: 2")
    assert load_config("quickstart").steps == 7, "a file of that name is the one meant"
    with pytest.raises(ValueError, match="no file quickstar; "):
        load_config("quickstar")


def test_a_checkpoint_settles_what_was_trained(tiny_config):
    config = tiny_config(steps=3, warmup=1)
    assert edited(config, [], ALLOWED) == config
    again = edited(config, ["data.val_images=2", "data.size=[16, 24]"], ALLOWED)
    assert (again.data.val_images, again.data.size, again.head) == (2, (16, 24), config.head)
    with pytest.raises(ValueError, match="the checkpoint settles `head.dim`; what may be edited is data.size, data.va"):
        edited(config, ["head.dim=3"], ALLOWED)
    with pytest.raises(ValueError, match="unknown key `head.din`; did you mean `head.dim`"):
        edited(config, ["head.din=3"], ALLOWED)


def test_all_keys_are_listed_with_bounds_and_comments():
    lines = {line.split()[0]: line for line in key_table().splitlines()}
    assert list(lines) == ["key", *known_keys()]
    for key, text in (
        ("head.dropout", "0.1 float, in [0, 1) # channel dropout on the head's input"),
        ("data.size", "[224, 224] [height, width] or one number for a square, in [1, 16384] # in pixels"),
        ("backend", "auto auto or cuda or triton or cpu or reference # of the hpkernels ops"),
        ("epochs", "null int, in [1, 2147483647] or null # length of the run"),
        ("rank_timeout", "60 float, in (0, 1000000] # minutes"),
    ):
        assert " ".join(lines[key].split()).startswith(f"{key} {text}")
    assert all(" # " in line for key, line in lines.items() if key != "key")


def test_settings_that_were_left_alone_are_their_defaults():
    changed = {setting.key for setting in settings_of(load_config("quickstart")) if setting.value != setting.default}
    assert {"steps", "head.dim"} <= changed
    assert not {key for key in changed if key == "rank_timeout" or key.startswith("quirks.")}
    published = {one.key: (one.value, one.default) for one in settings_of(load_config("camvid,published"))}
    assert published["quirks.late_lambda"] == ("true", "false")


def test_help_names_presets_and_sections():
    text = overview()
    assert "  quickstart          What `make train` runs" in text
    assert "  loss                The multi-positive contrastive loss" in text and "optim" in text


def test_missing_file_elsewhere_names_the_folder_of_presets(tmp_path):
    with pytest.raises(ValueError, match="no file .*camvid; presets are in .*configs"):
        load_config(tmp_path / "camvid")
