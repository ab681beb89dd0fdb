"""docs/reproduce.md: every command is valid, every variant is in a row, the presets have the published settings."""

import re
from functools import reduce
from pathlib import Path

import pytest
import yaml

from training.config_file import VARIANTS, load_config, overview

PAGE = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`--config ([\w,]+)((?: [\w.]+=\w+)*)`", PAGE)


@pytest.mark.parametrize("config, edits", COMMANDS)
def test_commands_are_configurations(config, edits):
    load_config(config, edits.split())


def test_every_variant_has_a_row():
    named = {name for config, _ in COMMANDS for name in config.split(",")}
    variants = set(yaml.safe_load(VARIANTS.read_text(encoding="utf-8")))
    assert variants <= named
    assert all(name in overview() for name in variants)


def test_the_loop_over_variants_names_variants():
    (named,) = re.findall(r"for variant in (.*); do", PAGE)
    assert set(named.split()) <= set(yaml.safe_load(VARIANTS.read_text(encoding="utf-8")))


def settings():
    """Rows of the table of settings that name keys: (keys, preset, values), both separated by commas."""
    section = PAGE.split("## Settings")[1]
    for row in re.findall(r"^\| `.*\|$", section, flags=re.MULTILINE):
        _, *values, keys = (cell.strip() for cell in row.strip("|").split("|"))
        for preset, value in zip(("coco27", "cityscapes27", "potsdam3"), values, strict=True):
            yield pytest.param(re.findall(r"`([\w.=]+)`", keys), preset, value.split(", "), id=f"{preset}-{keys}")


@pytest.mark.parametrize("keys, preset, values", list(settings()))
def test_presets_have_the_published_settings(keys, preset, values):
    config = load_config(preset, [])
    for key, value in zip(keys, values, strict=True):
        key, _, ours = key.partition("=")  # "loss.variant=joint" names our value of a published number
        found = reduce(getattr, key.split("."), config)
        if key == "backbone.name":
            assert found == {"ViT-S/8": "vit_small_patch8_224.dino", "ViT-B/8": "vit_base_patch8_224.dino"}[value]
        elif key == "data.size":
            assert found == (int(value), int(value))
        else:
            assert str(found).lower() == ours if ours else found == float(value)
