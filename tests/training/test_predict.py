"""What predict writes, and what it never overwrites."""

import pytest
import torch
from PIL import Image

from training.predict import is_prediction, outputs, write_prediction
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


def test_a_stem_that_is_the_name_of_another_photograph(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg", "a.png", "a.jpg.jpg")
    maps = [paths[0].name for paths in outputs(images, tmp_path / "out").values()]
    assert sorted(maps) == ["a.jpg.jpg.png", "a.jpg.png", "a.png.png"]


def test_photographs_beside_predictions_are_no_predictions(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg", "b.jpg", "b.png")
    write_prediction(images / "a.jpg", torch.zeros(6, 8), 2, images / "a.png", images / "a_overlay.jpg")
    (images / "classes.json").write_text('{"0": "sky", "1": "road"}')
    assert is_prediction(images / "a.png") and is_prediction(images / "a_overlay.jpg")
    assert list(outputs(images / "a.jpg", images)) == [images / "a.jpg"]
    with pytest.raises(ValueError, match="b.png is there already and is no prediction"):
        outputs(images / "b.jpg", images)


def test_photographs_inside_the_output_folder_are_segmented_too(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg", "sub/b.jpg")
    assert list(outputs(images, images / "sub")) == [images / "a.jpg", images / "sub" / "b.jpg"]


def test_a_file_called_classes_json_of_something_else_is_kept(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "classes.json").write_text('["sky", "road"]')
    with pytest.raises(ValueError, match="classes.json is there already and is not of predictions"):
        outputs(images, tmp_path / "out")


def test_the_output_must_be_a_folder(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="--out must be a folder, got the file"):
        outputs(images, tmp_path / "out")


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
    images = photographs(tmp_path / "in", "a.png")
    write_prediction(
        images / "a.png", torch.zeros(6, 8), 2, images / "maps" / "a.png", images / "maps" / "a_overlay.jpg"
    )
    assert list(outputs(images, images / "maps")) == [images / "a.png"]


def test_bands_give_what_one_interpolation_gives(monkeypatch):
    monkeypatch.setattr("training.segment._BAND_NUMBERS", 200)
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for size in ((37, 41), (4, 5), (2, 3)):
        assert torch.equal(greatest(scores, size), upsample(scores, size).argmax(dim=1))
