"""What a state can give: nothing that was never fitted passes for a result."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from training import evaluate as evaluation
from training import predict as prediction
from training.backbones import build_backbone
from training.backbones.patch_dictionary import PatchDictionary
from training.evaluate import evaluate, metrics_table, summary
from training.published import export_state, import_state
from training.results import write_results
from training.run import checkpoint_path, load_run, open_run, open_trained
from training.runtime import checkpoint
from training.segment import SEGMENTATIONS, check_usable, map_names, to_classes
from training.state import TrainingState
from training.train import train

NAMES = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture
def folder_run(tiny_config, photo_folder):
    """Open a run on a folder of photographs; keyword arguments are of its data."""

    def make(root=None, **data):
        root = root or photo_folder()
        values = {"name": "folder", "root": str(root), "size": [32, 40], "classes": NAMES} | data
        return open_run(tiny_config(steps=3, warmup=1, data=values))

    return make


@pytest.fixture
def finished(tiny_config):
    """What the checkpoint of a run holds, with its backbone inside, as before there was a file of its own."""
    run = open_run(tiny_config(steps=3, warmup=1))
    run.save()
    saved = load_run(checkpoint_path(run.config))
    del saved["backbone_sha256"]
    return saved


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("clusters", [4, 9])
def test_clusters_and_classes_are_counted_apart(folder_run, tmp_path, clusters):
    run = folder_run(clusters=clusters)
    state = run.state
    assert (state.clusters, state.classes, len(state.linear_probe.bias)) == (clusters, 6, 6)
    assert len(state.cluster_probe.clusters) == len(state.clusterings.codes) == clusters
    train(run)
    _, metrics = write_results(run)
    for figures in (metrics["baseline"]["unsupervised"], metrics["hp"]["kmeans"], metrics["hp"]["cluster_probe"]):
        assert figures["matching"] == "one-to-one"
        assert figures["majority"]["accuracy"] >= figures["accuracy"]
    assert "matching" not in metrics["hp"]["linear"]

    _, _, again = open_trained(checkpoint_path(run.config), "cpu")
    assert (again.clusters, again.classes) == (clusters, 6)
    maps = {name: torch.arange(clusters if name != "linear" else 6) for name in SEGMENTATIONS}
    for name, values in to_classes(again, maps).items():
        names = map_names(again, name, NAMES)
        assert values.min() >= 0 and values.max() < len(names)
        unmatched = [names[value] for value in values.tolist() if value >= 6]
        left = max(0, clusters - 6) if name != "linear" else 0
        assert unmatched == [f"unmatched cluster {index}" for index in range(1, left + 1)]

    images = ["--images", str(tmp_path / "photos" / "imgs" / "val"), "--out", str(tmp_path / "out")]
    prediction.main(["--checkpoint", str(checkpoint_path(run.config)), *images])
    named = set(json.loads((tmp_path / "out" / "classes.json").read_text()))
    with Image.open(tmp_path / "out" / "mosaic_0000.png") as file:
        assert {str(value) for value in np.unique(np.array(file))} <= named


def test_more_clusters_than_patches_are_refused_before_training(folder_run):
    with pytest.raises(ValueError, match="`data.clusters` must be at most the 120 patches to cluster, got 121"):
        folder_run(clusters=121)


def test_unfinished_run_gives_only_what_is_fitted(folder_run, tmp_path, capsys):
    run = folder_run()
    train(run)
    path = str(checkpoint_path(run.config))
    evaluation.main(["--checkpoint", path, "--json"])
    scores = strict(capsys.readouterr().out)
    assert scores["baseline"]["unsupervised"] is scores["hp"]["unsupervised"] is scores["hp"]["kmeans"] is None
    assert scores["hp"]["cluster_probe"]["accuracy"] > 0 and scores["hp"]["linear"]["accuracy"] > 0
    evaluation.main(["--checkpoint", path])
    table = capsys.readouterr().out
    assert "baseline" not in table and "its centres are fitted when the run finishes" in table

    images = ["--images", str(tmp_path / "photos" / "imgs" / "val"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="not fitted: finish the run, or use the segmentation cluster_probe"):
        prediction.main(["--checkpoint", path, *images])
    assert not (tmp_path / "out").exists()
    # Evaluation stores nothing, so these clusters have no class yet.
    prediction.main(["--checkpoint", path, *images, "--segmentation", "cluster_probe"])
    written = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert written == {str(index): f"cluster {index}" for index in range(6)}


def test_checkpoints_from_before_the_flags_are_judged_by_their_tensors(folder_run):
    run = folder_run()
    train(run)
    path = checkpoint_path(run.config)
    for finished in (False, True):
        if finished:
            write_results(run)
        saved = checkpoint.load(path)
        del saved["state"]["saw_labels"]
        for flag in ("fitted", "matched"):
            del saved["state"]["modules"]["clusterings"][flag]
        checkpoint.save(path, saved)
        _, _, state = open_trained(path, "cpu")
        assert state.saw_labels
        assert bool(state.clusterings.fitted) == finished
        assert state.clusterings.matched.tolist() == [finished] * 3


def test_linear_probe_without_a_label_has_no_score(folder_run, photo_folder):
    root = photo_folder()
    for file in (root / "labels" / "train").iterdir():
        file.unlink()
    (root / "labels" / "train").rmdir()
    run = folder_run(root)
    train(run)
    report, metrics = write_results(run)
    assert not run.state.saw_labels
    assert metrics["hp"]["linear"] is None and metrics["hp"]["kmeans"]["accuracy"] > 0
    assert "trained with labels" not in metrics_table(metrics) and "never saw a label" in metrics_table(metrics)
    assert "learns from labels" not in report.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="segmentation linear: the linear probe never saw a label"):
        check_usable(run.state, "linear")


def test_void_labels_give_null(folder_run, photo_folder):
    root = photo_folder()
    for file in (root / "labels" / "val").iterdir():
        with Image.open(file) as label:
            size = label.size
        Image.new("L", size, 255).save(file)
    run = folder_run(root)
    train(run)
    report, metrics = write_results(run)
    written = strict((report.parent / "metrics.json").read_text(encoding="utf-8"))
    assert written["hp"]["kmeans"]["miou"] is written["hp"]["linear"]["accuracy"] is None
    assert not run.state.clusterings.matched.any()
    assert "-: no labelled pixels" in metrics_table(metrics) and "nan" not in metrics_table(metrics)
    text = report.read_text(encoding="utf-8")
    assert "there are no labelled pixels" in text and "IoU of each class" not in text


def test_training_images_are_not_called_validation_images(folder_run, photo_folder):
    root = photo_folder()
    for kind in ("imgs", "labels"):
        (root / kind / "val").rename(root / f"{kind}_aside")
    run = folder_run(root)
    train(run)
    report, metrics = write_results(run)
    assert metrics["images"] == "training"
    assert "scored on the training images" in metrics_table(metrics)
    text = report.read_text(encoding="utf-8")
    assert "Training images." in text and "Validation images." not in text


def test_scores_of_segmentations_left_out_are_none():
    scores = {"linear": {"accuracy": 50.0, "miou": math.nan}}
    assert summary(scores)["hp"] == {
        "unsupervised": None,
        "kmeans": None,
        "cluster_probe": None,
        "linear": {"accuracy": 50.0, "miou": None},
    }


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("state", None, "it has no 'state'"),
        ("config", None, "it has no 'config'"),
        ("config", "x", "its config is no mapping"),
        ("backbone", None, "it has no 'backbone'"),
        ("state.modules", None, "it has no 'modules'"),
        ("state.modules.head", None, "it has no 'head'"),
        ("config.head.dim", 20, "Error.* for SegmentationHead:\n\tsize mismatch"),
        ("config.new", 1, "config: unknown key `new`"),
        ("state.modules.head.w1.bias", torch.full((8,), math.nan), "head.w1.bias is not finite"),
    ],
)
def test_a_damaged_checkpoint_is_named(finished, tmp_path, path, value, message):
    damaged = copy.deepcopy(finished)
    *inner, last = path.split(".", 3)
    entry = damaged
    for key in inner:
        entry = entry[key]
    if value is None:
        del entry[last]
    else:
        entry[last] = value
    checkpoint.save(tmp_path / "x.pt", damaged)
    with pytest.raises(ValueError, match=f"checkpoint: .*x.pt cannot be used: {message}"):
        open_trained(tmp_path / "x.pt", "cpu")


def test_pools_that_an_import_leaves_empty_are_filled(folder_run):
    run = folder_run()
    run.state.pools.agnostic.vectors.zero_()
    run.save()
    again = open_run(run.config)
    for pool in (again.state.pools.agnostic, again.state.pools.specific):
        torch.testing.assert_close(pool.vectors.norm(dim=1), torch.ones(32))


def test_matching_is_forgotten_when_clusters_are_found_anew(folder_run):
    run = folder_run()
    state = run.state
    state.clusterings.fit(run.train_bank, state.head, 0)
    evaluate(state, run.val_bank, only=["kmeans"])
    assert state.clusterings.matched.tolist() == [False, True, False]
    state.clusterings.fit(run.train_bank, state.head, 0)
    assert not state.clusterings.matched.any()


def test_training_on_forgets_what_was_fitted(folder_run):
    run = folder_run()
    run.state.clusterings.fit(run.train_bank, run.state.head, 0)
    run.state.clusterings.set_assignment(2, torch.arange(6))
    train(run)
    assert not run.state.clusterings.fitted and not run.state.clusterings.matched.any()


@pytest.mark.parametrize("old", [False, True], ids=["flags", "no flags"])
def test_imported_checkpoint_gives_its_probes_only(tiny_config, photo_folder, tmp_path, capsys, old):
    root = photo_folder()
    data = {"name": "folder", "root": str(root), "size": [32, 48], "classes": NAMES}
    config = tiny_config(data=data, backbone={"name": "vit_tiny_patch16_224"})
    backbone = build_backbone(config.backbone, 0, torch.device("cpu"))
    own = TrainingState(config, backbone.features_dim, 8, torch.device("cpu"), 6)
    _, backbone, state = import_state(config, export_state(backbone, own))
    assert (state.clusters, state.classes) == (8, 6)
    contents = {"config": config.model_dump(), "backbone": backbone.state_dict(), "state": state.state_dict()}
    if old:
        del contents["state"]["saw_labels"]
    path = tmp_path / "imported.pt"
    checkpoint.save(path, contents)
    evaluation.main(["--checkpoint", str(path), "--json"])
    scores = strict(capsys.readouterr().out)["hp"]
    assert scores["kmeans"] is None and scores["cluster_probe"] is not None and scores["linear"] is not None
    arguments = ["--checkpoint", str(path), "--images", str(root / "imgs" / "val"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="the k-means centres are not fitted"):
        prediction.main(arguments)
    prediction.main([*arguments, "--segmentation", "cluster_probe"])
    written = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert list(written.values()) == [f"cluster {index}" for index in range(8)]


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_images_of_one_colour_are_refused_in_a_sentence(value):
    with pytest.raises(ValueError, match="training images must differ from one single colour"):
        PatchDictionary(24, 8).fit([torch.full((3, 32, 40), value)] * 3)


def test_images_of_one_colour_each_give_finite_features():
    images = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 32, 40)
    backbone = PatchDictionary(24, 8)
    backbone.fit(list(images))
    assert backbone(images).tokens.isfinite().all()
