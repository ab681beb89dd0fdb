"""COCO-Stuff-27, Cityscapes-27 and Potsdam-3, in each layout: what is read, and what is said of what cannot be."""

import json

import numpy as np
import pytest
import scipy.io
import torch
import trees
from PIL import Image
from torchvision.datasets import Cityscapes
from torchvision.transforms import functional as transforms

from training import evaluate, predict, prepare, results, train
from training.config_file import load_config
from training.data import DATA_SETS, class_names, open_data, resized
from training.data.frame import Frame
from training.data.potsdam import COLOURS
from training.run import open_run

NAMES = tuple(DATA_SETS)
LAYOUTS = ("stego", "own")
CASES = [(name, layout) for name in NAMES for layout in LAYOUTS]

# The published class of each of COCO-Stuff's 182 ids, one character each, and the published names.
PUBLISHED = (
    "9bbbbbbbb888888777777777766666666aaaaaaaaaa55555555222222222233333333330000001111114444444"
    "4hhmkkmfpgdcchhnffhflfpdddddmqeefmllokmfhgfmolhpglhmgllplqlokhelqfnklofompfkhhmeiiiiiiiqqjjo"
)
COCO_NAMES = (
    *("electronic", "appliance", "food", "furniture", "indoor", "kitchen", "accessory", "animal", "outdoor", "person"),
    *("sports", "vehicle", "ceiling", "floor", "food", "furniture", "rawmaterial", "textile", "wall", "window"),
    *("building", "ground", "plant", "sky", "solid", "structural", "water"),
)


@pytest.fixture
def set_config(tmp_path):
    """The preset of a data set, made small."""

    def make(name, root, *edits):
        small = [f"data.root={root}", "data.crops=none", "data.size=32", "evaluation.size=48"]
        small += ["backbone.name=vit_tiny_patch16_224", "backbone.pretrained=false", "head.dim=8", "batch_size=4"]
        small += ["epochs=null", "steps=3", "warmup=1", "pool.size=8", f"output={tmp_path / 'run'}", "device=cpu"]
        return [*small, *edits], load_config(name, [*small, *edits])

    return make


def test_coco_ids_have_their_published_classes():
    coco = DATA_SETS["coco27"]
    assert [int(character, 36) for character in PUBLISHED] == coco.table[:182].tolist()
    assert tuple(name.removesuffix("-stuff") for name in coco.classes) == COCO_NAMES
    assert coco.table[255] == 255 and set(coco.table[182:255]) == {254}


def test_cityscapes_ids_have_the_classes_of_their_definition():
    cityscapes = DATA_SETS["cityscapes27"]
    defined = {entry.id: entry.name for entry in Cityscapes.classes if entry.id >= 7}
    assert {id: cityscapes.classes[cityscapes.table[id]] for id in defined} == defined
    assert len(cityscapes.classes) == len(defined) == 27
    assert set(cityscapes.table[:7]) == {255} and set(cityscapes.table[34:]) == {254}


def test_potsdam_ids_have_their_published_classes():
    potsdam = DATA_SETS["potsdam3"]
    classes = dict(zip(COLOURS, (potsdam.classes[potsdam.table[index]] for index in range(6)), strict=True))
    assert classes == {
        "impervious surfaces": "roads and cars",
        "car": "roads and cars",
        "building": "buildings and clutter",
        "clutter": "buildings and clutter",
        "low vegetation": "vegetation and trees",
        "tree": "vegetation and trees",
    }


@pytest.mark.parametrize("name, layout", [case for case in CASES if case != ("potsdam3", "own")])
def test_each_layout_is_read(name, layout, tmp_path, set_config, capsys):
    root = trees.plant(name, layout, tmp_path)
    config = set_config(name, root)[1]
    train_data, val_data = open_data(config, "train"), open_data(config, "val")
    assert (len(train_data), len(val_data)) == {"cityscapes27": (6, 3)}.get(
        name, (5, 5) if layout == "stego" and name == "coco27" else (6, 6)
    )
    assert train_data.image(0).shape == (3, 32, 32) and train_data.label(0).shape == (32, 32)
    assert val_data.image(0).shape == (3, 48, 48) and val_data.label(0).shape == (48, 48)
    said = capsys.readouterr().err
    assert DATA_SETS[name].title in said and str(root) in said
    assert ("curated/train2017/Coco164kFull_Stuff_Coarse.txt" in said) == (name == "coco27")
    assert ("as there is no curated" in said) == (name == "coco27" and layout == "own")


