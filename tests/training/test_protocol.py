"""How images are scored: mirrored images, windows, neighbours, and what comes before a CRF."""

import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import nn
from torch.nn import functional as F

from training import evaluate as evaluation
from training import predict as prediction
from training.backbones.base import Backbone, PatchFeatures
from training.config import EvaluationConfig
from training.config_file import edited
from training.evaluation.crf import refined
from training.evaluation.neighbours import knn_scores
from training.features.inference import Windows, features_of, fitted_size
from training.model import patch_classes, to_map
from training.predict import predict
from training.results import write_results
from training.run import checkpoint_path, open_run, scoring_windows
from training.segment import SEGMENTATIONS, log_probabilities, segment
from training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from tiny import tiny_values

    from training.config_file import config_from_dict

    run = open_run(config_from_dict(tiny_values(tmp_path_factory.mktemp("protocol") / "run")))
    train(run)
    write_results(run)
    return run


class Plain(Backbone):
    """Tokens are the mean colours of patches and where they lie in what the backbone is shown."""

    features_dim, patch_size, prefix_tokens = 5, 4, 0

    def normalize(self, images):
        return images

    def forward(self, images):
        colours = F.avg_pool2d(images, 4)
        height, width = colours.shape[2:]
        places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
        tokens = torch.cat([colours, places.expand(len(images), -1, -1, -1)], dim=1).flatten(2).mT
        return PatchFeatures(tokens, tokens[:, None], tokens[:, None])


def test_windows_average_what_overlaps():
    pixels = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    whole = features_of(Plain(), pixels)
    assert torch.equal(features_of(Plain(), pixels, windows=Windows(28, 8)).tokens, whole.tokens), "no larger"
    found = features_of(Plain(), pixels, windows=Windows(12, 8))
    assert found.weights.shape == (2, 9, 5, 7)
    maps, expected = to_map(found.tokens, (5, 7)), to_map(whole.tokens, (5, 7))
    torch.testing.assert_close(maps[:, :3], expected[:, :3])  # colours are the same in every window
    # Windows of 3 patches begin at rows 0 and 2, and at columns 0, 2 and 4.
    assert maps[0, 3, :, 0].tolist() == [0, 1, (2 + 0) / 2, 1, 2]
    assert maps[0, 4, 0].tolist() == [0, 1, (2 + 0) / 2, 1, (2 + 0) / 2, 1, 2]


def test_the_last_window_ends_with_the_image():
    pixels = torch.rand(1, 3, 12, 32, generator=torch.Generator().manual_seed(0))
    found = to_map(features_of(Plain(), pixels, weights=False, windows=Windows(12, 12)).tokens, (3, 8))
    assert found[0, 4, 0].tolist() == [0, 1, 2, 0, 1, (2 + 0) / 2, 1, 2]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"window": 20}, "`evaluation.window` must be a multiple of the patch size 8, got 20"),
        ({"window": 16, "stride": 12}, "`evaluation.stride` must be a multiple of the patch size 8, got 12"),
        ({"window": 16, "stride": 24}, "`evaluation.stride` must be at most the window, 16, got 24"),
        ({"stride": 8}, "`evaluation.stride` needs an `evaluation.window`, got 8 alone"),
    ],
)
def test_windows_that_do_not_fit(tiny_config, values, message):
    with pytest.raises(ValueError, match=message):
        open_run(tiny_config(evaluation=values))


def test_validation_images_are_cut_into_windows(tiny_config):
    run = open_run(tiny_config(evaluation={"size": [48, 56], "window": 24, "stride": 16}))
    expected = features_of(
        run.backbone, torch.stack([run.val_bank.data.image(1)]).float() / 255, windows=Windows(24, 16)
    )
    found = run.val_bank.get(torch.tensor([1]))
    torch.testing.assert_close(found.tokens, expected.tokens)
    assert run.train_bank.windows is None


