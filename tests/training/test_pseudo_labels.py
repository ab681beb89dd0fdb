"""Pseudo-labels, read back as other programs read them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes

from training.data.cityscapes import CITYSCAPES27
from training.data.folder import FolderData
from training.data.pairs import read_classes
from training.prediction.photograph import Prediction
from training.prediction.pictures import Writer, outputs
from training.prediction.pseudo_labels import check_panoptic, class_ids, label_map, panoptic, read_ids, write_panoptic

CLASSES = CITYSCAPES27.classes


def blocks(seed=0, classes=27, cells=(5, 8), side=4):
    """A class map of squares, and its confidence."""
    random = np.random.default_rng(seed)
    values, confidence = random.integers(classes, size=cells), random.integers(256, size=cells)
    return tuple(np.kron(cell, np.ones((side, side), int)).astype(np.uint8) for cell in (values, confidence))


def write(root, out, names, ids, kind, **options):
    """Write the pseudo-labels of all photographs below `root`; class maps, confidences and lines of the manifest."""
    found = []
    writer = Writer(names, ids={kind: ids}, **options)
    for index, (file, paths) in enumerate(outputs(root, out, [kind]).items()):
        classes, confidence = blocks(index, len(names))
        with Image.open(file) as photograph:
            about = writer.write(photograph, Prediction(torch.from_numpy(classes), torch.from_numpy(confidence)), paths)
        relative = {kind: {"file": path.relative_to(out).as_posix()} for kind, path in paths.items()}
        about |= {"index": index, "image": file.relative_to(root).as_posix(), "outputs": relative}
        found.append((classes, confidence, about))
    return found


def photographs(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 20)).save(folder / name)


def test_cityscapes_is_read_by_torchvision_and_by_training(tmp_path):
    names = ("train/ulm/ulm_000_019_leftImg8bit.png", "train/bonn/bonn_000_019_leftImg8bit.png")
    photographs(tmp_path / "leftImg8bit", *names)
    ids = class_ids("cityscapes", CLASSES)
    found = write(tmp_path / "leftImg8bit", tmp_path, CLASSES, ids, "cityscapes", least=0.5)
    data = Cityscapes(str(tmp_path), split="train", mode="fine", target_type="semantic")
    targets = {image: target for image, target in zip(data.images, data.targets, strict=True)}
    by_name = {item.name: item.id for item in Cityscapes.classes}
    pairs = {pair.name: pair for pair in CITYSCAPES27.find(tmp_path, "train").pairs}
    for classes, confidence, about in found:
        unsure = confidence < 0.5 * 255
        assert about["ignored"]["cityscapes"] == round(unsure.mean(), 6)
        ((label,),) = (paths for image, paths in targets.items() if image.endswith(about["image"]))
        expected = np.array([by_name[name] for name in CLASSES])[classes]
        assert np.array_equal(np.array(Image.open(label)), np.where(unsure, 0, expected))
        again = read_classes(CITYSCAPES27, pairs[about["image"].split("/")[-1].removesuffix("_leftImg8bit.png")])
        assert np.array_equal(again, np.where(unsure, 255, classes))


def test_labels_are_read_by_the_folder_data_set(tmp_path):
    photographs(tmp_path / "imgs", "train/a.png", "train/sub/b.jpg")
    names = ["sky", "road", "tree", "unmatched cluster 1"]
    found = write(tmp_path / "imgs", tmp_path, names, class_ids("labels", names[:3]), "labels", least=0.2)
    data = FolderData(tmp_path, "train", (20, 32), tuple(names[:3]))
    for index, (classes, confidence, _) in enumerate(found):
        expected = np.where((confidence < 0.2 * 255) | (classes == 3), -1, classes.astype(int))
        assert np.array_equal(data.label(index).numpy(), expected)


def test_panoptic_is_as_coco_describes_it(tmp_path):
    """https://cocodataset.org/#format-data, "Panoptic Segmentation"."""
    photographs(tmp_path / "in", "a.png", "sub/b.jpg")
    names = ["sky", "car", "tree"]
    ids = {"sky": 40, "car": 3, "tree": None}
    out = tmp_path / "out"
    found = write(tmp_path / "in", out, names, ids, "coco", things=["car"], least=0.1)
    write_panoptic(out, [about for *_, about in found], ids, ["car"])
    contents = json.loads((out / "panoptic.json").read_text())
    assert [(c["id"], c["name"], c["isthing"]) for c in contents["categories"]] == [(40, "sky", 0), (3, "car", 1)]
    assert [image["file_name"] for image in contents["images"]] == ["a.png", "sub/b.jpg"]
    assert [annotation["file_name"] for annotation in contents["annotations"]] == ["a.png", "sub/b.png"]
    images = {image["id"]: image for image in contents["images"]}
    for annotation, (classes, confidence, _) in zip(contents["annotations"], found, strict=True):
        colours = np.array(Image.open(out / "panoptic" / annotation["file_name"])).astype(int)
        segments = colours @ [1, 256, 256**2]  # R + 256 G + 256² B
        image = images[annotation["image_id"]]
        assert segments.shape == (image["height"], image["width"])
        categories = np.zeros(segments.shape, int)
        for info in annotation["segments_info"]:
            inside = segments == info["id"]
            rows, columns = np.nonzero(inside)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert info["area"] == inside.sum() and info["bbox"] == box and info["iscrowd"] == 0
            categories[inside] = info["category_id"]
        assert set(np.unique(segments)) - {0} == {info["id"] for info in annotation["segments_info"]}
        expected = np.where(confidence < 0.1 * 255, 0, np.array([40, 3, 0])[classes])
        assert np.array_equal(categories, expected)
        kinds = [info["category_id"] for info in annotation["segments_info"]]
        assert kinds.count(40) == 1 and kinds.count(3) > 1, "parts of things are segments of their own"
    check_panoptic(out)


