"""A run small enough to train in seconds, and label folders like it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_values

from training.config_file import config_from_dict
from training.data.procedural import CLASSES, ProceduralData


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu(without_gpu):
    """What runs are compared with was computed there."""


@pytest.fixture
def tiny_config(tmp_path):
    """Make the checked configuration of a tiny run; arguments replace top-level entries."""

    def make(name="run", **top):
        return config_from_dict(tiny_values(tmp_path / name, **top))

    return make


@pytest.fixture
def photo_folder(tmp_path):
    """A folder of photographs in the layout of the "folder" data set, with or without labels."""

    def make(labels=True, name="photos", images=6):
        root = tmp_path / name
        for split, seed in (("train", 0), ("val", 1)):
            (root / "imgs" / split).mkdir(parents=True)
            data = ProceduralData(images, (48, 64), seed)
            for index in range(images):
                file = f"{data.name(index)}.png"
                Image.fromarray(data.image(index).permute(1, 2, 0).numpy()).save(root / "imgs" / split / file)
                if labels:
                    (root / "labels" / split).mkdir(parents=True, exist_ok=True)
                    label = data.label(index).numpy().astype(np.uint8)
                    label[:4] = len(CLASSES)  # void
                    Image.fromarray(label).save(root / "labels" / split / file)
        return root

    return make