@pytest.mark.parametrize("name, layout", [case for case in CASES if case != ("potsdam3", "own")])
def test_labels_are_those_of_their_images(name, layout, tmp_path, set_config):
    config = set_config(name, trees.plant(name, layout, tmp_path), "data.fit=squash", "data.size=[40, 56]")[1]
    if name == "potsdam3":
        config = set_config(name, tmp_path, "data.size=50")[1]
    data = open_data(config, "train")
    assert data.file(0).is_file() and data.label_file(0).is_file()
    pixels, regions = trees.picture(1 if (name, layout) == ("coco27", "stego") else 0, data.size)
    classes = {
        "coco27": [9, 22, 23, 21, 24, -1],
        "cityscapes27": [0, 4, 14, 16, 26, -1],
        "potsdam3": [0, 1, 2, 2, 0, 1],
    }[name]
    assert torch.equal(data.label(0), torch.tensor(classes)[torch.from_numpy(regions).long()])
    difference = (data.image(0).int() - torch.from_numpy(pixels).permute(2, 0, 1).int()).abs().float()
    assert difference.mean() < (6 if name == "coco27" else 1e-6), "JPEG changes pixels a little"


def test_a_root_may_be_the_folder_of_the_data_set_itself(tmp_path, set_config):
    trees.coco(tmp_path / "a", stego=True)
    assert len(open_data(set_config("coco27", tmp_path / "a" / "cocostuff")[1], "train")) == 5


def test_two_archives_of_coco_in_one_folder(tmp_path, set_config):
    trees.coco(tmp_path, stego=False)
    for split in ("train2017", "val2017"):
        for file in (tmp_path / "stuffthingmaps" / split).iterdir():
            file.rename(tmp_path / split / file.name)
        (tmp_path / "stuffthingmaps" / split).rmdir()
    assert len(open_data(set_config("coco27", tmp_path)[1], "val")) == 6


