"""Images, labels and batches."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans

from training.data import FolderData, batch_of_step, load_image, open_data
from training.data.photographs import list_images, read_rgb, size_of
from training.data.procedural import CLASSES, ProceduralData
from training.evaluation.metrics import SegmentationMetrics


def test_folder_reads_images_and_labels(photo_folder):
    data = FolderData(photo_folder(), "train", (24, 32), CLASSES)
    assert len(data) == 6
    assert data.name(0) == "mosaic_0000"
    assert data.image(0).shape == (3, 24, 32) and data.image(0).dtype == torch.uint8
    label = data.label(0)
    assert label.shape == (24, 32) and label.dtype == torch.int64
    assert (label[:2] == -1).all(), "void pixels are ignored"
    assert label[2:].min() >= 0 and label.max() < len(CLASSES)


def test_folder_keeps_size_and_values(photo_folder):
    root = photo_folder()
    with Image.open(root / "imgs" / "val" / "mosaic_0003.png") as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(FolderData(root, "val", (48, 64), CLASSES).image(3), expected)


def test_folder_without_labels(photo_folder):
    data = FolderData(photo_folder(labels=False), "val", (24, 32), ())
    assert data.label(0) is None


def test_files_are_those_of_image_and_label(photo_folder):
    root = photo_folder()
    data = FolderData(root, "train", (24, 32), CLASSES)
    assert data.file(2) == root / "imgs" / "train" / "mosaic_0002.png"
    assert data.label_file(2) == root / "labels" / "train" / "mosaic_0002.png"
    assert FolderData(photo_folder(labels=False, name="bare"), "val", (24, 32), ()).label_file(2) is None
    assert ProceduralData(1, (24, 32), 0).file(0) is ProceduralData(1, (24, 32), 0).label_file(0) is None


def test_folder_limit(photo_folder):
    assert len(FolderData(photo_folder(), "train", (24, 32), CLASSES, limit=2)) == 2


def test_folder_errors(photo_folder, tmp_path):
    with pytest.raises(ValueError, match="the folder of images .*nowhere is not there"):
        FolderData(tmp_path / "nowhere", "train", (24, 32), CLASSES)
    with pytest.raises(ValueError, match="`data.classes` must name their classes"):
        FolderData(photo_folder(), "train", (24, 32), ())
    partly = photo_folder(name="partly")
    (partly / "labels" / "train" / "mosaic_0001.png").unlink()
    with pytest.raises(ValueError, match="1 of 6 images have no label, for example .*mosaic_0001"):
        FolderData(partly, "train", (24, 32), CLASSES)
    coloured = photo_folder(name="coloured")
    Image.new("RGB", (64, 48)).save(coloured / "labels" / "train" / "mosaic_0000.png")
    with pytest.raises(ValueError, match="must have one byte a pixel, got mode RGB"):
        FolderData(coloured, "train", (24, 32), CLASSES)
    Image.new("L", (64, 50)).save(coloured / "labels" / "train" / "mosaic_0000.png")
    with pytest.raises(ValueError, match="must have the size of mosaic_0000.png, 64 x 48, got 64 x 50"):
        FolderData(coloured, "train", (24, 32), CLASSES)


def test_labels_that_match_no_image_are_an_error(photo_folder):
    root = photo_folder()
    for file in list((root / "labels" / "train").iterdir()):
        file.rename(file.with_name(file.stem + "_labelIds.png"))
    with pytest.raises(ValueError, match="none of the 6 files in .*train is the label of an image: .*_labelIds.png"):
        FolderData(root, "train", (24, 32), CLASSES)


def test_labels_without_an_image_are_told(photo_folder, capsys):
    root = photo_folder()
    (root / "imgs" / "train" / "mosaic_0000.png").unlink()
    assert len(FolderData(root, "train", (24, 32), CLASSES, limit=2)) == 2
    assert capsys.readouterr().err == (
        f"data: 1 labels match no image and are not used, for example {root}/labels/train/mosaic_0000.png\n"
    )


def test_a_file_in_the_place_of_a_folder(photo_folder):
    root = photo_folder(labels=False)
    (root / "labels").write_text("a file")
    with pytest.raises(ValueError, match="labels must be a folder"):
        FolderData(root, "train", (24, 32), CLASSES)


def test_a_link_in_a_circle_is_named(photo_folder):
    root = photo_folder(labels=False)
    (root / "imgs" / "train" / "x.png").symlink_to("x.png")
    with pytest.raises(ValueError, match="x.png cannot be read"):
        FolderData(root, "train", (24, 32), ())


def test_names_in_upper_case_and_hidden_files(photo_folder):
    root = photo_folder()
    for kind in ("imgs", "labels"):
        for file in list((root / kind / "train").iterdir()):
            file.rename(file.with_suffix(".PNG"))
        (root / kind / "train" / "._mosaic_0000.PNG").write_bytes(b"not an image")
    data = FolderData(root, "train", (24, 32), CLASSES)
    assert len(data) == 6 and data.label(0) is not None


def test_a_flat_folder_of_photographs_is_all_splits(tmp_path):
    (tmp_path / "holiday").mkdir()
    for name in ("b.webp", "a.bmp", "holiday/c.TIF"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / name, format={"b": "WEBP", "a": "BMP"}.get(name[0], "TIFF"))
    for split in ("train", "val"):
        data = FolderData(tmp_path, split, (6, 8), ())
        assert [data.name(index) for index in range(len(data))] == ["a", "b", "holiday/c"]


def test_a_bad_file_is_named(photo_folder):
    root = photo_folder()
    file = root / "imgs" / "train" / "mosaic_0002.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="mosaic_0002.png cannot be read"):
        FolderData(root, "train", (24, 32), CLASSES).image(2)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="mosaic_0002.png"):
        FolderData(root, "train", (24, 32), CLASSES)


def test_photographs_are_read_as_viewers_show_them(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20, :40] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    Image.fromarray(pixels).save(upright)
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert torch.equal(load_image(turned, (40, 80)), load_image(upright, (40, 80)))
    assert size_of(turned) == (40, 80)


@pytest.mark.parametrize("name", ["a.tif", "a.jpg", "a.webp", "a.png"])
def test_the_size_of_a_turned_photograph_is_that_of_its_pixels(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    kwargs = {"tiffinfo": {0x0112: 6}} if name == "a.tif" else {"exif": exif}
    Image.new("RGB", (60, 40)).save(tmp_path / name, **kwargs)
    assert size_of(tmp_path / name) == (60, 40)
    assert read_rgb(tmp_path / name).size == (40, 60)


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "real" / "a.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "in")
    assert list_images(tmp_path / "in") == [tmp_path / "in" / "link" / "a.png"]


def test_a_pipe_is_no_photograph(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png cannot be read: it is no file"):
        read_rgb(tmp_path / "a.png")


def test_folders_of_splits_that_would_be_overlooked(tmp_path, photo_folder):
    for split in ("train", "val"):
        (tmp_path / "bare" / split).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "bare" / split / "a.png")
    with pytest.raises(ValueError, match="has train/ and val/: they must be in .*imgs"):
        FolderData(tmp_path / "bare", "train", (6, 8), ())
    root = photo_folder()
    (root / "imgs" / "val").rename(root / "imgs" / "validation")
    with pytest.raises(ValueError, match="there are labels in .*val, but no .*val"):
        FolderData(root, "train", (24, 32), CLASSES)


def test_grey_levels_of_sixteen_bits_are_kept(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    assert torch.equal(
        load_image(tmp_path / "grey.png", (8, 64))[0, 0].int(), torch.from_numpy(levels[0] / 257).round().int()
    )
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "real.tif")
    with pytest.raises(ValueError, match="real.tif cannot be read: its grey levels have 32 bits"):
        load_image(tmp_path / "real.tif", (8, 64))


def test_load_image_takes_grey_and_transparent_files(tmp_path):
    for mode in ("L", "RGBA", "P"):
        file = tmp_path / f"{mode}.png"
        Image.new(mode, (10, 6)).save(file)
        assert load_image(file, (6, 10)).shape == (3, 6, 10)


def test_open_data_needs_a_root(tiny_config):
    with pytest.raises(ValueError, match="`data.root` must be the folder that holds the photographs, .* got None"):
        open_data(tiny_config(data={"name": "folder"}), "train")


def test_missing_val_folder_falls_back_to_training_images(tiny_config, photo_folder):
    root = photo_folder(labels=False)
    for file in (root / "imgs" / "val").iterdir():
        file.unlink()
    (root / "imgs" / "val").rmdir()
    config = tiny_config(data={"name": "folder", "root": str(root), "size": [32, 40], "clusters": 4})
    assert len(open_data(config, "val")) == 6


def test_batches_cover_each_epoch_without_repeats():
    batches = [batch_of_step(step, images=11, batch_size=4, seed=0) for step in range(4)]
    assert all(len(batch) == 4 for batch in batches)
    for epoch in (batches[:2], batches[2:]):
        assert len(set(torch.cat(epoch).tolist())) == 8
    assert not torch.equal(torch.cat(batches[:2]), torch.cat(batches[2:]))


def test_batch_is_a_function_of_seed_and_step():
    assert torch.equal(batch_of_step(7, 11, 4, seed=3), batch_of_step(7, 11, 4, seed=3))
    assert not torch.equal(batch_of_step(7, 11, 4, seed=3), batch_of_step(7, 11, 4, seed=4))


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match="`batch_size` must be at most the 3 training images, got 4"):
        batch_of_step(0, 3, 4, seed=0)


def test_procedural_is_reproducible_and_has_every_class():
    first, second = ProceduralData(12, (32, 40), seed=5), ProceduralData(12, (32, 40), seed=5)
    assert all(torch.equal(first.image(i), second.image(i)) for i in range(12))
    assert all(torch.equal(first.label(i), second.label(i)) for i in range(12))
    assert not torch.equal(first.image(0), ProceduralData(1, (32, 40), seed=6).image(0))
    assert torch.stack([first.label(i) for i in range(12)]).unique().tolist() == list(range(len(CLASSES)))


def test_procedural_colours_recur_in_other_images():
    data, colours, images = ProceduralData(24, (56, 56), seed=0), [], []
    for index in range(24):
        for region in data.label(index).unique():
            colours.append(data.image(index)[:, data.label(index) == region].float().mean(dim=1) / 255)
            images.append(index)
    distance, index = torch.cdist(torch.stack(colours), torch.stack(colours)), torch.tensor(images)
    distance[index[:, None] == index] = torch.inf
    assert distance.amin(dim=1).mean() < 0.07  # 0.08 to 0.09 with colours drawn at random from all


def test_procedural_classes_are_not_separable_by_colour():
    data = ProceduralData(24, (56, 56), seed=0)
    pixels = torch.stack([data.image(i) for i in range(24)]).permute(0, 2, 3, 1).reshape(-1, 3).float()
    labels = torch.stack([data.label(i) for i in range(24)]).flatten()
    clusters = KMeans(len(CLASSES), n_init=1, random_state=0).fit_predict(pixels.numpy()[::7])
    metrics = SegmentationMetrics(len(CLASSES), match=True)
    metrics.update(torch.from_numpy(clusters), labels[::7])
    frequent = labels.bincount().max().item() / len(labels)
    assert metrics.scores()["accuracy"] < 100 * frequent + 12
