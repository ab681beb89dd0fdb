"""What predict writes, and what it never overwrites."""

import json

import pytest
import torch
from PIL import Image

from training.output import prepare_folder
from training.photographs import is_prediction, read_rgb
from training.predict import outputs, write_names, write_prediction
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


@pytest.mark.parametrize("text", ['["sky", "road"]', '{"0": "mine"}', "{}"])
def test_a_file_called_classes_json_of_something_else_is_kept(tmp_path, text):
    file = tmp_path / "classes.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="classes.json is there already and is not of predictions"):
        write_names(tmp_path, ["sky", "road"])
    assert file.read_text() == text
    photographs(tmp_path, "a.jpg")
    write_prediction(tmp_path / "a.jpg", torch.zeros(6, 8), 2, tmp_path / "a.png", tmp_path / "a_overlay.jpg")
    write_names(tmp_path, ["sky", "road"])  # the names that belong to predictions are those of the newest
    write_names(tmp_path, ["sky", "road"])
    assert json.loads(file.read_text()) == {"0": "sky", "1": "road"}


def test_names_that_differ_in_case_alone(tmp_path, monkeypatch):
    images = photographs(tmp_path / "in", "a.jpg", "A.jpg")
    if len(list(images.iterdir())) == 1:
        pytest.skip("the file system does not tell upper from lower case")
    assert sorted(paths[0].name for paths in outputs(images, tmp_path / "out").values()) == ["A.png", "a.png"]
    monkeypatch.setattr("training.predict._folds_case", lambda folder: True)
    with pytest.raises(ValueError, match="A.jpg and .*a.jpg would both be written to .*a.jpg.png"):
        outputs(images, tmp_path / "out")


def test_links_in_a_circle_are_no_photographs(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg")
    (images / "b.jpg").symlink_to("b.jpg")
    assert len(outputs(images, tmp_path / "out")) == 2
    with pytest.raises(ValueError, match="b.jpg cannot be read"):
        read_rgb(images / "b.jpg")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match="--out must be a folder, got the file .*circle"):
        prepare_folder(tmp_path / "circle", "--out")


def test_nothing_is_written_through_a_link_that_leads_nowhere(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(ValueError, match="a.png is there already and is no prediction"):
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
    assert list(outputs(images, tmp_path / "others")) == [images / "a.png"]
    with pytest.raises(ValueError, match="what is there was written by training.predict"):
        outputs(images / "maps", tmp_path / "others")


def test_bands_give_what_one_interpolation_gives(monkeypatch):
    monkeypatch.setattr("training.segment._BAND_NUMBERS", 200)
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for size in ((37, 41), (4, 5), (2, 3)):
        assert torch.equal(greatest(scores, size), upsample(scores, size).argmax(dim=1))