def test_mirrored_images_are_averaged(run):
    bank, images = run.val_bank, torch.arange(3)
    tokens, mirrored = bank.get(images).tokens, bank.mirrored_tokens(images)
    plain = segment(run.state, tokens, bank.grid, bank.data.size)
    both = segment(run.state, tokens, bank.grid, bank.data.size, mirrored=mirrored)
    # The mirrored image with itself mirrored: the same map mirrored, whatever is averaged.
    turned = segment(run.state, mirrored, bank.grid, bank.data.size, mirrored=tokens)
    for name in SEGMENTATIONS:
        assert (both[name] != turned[name].flip(2)).double().mean() < 0.01, name
    assert any(not torch.equal(plain[name], both[name]) for name in SEGMENTATIONS)
    head = run.state.head.eval()
    codes = (to_map(head(tokens), bank.grid) + to_map(head(mirrored), bank.grid).flip(3)) / 2
    logits = F.interpolate(run.state.linear_probe(codes), bank.data.size, mode="bilinear")
    assert (both["linear"] == logits.argmax(dim=1)).double().mean() > 0.999
    scores = [
        evaluation.evaluate(run.state, bank, ["linear"], how=EvaluationConfig(flip=flip)) for flip in (False, True)
    ]
    assert scores[0]["linear"] != scores[1]["linear"]


def test_log_probabilities_are_those_of_the_published_evaluation(run):
    bank, images = run.val_bank, torch.arange(2)
    tokens, size = bank.get(images).tokens, bank.data.size
    codes = F.interpolate(to_map(run.state.head.eval()(tokens), bank.grid), size, mode="bilinear", align_corners=False)
    cosine = torch.einsum(
        "bdhw,cd->bchw", F.normalize(codes, dim=1), F.normalize(run.state.cluster_probe.clusters, dim=1)
    )
    expected = {"linear": run.state.linear_probe(codes).log_softmax(1), "cluster_probe": (2 * cosine).log_softmax(1)}
    for name, values in expected.items():
        found = log_probabilities(run.state, tokens, bank.grid, size, name)
        torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-4)


def test_a_crf_changes_the_scores_and_is_told(run, capsys):
    path = str(checkpoint_path(run.config))
    evaluation.main(["--checkpoint", path, "evaluation.crf=exact"])
    refined = capsys.readouterr().out
    evaluation.main(["--checkpoint", path])
    plain = capsys.readouterr().out
    assert "CRF: exact" in refined and "CRF: none" in plain
    assert refined.replace("CRF: exact", "CRF: none") != plain


def test_neighbours_vote(run):
    """Against a loop over patches and sorted similarities, with all training patches."""
    found = knn_scores(run.state, run.train_bank, run.val_bank, 5, seed=0)
    train_images, val_images = torch.arange(len(run.train_bank)), torch.arange(len(run.val_bank))
    labels = patch_classes(run.train_bank.labels(train_images), run.train_bank.grid, 6).flatten()
    for name, of in {"baseline": nn.Identity(), "hp": run.state.head.eval()}.items():
        keys = F.normalize(of(run.train_bank.get(train_images).tokens), dim=-1).flatten(0, 1)[labels >= 0]
        queries = F.normalize(of(run.val_bank.get(val_images).tokens), dim=-1)
        shares = torch.zeros(*queries.shape[:2], 6)
        for image, rows in enumerate(queries):
            for patch, row in enumerate(rows):
                nearest = (keys @ row).argsort(descending=True)[:5]
                for vote in labels[labels >= 0][nearest].tolist():
                    shares[image, patch, vote] += 0.2
        prediction = F.interpolate(to_map(shares, run.val_bank.grid), run.val_bank.data.size, mode="bilinear").argmax(1)
        truth = run.val_bank.labels(val_images)
        prediction, truth = prediction[truth >= 0].numpy(), truth[truth >= 0].numpy()
        assert found[name]["accuracy"] == pytest.approx(100 * (prediction == truth).mean(), abs=1)
        assert found[name]["miou"] == pytest.approx(100 * jaccard_score(truth, prediction, average="macro"), abs=1)


