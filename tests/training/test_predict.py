"""Predictions: of photographs of any size, what is written, gone on with, and never overwritten."""

import errno
import json
import weakref

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny import tiny_values

from training import predict as program
from training.config_file import config_from_dict, edited
from training.data.photographs import is_prediction, read_rgb
from training.features.inference import Windows, blended_strips, fitted_size
from training.prediction.photograph import Prediction, predict
from training.prediction.pictures import Writer, class_picture, outputs, overlay, write_names
from training.report.figures import class_palette
from training.run import checkpoint_path, open_run
from training.runtime.output import prepare_folder
from training.segment import _interpolated, decided, greatest, upsample


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run whose probes count as trained."""
    config = config_from_dict(tiny_values(tmp_path_factory.mktemp("run") / "out"))
    run = open_run(config)
    run.state.saw_labels = True
    run.state.linear_probe.weight.data *= 20  # or it would say the same everywhere
    run.save()
    return run


@pytest.fixture
def mosaics(run, tmp_path):
    """Photographs of three sizes in folders."""
    for index, (name, size) in enumerate({"frame_2": (60, 40), "frame_10": (33, 70), "sub/frame_1": (60, 40)}.items()):
        file = tmp_path / "in" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = run.val_bank.data.image(index).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize(size).save(file)
    return tmp_path / "in"


@pytest.fixture
def segment_folder(run, mosaics, tmp_path):
    """Run the program on `mosaics`; the folder that it writes to."""

    def segment(*arguments, out="out", images=mosaics):
        where = [
            "--checkpoint",
            str(checkpoint_path(run.config)),
            "--images",
            str(images),
            "--out",
            str(tmp_path / out),
        ]
        program.main([*where, "--segmentation", "linear", *arguments])
        return tmp_path / out

    return segment


def lines(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_prediction(file, class_map, overlay):
    zeros = torch.zeros(6, 8, dtype=torch.uint8)
    Writer(["sky", "road"]).write(read_rgb(file), Prediction(zeros, zeros), {"classes": class_map, "overlay": overlay})


def photographs(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / name)
    return folder


def test_each_photograph_has_its_own_outputs(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg", "a.png", "b.png", "more/b.png")
    maps = [str(paths["classes"].relative_to(tmp_path / "out")) for paths in outputs(images, tmp_path / "out").values()]
    assert maps == ["a.jpg.png", "a.png.png", "b.png", "more/b.png"]


def test_a_stem_that_is_the_name_of_another_photograph(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg", "a.png", "a.jpg.jpg")
    maps = [paths["classes"].name for paths in outputs(images, tmp_path / "out").values()]
    assert sorted(maps) == ["a.jpg.jpg.png", "a.jpg.png", "a.png.png"]


def test_photographs_beside_predictions_are_no_predictions(tmp_path):
    images = photographs(tmp_path / "in", "a.jpg", "b.jpg", "b.png")
    write_prediction(images / "a.jpg", images / "a.png", images / "a_overlay.jpg")
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
    write_prediction(tmp_path / "a.jpg", tmp_path / "a.png", tmp_path / "a_overlay.jpg")
    write_names(tmp_path, ["sky", "road"])  # the names that belong to predictions are those of the newest
    write_names(tmp_path, ["sky", "road"])
    assert json.loads(file.read_text()) == {"0": "sky", "1": "road"}


def test_names_that_differ_in_case_alone(tmp_path, monkeypatch):
    images = photographs(tmp_path / "in", "a.jpg", "A.jpg")
    if len(list(images.iterdir())) == 1:
        pytest.skip("the file system does not tell upper from lower case")
    assert sorted(paths["classes"].name for paths in outputs(images, tmp_path / "out").values()) == ["A.png", "a.png"]
    monkeypatch.setattr("training.prediction.pictures._folds_case", lambda folder: True)
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
    write_prediction(images / "a.png", images / "maps" / "a.png", images / "maps" / "a_overlay.jpg")
    assert list(outputs(images, images / "maps")) == [images / "a.png"]
    assert list(outputs(images, tmp_path / "others")) == [images / "a.png"]
    with pytest.raises(ValueError, match="what is there was written by training.predict"):
        outputs(images / "maps", tmp_path / "others")


def test_bands_give_what_one_interpolation_gives(monkeypatch):
    monkeypatch.setattr("training.segment._BAND_NUMBERS", 200)
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for size in ((37, 41), (4, 5), (2, 3)):
        assert torch.equal(greatest(scores, size), upsample(scores, size).argmax(dim=1))


def test_strips_of_any_height_give_the_whole(monkeypatch):
    monkeypatch.setattr("training.segment._BAND_NUMBERS", 200)
    scores = torch.randn(1, 3, 9, 5)
    for size in ((70, 41), (9, 5), (4, 3), (1, 1)):
        for rows in (1, 2, 4, 9):
            bands = list(_interpolated(scores.split(rows, dim=2), (9, 5), size))
            assert [row for band, _ in bands for row in range(band.start, band.stop)] == list(range(size[0]))
            torch.testing.assert_close(torch.cat([pixels for _, pixels in bands], dim=2), upsample(scores, size))


def test_memory_does_not_grow_with_the_number_of_strips():
    made = []

    def strips():
        for _ in range(50):
            strip = torch.randn(1, 3, 2, 5)
            made.append(weakref.ref(strip))
            yield strip

    for _ in _interpolated(strips(), (100, 5), (700, 41)):
        assert sum(strip() is not None for strip in made) <= 3
    assert len(made) == 50


@pytest.mark.parametrize("name", ["linear", "kmeans", "cluster_probe", "probabilities"])
def test_confidence_is_the_probability_of_what_is_decided(name):
    scores = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    length = torch.rand(1, 1, 3, 5) + 0.5
    wide = upsample(scores, (20, 30))
    expected = {
        "linear": wide.softmax(dim=1),
        "kmeans": (10 * wide).softmax(dim=1),
        "cluster_probe": (10 * wide / upsample(length, (20, 30))).softmax(dim=1),
        "probabilities": wide,
    }[name]
    if name == "probabilities":
        scores, expected = scores.softmax(dim=1), upsample(scores.softmax(dim=1), (20, 30))
    strips = torch.cat([scores, length], dim=1) if name == "cluster_probe" else scores
    values = torch.tensor([7, 9, 7, 200], dtype=torch.uint8)
    classes, confidence = decided([strips], name, values, (3, 5), (20, 30))
    assert torch.equal(classes, values[expected[0].argmax(dim=0)])
    assert (confidence.float() / 255 - expected[0].amax(dim=0)).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    "size, windows", [((20, 44), Windows(12, 8)), ((8, 40), Windows(16, 4)), ((24, 24), Windows(8, 8))]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_are_blended_by_how_far_a_patch_is_from_their_borders(size, windows, batch):
    pixels, patch = torch.rand(2, 3, *size), 4

    def maps(cut):  # what a window says depends on all of it
        assert len(cut) <= 2 * batch
        means = torch.nn.functional.avg_pool2d(cut, patch)
        return torch.cat([means, means.mean(dim=(2, 3), keepdim=True).expand_as(means)], dim=1)

    total = torch.zeros(2, 6, size[0] // patch, size[1] // patch)
    weight = torch.zeros(size[0] // patch, size[1] // patch)
    tall, wide = min(windows.side, size[0]), min(windows.side, size[1])
    for top in {*range(0, size[0] - tall, windows.stride), size[0] - tall}:
        for left in {*range(0, size[1] - wide, windows.stride), size[1] - wide}:
            found = maps(pixels[:, :, top : top + tall, left : left + wide])
            for row in range(tall // patch):
                for column in range(wide // patch):
                    share = min(row + 1, tall // patch - row) * min(column + 1, wide // patch - column)
                    total[:, :, top // patch + row, left // patch + column] += share * found[:, :, row, column]
                    weight[top // patch + row, left // patch + column] += share
    found = torch.cat(list(blended_strips(pixels, windows, patch, maps, batch)), dim=2)
    torch.testing.assert_close(found, total / weight)


def test_a_scale_is_a_multiple_of_the_photograph(run):
    assert fitted_size((100, 60), (32, 40), Windows(32, 16), 8, 1.0) == (96, 64)
    assert fitted_size((100, 60), (32, 40), None, 8, 0.5) == (48, 32)
    assert fitted_size((3, 3), (32, 40), None, 8, 0.01) == (8, 8)
    picture = Image.fromarray(run.val_bank.data.image(0).permute(1, 2, 0).numpy()).resize((80, 64))
    config = edited(run.config, ["evaluation.window=32"], ["evaluation.window"])
    of_window = predict(config, run.backbone, run.state, picture, "linear", scale=1.0)
    of_itself = predict(run.config, run.backbone, run.state, picture, "linear", scale=1.0)
    assert torch.equal(of_window.classes, of_itself.classes), "windows are as large as the images that were scored"
    assert not torch.equal(
        of_itself.confidence, predict(run.config, run.backbone, run.state, picture, "linear").confidence
    )


@pytest.mark.parametrize("kind", ["linear", "cluster_probe"])
@pytest.mark.parametrize("edit", ["evaluation.flip=true", "evaluation.crf=exact", "evaluation.window=24"])
def test_files_pictures_and_tensors_are_photographs(run, mosaics, kind, edit):
    config = edited(run.config, [edit], [edit.partition("=")[0]])
    file = mosaics / "frame_10.png"
    classes, confidence = predict(config, run.backbone, run.state, file, kind)
    assert classes.shape == confidence.shape == (70, 33)
    assert classes.dtype == confidence.dtype == torch.uint8 and confidence.min() >= 255 // 6
    pixels = torch.from_numpy(np.array(read_rgb(file))).permute(2, 0, 1)
    for photograph in (str(file), read_rgb(file), pixels):
        again = predict(config, run.backbone, run.state, photograph, kind)
        assert torch.equal(again.classes, classes) and torch.equal(again.confidence, confidence)
    with pytest.raises(TypeError, match=r"a tensor \(3, h, w\) uint8, got torch.float32 of shape \(3, 70, 33\)$"):
        predict(config, run.backbone, run.state, pixels.float(), kind)


def test_a_photograph_too_large_for_a_crf(run, segment_folder, monkeypatch):
    monkeypatch.setattr("training.prediction.photograph._CRF_NUMBERS", 6 * 32 * 40 - 1)
    with pytest.raises(
        SystemExit, match="frame_2.png cannot be segmented: a CRF takes all of .* got 40 x 32: give a sm"
    ):
        segment_folder("evaluation.crf=exact")


def test_batches_of_photographs_and_of_windows(segment_folder):
    for more in ((), ("--scale", "1")):
        one = segment_folder("--write", "classes,confidence", "--batch", "1", *more, out="one")
        many = segment_folder("--write", "classes,confidence", "--batch", "3", *more, out="many")
        assert contents(one).keys() == contents(many).keys()
        for entry in lines(one)[1:]:
            for picture in entry["outputs"].values():
                left, right = (np.array(Image.open(out / picture["file"])).astype(int) for out in (one, many))
                assert (abs(left - right) <= 1).mean() > 0.99


def test_the_manifest_says_what_was_done_in_the_order_of_frames(segment_folder, mosaics, run):
    out = segment_folder("--write", "confidence")
    least = np.array(Image.open(out / "frame_10_confidence.png")).max() / 255
    segment_folder("--write", "classes,confidence,labels", "--min-confidence", str(least))
    head, *entries = lines(out)
    assert (
        head["settings"]["segmentation"] == "linear"
        and head["step"] == run.state.step
        and "PyTorch" in head["versions"]
    )
    assert [(entry["image"], entry["index"]) for entry in entries] == [
        ("frame_2.png", 0),
        ("frame_10.png", 1),
        ("sub/frame_1.png", 2),
    ]
    entry = entries[1]
    classes, confidence, labels = (
        np.array(Image.open(out / entry["outputs"][kind]["file"])) for kind in ("classes", "confidence", "labels")
    )
    assert (entry["width"], entry["height"]) == (33, 70) and entry["bytes"] == (mosaics / "frame_10.png").stat().st_size
    names = list(json.loads((out / "classes.json").read_text()).values())
    assert entry["share"] == {names[v]: round((classes == v).mean(), 6) for v in np.unique(classes)}
    assert entry["mean_confidence"] == pytest.approx(confidence.mean() / 255, abs=1e-4)
    assert np.array_equal(labels, np.where(confidence < confidence.max(), 255, classes))
    assert entry["ignored"] == {"labels": round((labels == 255).mean(), 6)} and 0 < entry["ignored"]["labels"] < 1


def test_a_stopped_run_goes_on_to_the_same_files(segment_folder, monkeypatch, capsys):
    kinds = ("--write", "classes,overlay,coco", "--batch", "2")
    whole = segment_folder(*kinds, out="whole")
    write, calls = Writer.write, []

    def stop(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, *arguments)

    monkeypatch.setattr(Writer, "write", stop)
    with pytest.raises(SystemExit):
        segment_folder(*kinds)
    monkeypatch.undo()
    out = segment_folder(*kinds)
    assert "3 images, 6 classes" in (said := capsys.readouterr().out) and "(1 of them were done before)" in said
    before, after = contents(whole), contents(out)
    assert lines(whole)[1:] == lines(out)[1:]
    for found in (before, after):
        del found["manifest.jsonl"]  # whose first line has the command
    assert before == after


def test_what_is_done_is_left_alone_and_what_is_not_done_anew(segment_folder, mosaics, monkeypatch):
    out = segment_folder()
    written = []
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda *a: written.append(a[3]["classes"].stem) or write(*a))
    segment_folder()
    assert written == []
    with open(out / "manifest.jsonl", "a") as file:
        file.write('{"image": "frame_2.png", "ind')  # the program was killed
    segment_folder()
    assert written == [] and len(lines(out)) == 4
    (out / "frame_2_overlay.jpg").unlink()
    segment_folder()
    assert written == ["frame_2"]
    Image.new("RGB", (33, 70)).save(mosaics / "frame_10.png")
    segment_folder()
    assert written == ["frame_2", "frame_10"]
    (mosaics / "frame_2.png").unlink()
    segment_folder()
    assert len(written) == 2 and [entry["image"] for entry in lines(out)[1:]] == ["frame_10.png", "sub/frame_1.png"]
    segment_folder("evaluation.flip=true")
    assert written[2:] == ["frame_10", "frame_1"]


@pytest.mark.parametrize("name", ["manifest.jsonl", "panoptic.json"])
def test_files_of_others_are_kept(segment_folder, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"images": []}')
    with pytest.raises(SystemExit, match=f"{name} is there already and is not of predictions: choose another --out"):
        segment_folder("--write", "coco")
    assert (tmp_path / "out" / name).read_text() == '{"images": []}'


def test_two_processes_do_not_write_into_one_folder(segment_folder, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".predict.lock"),
        pytest.raises(SystemExit, match="is being written by another pro"),
    ):
        segment_folder()
    segment_folder()


def test_a_full_disk_ends_the_run_and_leaves_no_half_result(segment_folder, tmp_path, monkeypatch):
    def fail(folder, *_):
        raise OSError("x cannot be written: No space left on device") from OSError(
            errno.ENOSPC, "No space left on device"
        )

    monkeypatch.setattr("training.prediction.pictures.overlay", fail)
    with pytest.raises(SystemExit, match="^predict: x cannot be written: No space left on device$"):
        segment_folder()
    assert not list((tmp_path / "out").rglob("*.png")) and len(lines(tmp_path / "out")) == 1


def test_a_bad_file_does_not_stop_the_rest(segment_folder, mosaics, tmp_path):
    (mosaics / "frame_3.png").write_bytes(b"no image")
    with pytest.raises(
        SystemExit,
        match=r"^predict: 1 of 4 images are left out:\n  data: .*frame_3.png cannot be read: it is no image$",
    ):
        segment_folder("--batch", "4")
    assert len(lines(tmp_path / "out")) == 4


def test_of_many_bad_files_the_first_are_named_in_a_line_each(segment_folder, mosaics):
    for index in range(12):
        (mosaics / f"bad_{index}.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        segment_folder()
    first, *named, more = str(ended.value).splitlines()
    assert first == "predict: 12 of 15 images are left out:"
    assert len(named) == 10 and all(line.endswith("cannot be read: it is no image") for line in named)
    assert more == "  and 2 more"


def test_an_overlay_larger_than_a_jpeg_is_refused_before_the_photograph_is_segmented(
    segment_folder, tmp_path, monkeypatch
):
    Image.new("L", (65_501, 2)).save(tmp_path / "wide.png")
    monkeypatch.setattr(program, "predict_together", lambda *of, **_: [] if not of[3] else pytest.fail("segmented"))
    refused = (
        "wide.png cannot be written: an overlay is a JPEG, .* at most 65500 pixels .* would have 65501 x 2: choose"
    )
    with pytest.raises(SystemExit, match=refused):
        segment_folder(images=tmp_path / "wide.png")
    monkeypatch.undo()
    assert Image.open(segment_folder("--write", "classes", images=tmp_path / "wide.png") / "wide.png").size[0] == 65_501


def test_a_legend_that_makes_an_overlay_too_large_is_told(segment_folder, tmp_path):
    Image.new("L", (2, 65_500)).save(tmp_path / "high.png")
    with pytest.raises(SystemExit, match="high.png cannot be written: an overlay is .* would have [0-9]+ x 655"):
        segment_folder("--legend", images=tmp_path / "high.png")
    assert not list((tmp_path / "out").glob("high*"))


def test_the_limit_of_pixels(segment_folder, mosaics, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    Image.new("L", (1100, 1000)).save(tmp_path / "large.png")
    with pytest.raises(SystemExit, match=r"large.png cannot be read: .* \(--max-megapixels allows more\)"):
        segment_folder("--max-megapixels", "1", images=tmp_path / "large.png")
    out = segment_folder("--max-megapixels", "1.1", images=tmp_path / "large.png")
    assert Image.open(out / "large.png").size == (1100, 1000)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--write", "classes,map"], "--write: must list some of classes, overlay, .*, got map"),
        (["--write", ""], "--write: must list some of .*, got nothing"),
        (["--scale", "0"], "--scale: must be a number of 0.01 to 16, got 0"),
        (["--scale", "nan"], "--scale: must be a number of 0.01 to 16, got nan"),
        (["--batch", "1.5"], "--batch: must be an integer of 1 to 4096, got 1.5"),
        (
            ["--min-confidence", "0.5"],
            "--min-confidence needs labels, cityscapes or coco in --write, got classes,overlay",
        ),
        (["--things", "dots", "--write", "labels"], "--things needs coco in --write, got labels"),
        (["--things", "dot", "--write", "coco"], "--things must be some of vertical stripes, .*, got dot"),
        (["--legend", "--write", "classes"], "--legend needs overlay in --write, got classes"),
        (
            ["--write", "cityscapes"],
            "cityscapes has no classes called vertical stripes, .*: give their ids with --ids FILE",
        ),
        (["--write", "labels", "--ids", "nothing.yaml"], "--ids nothing.yaml cannot be read"),
    ],
)
def test_mistakes(segment_folder, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        segment_folder(*arguments)
    assert not (tmp_path / "out").exists()


def test_a_legend_names_the_classes_that_are_there():
    photograph = Image.new("RGB", (400, 300), "white")
    classes = torch.zeros(300, 400, dtype=torch.uint8)
    classes[:, 100:] = 2
    picture = class_picture(classes.numpy(), 3)
    plain, legend = overlay(photograph, picture), overlay(photograph, picture, ["sky", "road", "Straße"])
    assert plain.size == (400, 300) and legend.width == 400 and legend.height > 300
    assert legend.crop((0, 0, 400, 300)).tobytes() == plain.tobytes()
    strip = np.array(legend.crop((0, 300, 400, legend.height))).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(strip, axis=0).tolist()}
    palette = [tuple(colour) for colour in class_palette(3).tolist()]
    assert palette[0] in colours and palette[2] in colours and palette[1] not in colours
