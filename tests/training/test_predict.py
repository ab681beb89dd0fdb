"""What predict writes, and what it never overwrites."""

import pytest
import torch
from PIL import Image

from training.predict import outputs
from training.segment import greatest, upsample


def photographs(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / name)
    return folder


def test_each_photograph_has_its_own_outputs(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg", "a.png", "b.png", "more/b.png")
    maps = [str(paths[0].relative_to(tmp_path / "out")) for paths in outputs(images, tmp_path / "out").values()]
    assert maps == ["a.jpg.png", "a.png.png", "b.png", "more/b.png"]


def test_photographs_are_never_overwritten(tmp_path):
    images = photographs(tmp_path / "in", "a.png")
    with pytest.raises(ValueError, match="--out must be another folder than --images"):
        outputs(images, images)
    (tmp_path / "link").symlink_to(images)
    with pytest.raises(ValueError, match="--out must be another folder than --images"):
        outputs(images, tmp_path / "link")
    with pytest.raises(ValueError, match="a.png is there already and is no prediction"):
        outputs(images / "a.png", images)
    labels = photographs(tmp_path / "labels", "a.png")
    with pytest.raises(ValueError, match="a.png is there already and is no prediction"):
        outputs(images, labels)


def test_earlier_predictions_are_replaced_and_not_segmented(tmp_path):
    images = photographs(tmp_path / "in", "a.png", "maps/a.png")
    (images / "maps" / "classes.json").write_text("{}")
    assert list(outputs(images, images / "maps")) == [images / "a.png"]


def test_bands_give_what_one_interpolation_gives(monkeypatch):
    monkeypatch.setattr("training.segment._BAND_NUMBERS", 200)
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for size in ((37, 41), (4, 5), (2, 3)):
        assert torch.equal(greatest(scores, size), upsample(scores, size).argmax(dim=1))
