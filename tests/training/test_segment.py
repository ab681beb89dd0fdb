"""Segmentations, and the commands that use a trained run: evaluate and predict."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from training import evaluate as evaluation
from training import predict as prediction
from training.evaluate import metrics_table, summary
from training.model import to_map
from training.results import write_results
from training.run import checkpoint_path, open_run
from training.segment import CLUSTERED, SEGMENTATIONS, segment, to_classes, upsample
from training.train import train


@pytest.fixture
def trained(tiny_config, photo_folder):
    """A trained run on a labelled folder of photographs, its metrics and the folder."""
    root = photo_folder()
    classes = ["a", "b", "c", "d", "e", "f"]
    run = open_run(tiny_config(data={"name": "folder", "root": str(root), "size": [32, 40], "classes": classes}))
    train(run)
    _, metrics = write_results(run)
    return run, metrics, root


def test_probes_segment_as_if_codes_were_interpolated_first(trained):
    run, _, _ = trained
    tokens = run.val_bank.get(torch.arange(3)).tokens
    maps = segment(run.state, tokens, run.val_bank.grid, (32, 40))
    with torch.no_grad():
        codes = upsample(to_map(run.state.head.eval()(tokens), run.val_bank.grid), (32, 40))
        expected = {
            "cluster_probe": run.state.cluster_probe.similarity(codes).argmax(dim=1),
            "linear": run.state.linear_probe(codes).argmax(dim=1),
        }
    for name, pixels in expected.items():
        assert (maps[name] == pixels).double().mean() > 0.999, name


def test_kmeans_segments_patches_by_their_nearest_centre(trained):
    run, _, _ = trained
    tokens, grid = run.val_bank.get(torch.arange(2)).tokens, run.val_bank.grid
    maps = segment(run.state, tokens, grid, grid)
    for name, vectors in (("baseline", tokens), ("kmeans", run.state.head.eval()(tokens).detach())):
        centres = {"baseline": run.state.clusterings.features, "kmeans": run.state.clusterings.codes}[name]
        nearest = torch.cdist(torch.nn.functional.normalize(vectors, dim=-1), centres).argmin(dim=-1)
        assert torch.equal(maps[name].flatten(1), nearest)


def test_clusters_become_the_classes_they_were_matched_to(trained):
    run, _, _ = trained
    for row in range(3):
        run.state.clusterings.set_assignment(row, torch.arange(6).roll(row))
    maps = {name: torch.arange(6)[None] for name in SEGMENTATIONS}
    classes = to_classes(run.state, maps)
    for row, name in enumerate(CLUSTERED):
        assert torch.equal(classes[name][0], run.state.clusterings.assignments[row])
    assert torch.equal(classes["linear"][0], torch.arange(6))


def test_summary_without_labels():
    assert summary(None)["hp"]["unsupervised"] is None
    assert "no labels" in metrics_table(summary(None))


def test_evaluate_command_repeats_the_scores_of_training(trained, capsys):
    run, metrics, root = trained
    path = str(checkpoint_path(run.config))
    evaluation.main(["--checkpoint", path, "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert scores == {key: value for key, value in metrics.items() if key not in ("config", "run", "positives")}
    evaluation.main(["--checkpoint", path, "--root", str(root)])
    assert f"{scores['hp']['linear']['accuracy']:.2f}%" in capsys.readouterr().out
    evaluation.main(["--checkpoint", path, "data.val_images=1", "--json"])
    assert json.loads(capsys.readouterr().out)["hp"]["linear"] != scores["hp"]["linear"]
    with pytest.raises(SystemExit, match="^evaluate: config: `data.size` must be a multiple of the patch size"):
        evaluation.main(["--checkpoint", path, "data.size=35"])


def test_clusters_matched_on_training_images_are_scored_on_validation_images(trained):
    run, metrics, _ = trained
    own = evaluation.evaluate(run.state, run.val_bank)
    assert own["kmeans"]["accuracy"] == pytest.approx(metrics["hp"]["kmeans"]["accuracy"], abs=1e-3)
    evaluation.evaluate(run.state, run.train_bank)
    of_training = run.state.clusterings.assignments.clone()
    scores = evaluation.evaluate(run.state, run.val_bank, match_on=run.train_bank)
    assert torch.equal(run.state.clusterings.assignments, of_training)
    assert scores["kmeans"]["accuracy"] <= own["kmeans"]["accuracy"]
    # The same by hand: rows are classes of the training matching, the last row is of no class.
    pixels = torch.tensor(scores["kmeans"]["confusion"])
    assert pixels.shape == (7, 6) and pixels.sum() == torch.tensor(own["kmeans"]["confusion"]).sum()
    assert scores["kmeans"]["accuracy"] == pytest.approx(100 * pixels.diagonal().sum().item() / pixels.sum().item())
    evaluation.evaluate(run.state, run.val_bank)


def test_evaluate_command_matches_on_training_images(trained, capsys):
    run, metrics, _ = trained
    assert (metrics["matched_on"], metrics["checkpoint"]) == ("validation", "last")
    evaluation.main(["--checkpoint", str(checkpoint_path(run.config)), "evaluation.match=train"])
    assert "clusters matched on the training images; CRF: none; checkpoint: last" in capsys.readouterr().out


def test_predict_command_writes_a_map_and_an_overlay_of_each_image(trained, tmp_path):
    run, _, root = trained
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint_path(run.config)), "--images", str(root / "imgs" / "val")]
    prediction.main([*arguments, "--out", str(out)])
    with Image.open(out / "mosaic_0002.png") as file:
        written = torch.from_numpy(np.array(file)).long()
    assert written.shape == (48, 64), "predictions have the size of the photograph"
    bank = run.val_bank
    maps = segment(run.state, bank.get(torch.tensor([2])).tokens, bank.grid, (48, 64))
    assert torch.equal(written, to_classes(run.state, maps)[evaluation.HEADLINE][0])
    with Image.open(out / "mosaic_0002_overlay.jpg") as file:
        assert file.size == (64, 48)
    assert json.loads((out / "classes.json").read_text()) == dict(zip("012345", "abcdef", strict=True))


@pytest.mark.parametrize("command", [evaluation, prediction], ids=["evaluate", "predict"])
def test_commands_report_mistakes_in_one_sentence(command, tmp_path):
    extra = ["--images", str(tmp_path), "--out", str(tmp_path)] if command is prediction else []
    with pytest.raises(SystemExit, match="checkpoint: there is no file"):
        command.main(["--checkpoint", str(tmp_path / "nothing.pt"), *extra])


def test_predict_needs_images(trained, tmp_path):
    run, _, _ = trained
    (tmp_path / "empty").mkdir()
    arguments = ["--checkpoint", str(checkpoint_path(run.config)), "--images", str(tmp_path / "empty")]
    with pytest.raises(SystemExit, match="there are no .jpg .jpeg .png .* files"):
        prediction.main([*arguments, "--out", str(tmp_path / "out")])