@pytest.mark.parametrize("neighbours", [1, 1000])
def test_no_patch_is_voted_for_by_its_own_image(run, neighbours):
    """Where training images are scored, the nearest patch of all is the patch itself."""
    bank, images = run.train_bank, torch.arange(len(run.train_bank))
    itself = knn_scores(run.state, bank, bank, 1, seed=0)["baseline"]["accuracy"]
    found = knn_scores(run.state, bank, bank, neighbours, seed=0, same_images=True)
    rows = F.normalize(bank.get(images).tokens, dim=-1)
    labels = patch_classes(bank.labels(images), bank.grid, 6).flatten(1)
    shares = torch.zeros(*rows.shape[:2], 6)
    for image in images:
        others, known = images != image, labels[images != image] >= 0
        products = rows[image] @ rows[others][known].T
        nearest = products.topk(min(neighbours, products.shape[1])).indices
        shares[image] = F.one_hot(labels[others][known][nearest], 6).double().mean(dim=1).float()
    prediction = F.interpolate(to_map(shares, bank.grid), bank.data.size, mode="bilinear").argmax(1)
    truth = bank.labels(images)
    right = (prediction == truth)[truth >= 0].double().mean().item()
    assert found["baseline"]["accuracy"] == pytest.approx(100 * right, abs=1)
    assert found["baseline"]["accuracy"] < itself - 3


@pytest.mark.parametrize("images, same", [("training", True), ("validation", False)])
def test_the_scores_say_whether_images_vote_for_themselves(run, monkeypatch, images, same):
    asked = []
    monkeypatch.setattr(evaluation, "images_scored", lambda config: images)
    monkeypatch.setattr(evaluation, "knn_scores", lambda *_, same_images: asked.append(same_images))
    config = run.config.model_copy(update={"evaluation": EvaluationConfig(knn=3)})
    metrics = evaluation.score(config, run.state, run.train_bank, run.val_bank)[0]
    assert asked == [same]
    assert metrics["hp"]["knn"] is None and metrics["baseline"]["knn"] is None
    assert "no row of neighbours: no patch of the training images has a label" in evaluation.metrics_table(metrics)


@pytest.mark.parametrize("labels, kept", [("labels", "best-on-val"), ("void", "last"), ("none", "last")])
def test_the_checkpoint_is_the_best_only_where_labels_chose_it(tiny_config, photo_folder, labels, kept):
    root = photo_folder(labels=labels != "none")
    if labels == "void":
        for file in (root / "labels" / "val").iterdir():
            Image.new("L", (64, 48), 255).save(file)
    data = {"name": "folder", "root": str(root), "size": [32, 40], "classes": list("abcdef")}
    run = open_run(tiny_config(data=data, quirks={"select_on_labels": True}))
    train(run)
    assert run.best_path.is_file() == (kept == "best-on-val")
    metrics = write_results(run)[1]
    assert metrics["checkpoint"] == kept
    assert (metrics["matched_on"] is None) == (labels == "none")


@pytest.mark.parametrize("void", [True, False])
def test_clusters_are_not_scored_without_labels_to_match_them_by(tiny_config, photo_folder, capsys, void):
    root = photo_folder()
    data = {"name": "folder", "root": str(root), "size": [32, 40], "classes": list("abcdef")}
    run = open_run(tiny_config(data=data))
    train(run)
    write_results(run)
    for file in (root / "labels" / "train").iterdir():
        if void:
            Image.new("L", (64, 48), 255).save(file)
        else:
            file.unlink()
    evaluation.main(["--checkpoint", str(checkpoint_path(run.config)), "evaluation.match=train"])
    out = capsys.readouterr().out
    assert "no rows of clusters: no training image has a label to match them by" in out
    assert "linear probe (trained with labels)" in out and "cluster probe" not in out


def test_frozen_codes_are_scored_and_segmented(tiny_config, photo_folder, tmp_path, monkeypatch, capsys):
    """From a folder as one writes it on a command line, relative to where one is."""
    photo_folder(name="photos")
    monkeypatch.chdir(tmp_path)
    data = {"name": "folder", "root": "photos", "size": [32, 40], "classes": list("abcdef")}
    run = open_run(tiny_config(data=data, loss={"objective": "none", "local": False, "consistency": 0}))
    train(run)
    write_results(run)
    path = str(checkpoint_path(run.config))
    evaluation.main(["--checkpoint", path, "--root", "photos"])
    assert "linear probe (trained with labels)" in capsys.readouterr().out
    prediction.main(["--checkpoint", path, "--images", "photos/imgs/val", "--out", "maps"])
    assert (tmp_path / "maps" / "mosaic_0000.png").is_file()