def test_hidden_files_are_no_images(tmp_path, set_config):
    coco = trees.coco(tmp_path / "coco", stego=False)
    (coco / "train2017" / "._000000000000.jpg").write_bytes(b"no image")
    city = trees.cityscapes(tmp_path / "city", stego=True)
    (city / "cityscapes/leftImg8bit/train/aachen/._a_leftImg8bit.png").write_bytes(b"no image")
    assert len(open_data(set_config("coco27", coco)[1], "train")) == 6
    assert len(open_data(set_config("cityscapes27", city)[1], "train")) == 6


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def erase(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.unlink()
    for part in sorted(folder.rglob("*"), reverse=True):
        part.rmdir()
    folder.rmdir()


def label_with(value):
    return lambda file: Image.fromarray(np.full(trees.SIDES, value, np.uint8)).save(file)


ANNOTATION = "cocostuff/annotations/train2017/000000000001.png"
LIST = "cocostuff/curated/train2017/Coco164kFull_Stuff_Coarse.txt"
CITY_LABEL = "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"


@pytest.mark.parametrize(
    "name, file, damage, message",
    [
        (
            "coco27",
            "cocostuff/annotations",
            erase,
            "there is neither annotations/train2017 nor stuffthingmaps/train2017",
        ),
        ("coco27", "cocostuff/images", erase, "there is neither images/train2017 nor train2017 in .*train2017.zip and"),
        (
            "coco27",
            ANNOTATION,
            lambda file: file.unlink(),
            "1 of 5 labels are not there, for example .*000001.png; .*zip",
        ),
        (
            "coco27",
            LIST,
            lambda file: file.write_text("7\n"),
            "1 of 1 images are not there, for example .*7.jpg; .*zip",
        ),
        ("coco27", LIST, lambda file: file.write_text("\n"), "the list .*Coarse.txt names no image"),
        ("coco27", LIST, lambda file: file.write_bytes(b"\xff"), "the list .*Coarse.txt cannot be read"),
        (
            "coco27",
            ANNOTATION,
            label_with(200),
            "000001.png holds the value 200, which is no id .*: they are 0 to 181, 255; it must",
        ),
        (
            "coco27",
            ANNOTATION,
            cut,
            "000001.png cannot be read: .*; it must be got anew: .*stuffthingmaps_trainval2017.zip",
        ),
        (
            "coco27",
            "cocostuff/images/train2017/000000000001.jpg",
            cut,
            "000001.jpg cannot be read: .*; it must be got anew",
        ),
        ("cityscapes27", "cityscapes/gtFine", erase, "there is neither gtFine nor gtFine_trainvaltest/gtFine in"),
        ("cityscapes27", "cityscapes/gtFine/train", erase, "there is no .*gtFine/train; .*gtFine_trainvaltest.zip of"),
        ("cityscapes27", CITY_LABEL, lambda file: file.unlink(), "1 of 6 labels are not there, .*labelIds.png; .*zip"),
        (
            "cityscapes27",
            CITY_LABEL,
            label_with(34),
            "holds the value 34, which is no id of Cityscapes-27: they are 0 to 33;",
        ),
        (
            "cityscapes27",
            CITY_LABEL,
            lambda file: Image.new("RGB", (56, 40)).save(file),
            "labelIds.png cannot be read: it must have one byte a pixel, got mode RGB; it must be got anew",
        ),
        (
            "cityscapes27",
            CITY_LABEL,
            lambda file: Image.new("L", (56, 41)).save(file),
            "labelIds.png must have the size of .*leftImg8bit.png, 56 x 40, got 56 x 41",
        ),
        ("potsdam3", "potsdam/gt", erase, "there is no .*potsdam/gt; either imgs/, gt/ and the lists"),
        ("potsdam3", "potsdam/imgs", erase, "there is no .*potsdam/imgs; either"),
        (
            "potsdam3",
            "potsdam/labelled_train.txt",
            lambda file: file.unlink(),
            "there is no .*labelled_train.txt; either",
        ),
        (
            "potsdam3",
            "potsdam/imgs/0.mat",
            cut,
            "the MATLAB file .*0.mat cannot be read: .*; it must be got anew: either",
        ),
        (
            "potsdam3",
            "potsdam/gt/0.mat",
            cut,
            "the MATLAB file .*gt/0.mat cannot be read: .*; it must be got anew: either",
        ),
        (
            "potsdam3",
            "potsdam/gt/0.mat",
            lambda file: scipy.io.savemat(file, {"img": 1}),
            "gt/0.mat has no `gt`; it must",
        ),
        (
            "potsdam3",
            "potsdam/gt/0.mat",
            lambda file: scipy.io.savemat(file, {"gt": np.full((50, 50), -1)}),
            "holds the value -1, which is no id of Potsdam-3: they are 0 to 5, 255; it must be got anew",
        ),
        (
            "potsdam3",
            "potsdam/gt/0.mat",
            lambda file: scipy.io.savemat(file, {"gt": np.zeros((50, 40), np.int32)}),
            "gt/0.mat must have the size of .*imgs/0.mat, 50 x 50, got 40 x 50",
        ),
    ],
)
def test_a_missing_or_broken_part_is_one_sentence(name, file, damage, message, tmp_path, set_config):
    root = trees.plant(name, "stego", tmp_path)
    damage(root / file)
    with pytest.raises(ValueError, match=message) as error:
        data = open_data(set_config(name, root)[1], "train")
        data.label(0), data.image(0)
    assert str(error.value).startswith("data: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_root_that_is_not_there(name, tmp_path, set_config):
    with pytest.raises(ValueError, match="`data.root` .*nowhere is not there; .*docs/data.md shows the layouts"):
        open_data(set_config(name, tmp_path / "nowhere")[1], "train")
    with pytest.raises(ValueError, match=f"`data.root` must be the folder that holds the data set {name}, got None"):
        open_data(set_config(name, "null")[1], "train")


def test_classes_and_crops_where_they_do_not_belong(tmp_path, set_config, tiny_config):
    with pytest.raises(
        ValueError, match=r"`data.classes` must be \[\] with data.name=coco27, which names its own, got"
    ):
        open_data(set_config("coco27", tmp_path, "data.classes=[a, b]")[1], "train")
    with pytest.raises(ValueError, match="`data.crops` must be none with data.name=procedural, got five"):
        open_data(tiny_config(data={"name": "procedural", "crops": "five"}), "train")


@pytest.mark.parametrize("sides", [(48, 64), (64, 48), (33, 71), (32, 32), (10, 9)])
@pytest.mark.parametrize("nearest", [False, True])
def test_crops_of_the_centre_are_torchvisions(sides, nearest):
    pixels, regions = trees.picture(3, sides)
    picture = Image.fromarray(pixels)
    mode = transforms.InterpolationMode
    how = mode.NEAREST if nearest else mode.BILINEAR

    def expected(image, how):
        return transforms.center_crop(transforms.resize(image, 32, how), 32)

    frame = Frame((32, 32), crop=True, nearest=nearest)
    assert np.array_equal(frame.image(picture).permute(1, 2, 0).numpy(), np.array(expected(picture, how)))
    label = Image.fromarray(regions)
    assert np.array_equal(frame.label(label).numpy(), np.array(expected(label, mode.NEAREST)))


def test_a_crop_that_is_no_square_covers_it():
    picture = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))
    frame = Frame((20, 20), crop=True, nearest=True)
    assert np.array_equal(frame.image(picture)[0].numpy(), np.array(picture)[1::2, 1::2, 0][:, 5:25])
    assert Frame((10, 50), crop=True).image(picture).shape == (3, 10, 50)
    assert Frame((30, 20), crop=True).image(picture).shape == (3, 30, 20)