def test_parts_of_a_thing_touch_by_their_sides():
    labels = np.array([[3, 3, 255, 3], [255, 255, 3, 255], [4, 255, 3, 4]], np.uint8)
    picture, info = panoptic(labels, things=[3])
    assert np.array(picture)[..., 0].tolist() == [[1, 1, 0, 2], [0, 0, 3, 0], [4, 0, 3, 4]]
    assert [(each["category_id"], each["area"]) for each in info] == [(3, 2), (3, 1), (3, 2), (4, 2)]


def test_many_segments_take_more_than_one_byte():
    labels = np.full((41, 41), 255, np.uint8)
    labels[::2, ::2] = 1
    picture, info = panoptic(labels, things=[1])
    segments = np.array(picture).astype(int) @ [1, 256, 256**2]
    assert len(info) == 441 and segments[40, 40] == 441 and segments[0, 0] == 1


def test_confidence_at_the_limit_is_enough():
    classes, confidence = np.zeros((1, 3), np.uint8), np.array([[127, 128, 129]], np.uint8)
    assert label_map(classes, confidence, [5], 255, 128 / 255).tolist() == [[255, 5, 5]]
    for value in range(256):
        one = np.full((1, 1), value, np.uint8)
        assert label_map(np.zeros_like(one), one, [5], 255, value / 255).item() == 5
    assert label_map(classes, confidence, [5], 255, 0).tolist() == [[5, 5, 5]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: 300", "must have ids of 0 to 255, or null, got b: 300"),
        ("a: 1\nb: true", "got b: True"),
        ("a: 1\nb: x", "got b: x"),
        ("- a", "must map class names to ids, got list"),
        ("a: [", "cannot be read"),
        ("a: 1", "must have an id, or null, for each of a, b, got a"),
        ("a: 1\nb: 2\nc: 3", "for each of a, b, got a, b, c"),
        ("a: 1\nb: 255", "must not have 255 in labels, which is what is ignored there"),
    ],
)
def test_ids_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "ids.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"--ids .*{message}"):
        class_ids("labels", ["a", "b"], read_ids(tmp_path / "ids.yaml"))


def test_ids_of_ones_own(tmp_path):
    (tmp_path / "ids.json").write_text('{"a": 8, "b": null}')
    own = read_ids(tmp_path / "ids.json")
    assert class_ids("cityscapes", ["a", "b"], own) == {"a": 8, "b": None}
    with pytest.raises(ValueError, match="cityscapes has no classes called a, b: give their ids with --ids"):
        class_ids("cityscapes", ["a", "sky", "b"])
    assert class_ids("cityscapes", ["sky", "road"]) == {"sky": 23, "road": 7}
    assert class_ids("coco", ["a", "b"]) == {"a": 1, "b": 2}
    assert class_ids("cityscapes", ["a", "b"], {"a": 8, "b": 8}) == {"a": 8, "b": 8}
    with pytest.raises(ValueError, match="--ids must be different in coco"):
        class_ids("coco", ["a", "b"], {"a": 8, "b": 8})
    with pytest.raises(ValueError, match="enough for 254 classes, got 255"):
        class_ids("labels", [str(index) for index in range(255)])
