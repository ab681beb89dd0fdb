"""Five crops and tiles: what they hold, and that a run may be killed, repeated and checked."""

import json
import multiprocessing
import os
import signal
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
import trees
from filelock import FileLock
from PIL import Image
from torchvision.transforms import functional as transforms

from training import prepare
from training.config_file import load_config
from training.data import open_data
from training.data.making import make, read_manifest, written_whole
from training.data.potsdam import COLOURS, LABELLED

CROPPED = "cropped/cityscapes_five_crop_0.5"


def run(root, *more, name="cityscapes27"):
    prepare.main(["--config", name, "--workers", "1", f"data.root={root}", *more])


def opened(root, *edits, name="cityscapes27", split="train"):
    return open_data(load_config(name, [f"data.root={root}", *edits]), split)


def contents(folder):
    """Each file with its bytes and its time."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def hashes(folder):
    return {name: content for name, (content, _) in contents(folder).items()}


@pytest.fixture
def cityscapes(tmp_path):
    return trees.cityscapes(tmp_path / "data", stego=True)


def test_crops_are_corners_and_centre(cityscapes):
    run(cityscapes, "--quality", "100")
    folder = cityscapes / CROPPED
    for index, seed in enumerate((0, 1, 2, 10, 11, 12)):
        pixels, regions = trees.picture(seed)
        label = np.array([1, 5, 15, 17, 27, 0], np.uint8)[regions]
        for number in range(5):
            image = Image.open(folder / "img" / "train" / f"{5 * index + number}.jpg")
            own = np.array(Image.open(folder / "label" / "train" / f"{5 * index + number}.png"))
            top, left = ((0, 0), (0, 28), (20, 0), (20, 28), (10, 14))[number]
            assert np.array_equal(own, label[top : top + 20, left : left + 28])
            expected = Image.fromarray(np.ascontiguousarray(pixels[top : top + 20, left : left + 28]))
            grey = [np.array(picture.convert("L")).astype(int) for picture in (image, expected)]
            assert image.size == (28, 20) and abs(grey[0] - grey[1]).mean() < 3, "JPEG halves the resolution of colour"
            assert np.array_equal(own, np.array(transforms.five_crop(Image.fromarray(label), [20, 28])[number]))
    assert len(list((folder / "img" / "train").iterdir())) == len(list((folder / "label" / "train").iterdir())) == 30


def test_training_takes_crops_and_validation_whole_images(cityscapes):
    run(cityscapes)
    crops, whole = opened(cityscapes, "data.size=20"), opened(cityscapes, "data.crops=none")
    assert (len(crops), len(whole), len(opened(cityscapes, split="val"))) == (30, 6, 3)
    label = torch.from_numpy(np.array([0, 4, 14, 16, 26, -1])[trees.picture(0)[1]])
    assert torch.equal(crops.label(0), label[:20, 4:24]), (
        "20 x 28 pixels of the left upper corner, and of them the centre"
    )
    assert len(opened(cityscapes, "data.train_images=7")) == 7


def test_again_makes_nothing_and_mends_what_changed(cityscapes, capsys):
    run(cityscapes)
    folder = cityscapes / CROPPED
    before = contents(folder)
    run(cityscapes)
    assert contents(folder) == before
    assert "files of 0 images were made, those of 6 were there and are whole" in capsys.readouterr().out
    (folder / "img" / "train" / "3.jpg").write_bytes(b"no image")
    (folder / "label" / "train" / "29.png").unlink()
    run(cityscapes)
    assert "files of 2 images were made, those of 4 were there" in capsys.readouterr().out
    assert hashes(folder) == {name: content for name, (content, _) in before.items()}


def test_two_processes_make_the_same(cityscapes, tmp_path):
    other = trees.cityscapes(tmp_path / "other", stego=True)
    run(cityscapes)
    run(other, "--workers", "2")
    assert hashes(cityscapes / CROPPED) == hashes(other / CROPPED)


class Numbers(NamedTuple):
    """A task of three small files; the process that makes that called `fatal` is killed in its second."""

    name: str
    fatal: str = ""
    slow: float = 0.0

    def paths(self):
        return [f"numbers/{self.name}_{part}" for part in range(3)]

    def contents(self):
        for part in range(3):
            if self.name == self.fatal and part == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.slow)
            yield f"{self.name} {part}".encode()


def numbers(**options):
    return [Numbers(str(index), **options) for index in range(6)]


def test_a_run_that_is_killed_goes_on(tmp_path):
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(
        target=make, args=(numbers(fatal="3"), folder, {"kind": 1}, 1, "")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((folder / "numbers").iterdir())) == 10, "three of three, and the first of the fourth"
    assert read_manifest(folder)[1] is False
    assert make(numbers(), folder, {"kind": 1}, 1, "") == (3, 3)
    assert read_manifest(folder)[1] is True and not (folder / ".unfinished").exists()
    make(numbers(), tmp_path / "whole", {"kind": 1}, 1, "")
    assert hashes(folder) == hashes(tmp_path / "whole")


def test_workers_leave_with_a_parent_that_is_killed(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=make, args=(numbers(slow=0.1), tmp_path / "made", {}, 2, "")
    )
    process.start()
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    if not os.path.exists(children):
        process.join()
        pytest.skip("this system has no lists of child processes")
    workers = []
    for _ in range(200):
        with open(children) as file:
            workers = file.read().split()
        if len(workers) == 2:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for _ in range(500):
        if not any(os.path.exists(f"/proc/{worker}/exe") for worker in workers):
            break
        time.sleep(0.01)
    assert len(workers) == 2 and not any(os.path.exists(f"/proc/{worker}/exe") for worker in workers)


def test_a_file_is_in_its_place_when_it_is_whole(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    (tmp_path / "numbers").mkdir()
    with pytest.raises(KeyboardInterrupt):
        written_whole(tmp_path, "numbers/0_0", b"content")
    assert not list((tmp_path / "numbers").iterdir())


def test_a_worker_that_is_killed_is_told(tmp_path):
    with pytest.raises(ValueError, match="a process was killed, perhaps for its memory; the same command goes on"):
        make(numbers(fatal="3"), tmp_path / "made", {}, 2, "")


def test_other_settings_and_two_at_once_are_refused(tmp_path):
    make(numbers(), tmp_path, {"quality": 95}, 1, "")
    with pytest.raises(ValueError, match="holds files that were made with another quality; remove it"):
        make(numbers(), tmp_path, {"quality": 75}, 1, "")
    with pytest.raises(ValueError, match="holds files that were made of other images; remove it"):
        make(numbers()[:5], tmp_path, {"quality": 95}, 1, "")
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another program is making files in"):
        make(numbers(), tmp_path, {"quality": 95}, 1, "")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="manifest.json is no manifest of training.prepare"):
        make(numbers(), tmp_path, {"quality": 95}, 1, "")


def test_crops_of_another_program_are_read_and_kept(cityscapes, capsys):
    run(cityscapes)
    folder = cityscapes / CROPPED
    ours = opened(cityscapes).image(7)
    (folder / "manifest.json").unlink()
    assert torch.equal(opened(cityscapes).image(7), ours)
    assert "five crops of each training image, made by another program" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="prepare: data: .* holds files that another program made; remove it"):
        run(cityscapes)
    (cityscapes / "cityscapes" / "cropped").mkdir()
    folder.rename(cityscapes / "cityscapes" / CROPPED)
    assert len(opened(cityscapes)) == 30, "where HP has them"


def test_crops_that_are_not_complete_are_refused(cityscapes):
    with pytest.raises(ValueError, match="`data.crops=five` needs the crops in .*; python -m training.prepare, with"):
        opened(cityscapes)
    run(cityscapes)
    folder = cityscapes / CROPPED
    (folder / "img" / "train" / "3.jpg").unlink()
    with pytest.raises(ValueError, match="29 crops of images and 30 of labels, expected 30 of both"):
        opened(cityscapes)
    (folder / "img" / "train" / "3.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match="3.jpg cannot be read: .*; it must be got anew: python -m training.prepare, with"
    ):
        opened(cityscapes).image(3)
    (folder / "img" / "train" / "3.jpg").unlink()
    (folder / "label" / "train" / "3.png").unlink()
    with pytest.raises(ValueError, match="29 crops of images and 29 of labels, expected 30 of both"):
        opened(cityscapes)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksums"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="are not finished; python -m training.prepare"):
        opened(cityscapes)


def test_hidden_files_are_no_crops(cityscapes):
    run(cityscapes)
    (cityscapes / CROPPED / "img" / "train" / ".DS_Store").write_bytes(b"")
    (cityscapes / CROPPED / "label" / "train" / "._0.png").write_bytes(b"")
    assert len(opened(cityscapes)) == 30


def test_a_broken_source_is_named(cityscapes):
    file = cityscapes / "cityscapes/gtFine/train/bochum/bochum_000001_000019_gtFine_labelIds.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(SystemExit, match="prepare: data: .*bochum_000001_000019_gtFine_labelIds.png cannot be read"):
        run(cityscapes, "--workers", "2")


def test_potsdam_is_cut_into_tiles(tmp_path):
    root = trees.potsdam_photographs(tmp_path, side=800)
    with pytest.raises(ValueError, match="must be cut into tiles first: python -m training.prepare --config potsdam3"):
        opened(root, name="potsdam3")
    run(root, name="potsdam3")
    folder = root / "potsdam"
    lists = {name: (folder / f"{name}.txt").read_text().split() for name in ("labelled_train", "labelled_test")}
    assert (len(lists["labelled_train"]), len(lists["labelled_test"])) == (24 * 4 - 15, 15), "855 of 5400 are 15 of 96"
    assert not set(lists["labelled_train"]) & set(lists["labelled_test"])
    assert (folder / "unlabelled_train.txt").read_text().split() == ["2_13_0_0", "2_13_0_1", "2_13_1_0", "2_13_1_1"]
    assert len(list((folder / "imgs").iterdir())) == 100 and len(list((folder / "gt").iterdir())) == 96
    photograph = np.array(Image.open(root / "2_Ortho_RGB" / "top_potsdam_5_11_RGB.tif"))
    tile = np.array(Image.open(folder / "imgs" / "5_11_1_0.png"))
    means = photograph[400:, :400].reshape(200, 2, 200, 2, 3).mean(axis=(1, 3))
    assert tile.shape == (200, 200, 3) and abs(tile - means).max() <= 0.5
    colours = np.array([colour for colour, _ in COLOURS.values()])
    ids = np.array(Image.open(folder / "gt" / "5_11_1_0.png"))
    own = np.array(Image.open(root / "5_Labels_for_participants" / "top_potsdam_5_11_label.tif"))
    assert np.array_equal(colours[ids], own[400::2, :400:2])
    data = opened(root, "data.size=200", name="potsdam3")
    index = lists["labelled_train"].index(next(name for name in lists["labelled_train"] if name.startswith("5_11")))
    assert data.label(index).max() <= 2 and data.label(index).min() >= 0


def test_what_of_potsdam_is_missing_or_wrong(tmp_path):
    assert len(LABELLED) == 24
    root = trees.potsdam_photographs(tmp_path)
    label = root / "5_Labels_for_participants" / "top_potsdam_3_11_label.tif"

    def paint(colour, size=400):
        pixels = np.zeros((size, size, 3), np.uint8)
        pixels[:] = colour
        Image.fromarray(pixels).save(label)

    paint((120, 90, 60))
    with pytest.raises(SystemExit, match=r"3_11_label.tif has the colour \[120, 90, 60\], which is none of the six"):
        run(root, name="potsdam3")
    paint((255, 0, 255))
    with pytest.raises(SystemExit, match=r"3_11_label.tif has the colour \[255, 0, 255\], which is none of the six"):
        run(root, name="potsdam3")
    paint((255, 0, 0), 800)
    with pytest.raises(SystemExit, match="3_11_label.tif must have the size of .*3_11_RGB.tif"):
        run(root, name="potsdam3")
    paint((255, 0, 0), 300)
    with pytest.raises(SystemExit, match="3_11_label.tif must have sides that are multiples of 400, .*got 300 x 300"):
        run(root, name="potsdam3")
    with pytest.raises(ValueError, match="must be cut into tiles first"):
        opened(root, name="potsdam3")
    paint((252, 255, 0))
    run(root, name="potsdam3")
    assert np.unique(np.array(Image.open(root / "potsdam" / "gt" / "3_11_0_0.png"))) == [4], "cars, a shade off"
    label.unlink()
    with pytest.raises(SystemExit, match="there is no .*top_potsdam_3_11_label.tif; either"):
        run(root, name="potsdam3")
    (root / "2_Ortho_RGB" / "top_potsdam_3_11_RGB.tif").unlink()
    with pytest.raises(SystemExit, match="1 of the 24 labelled photographs are not there, .*potsdam_3_11_RGB.tif"):
        run(root, name="potsdam3")


def test_mistakes_on_the_command_line(tmp_path):
    with pytest.raises(SystemExit, match="^prepare: nothing is to be made for data.name=procedural data.crops=none"):
        prepare.main(["--config", "quickstart"])
    with pytest.raises(SystemExit, match="--workers must be at least 1, got 0"):
        prepare.main(["--config", "coco27", "--workers", "0"])
    with pytest.raises(SystemExit, match=r"--quality must be in \[1, 100\], got 101"):
        prepare.main(["--config", "coco27", "--quality", "101"])
    with pytest.raises(SystemExit, match="`data.root` must be the folder that holds the data set coco27, got None"):
        prepare.main(["--config", "coco27"])