def test_nearest_resize_is_a_quirk(tmp_path, set_config):
    root = trees.plant("cityscapes27", "stego", tmp_path)
    smooth = open_data(set_config("cityscapes27", root)[1], "train").image(0)
    aliased = open_data(set_config("cityscapes27", root, "quirks.preset=published")[1], "train").image(0)
    own = open_data(set_config("cityscapes27", root, "quirks.nearest_resize=true")[1], "train").image(0)
    assert torch.equal(aliased, own) and not torch.equal(smooth, own)
    pixels = np.array(trees.picture(0)[0])
    assert {tuple(color) for color in own.flatten(1).T.tolist()} <= {
        tuple(color) for color in pixels.reshape(-1, 3).tolist()
    }


def test_folders_are_cropped_as_well(tiny_config, photo_folder):
    root = str(photo_folder())
    data = {"name": "folder", "root": root, "size": [24, 24], "classes": list("abcdef")}
    squashed, cropped = (
        open_data(tiny_config(data=data | {"fit": fit}, evaluation={"size": [40, 40]}), "val")
        for fit in ("squash", "crop")
    )
    photograph = Image.open(f"{root}/imgs/val/mosaic_0000.png")
    assert torch.equal(squashed.image(0), resized(photograph, (40, 40)))
    assert torch.equal(cropped.image(0), Frame((40, 40), crop=True).image(photograph))
    assert cropped.label(0).shape == (40, 40) and not torch.equal(squashed.label(0), cropped.label(0))


def test_the_validation_size_must_fit_the_patches(tiny_config):
    with pytest.raises(ValueError, match="`evaluation.size` must be a multiple of the patch size 8, got 30 x 40"):
        open_run(tiny_config(evaluation={"size": [30, 40]}))


def test_reports_show_validation_images_at_their_size(tiny_config):
    run = open_run(tiny_config(evaluation={"size": [48, 56]}))
    run.state.clusterings.fit(run.train_bank, run.state.head, seed=0)
    example = results.examples(run, torch.tensor([0]))[0]
    assert example.image.shape[1:] == (48, 56)
    assert {class_map.shape for class_map in example.maps.values()} == {(48, 56)}


def test_presets_read_their_data_sets_as_published():
    for name in NAMES:
        config = load_config(name)
        assert (config.data.name, config.data.size, config.data.fit) == (name, (224, 224), "crop")
        assert config.data.crops == ("none" if name == "potsdam3" else "five")
        assert config.evaluation.size == (320, 320) and class_names(config.data) == DATA_SETS[name].classes


@pytest.mark.parametrize("name, layout", CASES)
def test_presets_run_end_to_end(name, layout, tmp_path, set_config, capsys):
    root = trees.plant(name, layout, tmp_path / "data")
    crops = "none" if name == "potsdam3" else "five"
    edits = set_config(name, root, f"data.crops={crops}", "data.val_images=2")[0]
    if (name, layout) != ("potsdam3", "stego"):
        prepare.main(["--config", name, "--workers", "1", *edits])
    train.main(["--config", name, *edits])
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["images"] == "validation" and metrics["hp"]["linear"]["accuracy"] is not None
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(run / "checkpoint.pt"), "--root", str(root), "--json"])
    assert json.loads(capsys.readouterr().out)["hp"]["kmeans"]["miou"] == metrics["hp"]["kmeans"]["miou"]
    if layout == "own":
        Image.fromarray(trees.picture(5)[0]).save(tmp_path / "photograph.png")
        arguments = ["--images", str(tmp_path / "photograph.png"), "--out", str(tmp_path / "maps")]
        predict.main(["--checkpoint", str(run / "checkpoint.pt"), *arguments])
        names = json.loads((tmp_path / "maps" / "classes.json").read_text())
        assert list(names.values())[: len(DATA_SETS[name].classes)] == list(DATA_SETS[name].classes)
