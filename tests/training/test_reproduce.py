"""docs/reproduce.md: every command is a valid configuration, and every variant is in a row."""

import re
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