def test_an_edit_of_the_size_that_changes_nothing_is_refused(tiny_config):
    run = open_run(tiny_config(evaluation={"size": [48, 56]}))
    run.save()
    with pytest.raises(
        SystemExit, match="`data.size` changes nothing here, as the checkpoint has `evaluation.size` 48"
    ):
        evaluation.main(["--checkpoint", str(checkpoint_path(run.config)), "data.size=32"])


def test_neighbours_are_in_the_table(run, capsys):
    evaluation.main(["--checkpoint", str(checkpoint_path(run.config)), "evaluation.knn=3"])
    out = capsys.readouterr().out
    assert "neighbours in the features (with labels)" in out and "neighbours in the codes (with labels)" in out


@pytest.mark.parametrize(
    "photograph, windows, expected",
    [
        ((60, 90), None, (32, 40)),
        ((60, 90), Windows(16, 8), (32, 48)),
        ((90, 60), Windows(16, 8), (48, 32)),
        ((10, 10000), Windows(16, 8), (32, 256)),
    ],
)
def test_windows_keep_the_shape_of_a_photograph(photograph, windows, expected):
    assert fitted_size(photograph, (32, 40), windows, 8) == expected


@pytest.mark.parametrize("edits", [{"flip": True}, {"window": 16, "stride": 8, "flip": True}, {"crf": "exact"}])
def test_a_photograph_is_predicted_as_it_is_scored(run, tmp_path, edits):
    """With the shape of the validation images, a prediction is the map that `evaluate` counts."""
    image = run.val_bank.data.image(1)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    values = {f"evaluation.{key}": value for key, value in edits.items()}
    config = edited(run.config, [f"{key}={value}" for key, value in values.items()], values)
    found = predict(config, run.backbone, run.state, tmp_path / "a.png", "linear").classes
    pixels = image[None].float() / 255
    windows = scoring_windows(config, run.backbone)
    tokens, mirrored = (features_of(run.backbone, of, windows=windows).tokens for of in (pixels, pixels.flip(3)))
    mirrored = mirrored if config.evaluation.flip else None
    grid, size = run.val_bank.grid, run.val_bank.data.size
    if config.evaluation.crf == "none":
        expected = segment(run.state, tokens, grid, size, ["linear"], mirrored)["linear"][0]
    else:
        logs = log_probabilities(run.state, tokens, grid, size, "linear", mirrored)
        expected = refined("exact", image[None], {"a": logs})["a"].argmax(dim=1)[0]
    assert torch.equal(found.long(), expected)
    plain = predict(run.config, run.backbone, run.state, tmp_path / "a.png", "linear").classes
    assert not torch.equal(found, plain)


def test_predict_takes_edits(run, tmp_path, photo_folder):
    root = photo_folder(images=1)
    arguments = ["--checkpoint", str(checkpoint_path(run.config)), "--images", str(root / "imgs" / "val")]
    prediction.main([*arguments, "--out", str(tmp_path / "out"), "evaluation.window=16", "evaluation.crf=exact"])
    with Image.open(tmp_path / "out" / "mosaic_0000.png") as file:
        assert file.size == (64, 48)
    with pytest.raises(SystemExit, match="^predict: config: `evaluation.window` must be a multiple"):
        prediction.main([*arguments, "--out", str(tmp_path / "other"), "evaluation.window=20"])


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_log_probabilities_in_bands(run, monkeypatch, name):
    bank = run.val_bank
    arguments = run.state, bank.get(torch.arange(2)).tokens, bank.grid, (33, 41), name
    whole = log_probabilities(*arguments)
    monkeypatch.setattr("training.segment._BAND_NUMBERS", 3000)
    torch.testing.assert_close(log_probabilities(*arguments), whole)
