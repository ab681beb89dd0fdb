"""What the report of a run says of it: positives of anchors, segmentations, where the figures come from."""

import pytest
import torch
from torch.nn import functional as F

import hpkernels
from training import results
from training.results import anchor_positives, describe, propagation_weights, write_results
from training.run import open_run
from training.train import train


@pytest.mark.parametrize("symmetric", [True, False])
def test_positives_of_an_anchor_are_searched_in_all_images(tiny_config, symmetric):
    run = open_run(tiny_config(loss={"symmetric": symmetric}))
    features = F.normalize(run.val_bank.get(torch.arange(4)).tokens, dim=-1).flatten(0, 1)
    threshold = hpkernels.masked_topk(features, run.state.pools.agnostic()).values[:, 0]
    limit = torch.minimum(threshold[:, None], threshold) if symmetric else threshold[:, None]
    expected = (features @ features.T > limit).fill_diagonal_(False).unflatten(1, (4, 4, 5))
    found = 0
    for index, shown in enumerate(anchor_positives(run, torch.arange(4))):
        anchor = index * 20 + shown.anchor[0] * 5 + shown.anchor[1]
        own, others = shown.positives[0], shown.positives[1:]
        assert torch.equal(shown.images[0], run.val_bank.data.image(index)) and torch.equal(
            own, expected[anchor, index]
        )
        elsewhere = expected[anchor].flatten(1).sum(dim=1)
        elsewhere[index] = 0
        most = elsewhere.sort(descending=True).values
        assert others.flatten(1).sum(dim=1).tolist() == most[most > 0].tolist()
        possible = expected.view(4, 20, 4, 20).sum(dim=3)[index].clone()
        possible[:, index] = 0
        assert bool(elsewhere.any()) == bool(possible.any()), "an anchor with positives elsewhere, if there is one"
        found += len(others)
    assert found > 2


def test_the_anchor_of_local_propagation_keeps_the_least(tiny_config):
    run = open_run(tiny_config())
    for sample in propagation_weights(run, torch.arange(2)):
        kept = results.kept_fraction(sample.weights)
        assert kept[sample.anchor] == kept.min()


def test_a_report_says_how_its_figures_were_got(tiny_config, photo_folder, monkeypatch):
    monkeypatch.setattr(results, "_commit", lambda: "0123abc-dirty")
    root = photo_folder(images=4)
    (root / "imgs" / "val").rename(root / "imgs_val")
    (root / "labels" / "val").rename(root / "labels_val")
    data = {"name": "folder", "root": str(root), "size": [32, 40], "classes": list("abcdef")}
    run = open_run(tiny_config(data=data))
    train(run)
    report, metrics = write_results(run)
    shown = describe(run, metrics, None)
    assert list(shown.examples[0].maps) == [
        "Label",
        "Baseline",
        "Codes, k-means",
        "Codes, cluster probe",
        "Codes, linear probe",
    ]
    assert shown.facts[1] == (
        "patch_dictionary · trained on 4 images · 4 training images segmented · commit 0123abc-dirty"
    )
    assert "python" in shown.command and shown.facts[0].endswith(" for 6 steps")
    assert all(line in report.read_text(encoding="utf-8") for line in shown.facts)


def test_without_labels_no_probe_of_labels_is_shown(tiny_config, photo_folder):
    data = {"name": "folder", "root": str(photo_folder(labels=False)), "size": [32, 40], "clusters": 4}
    run = open_run(tiny_config(data=data))
    run.state.clusterings.fit(run.train_bank, run.state.head, 0)
    assert list(results.examples(run, torch.arange(1))[0].maps) == [
        "Baseline",
        "Codes, k-means",
        "Codes, cluster probe",
    ]


def test_outside_a_repository_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert results._commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results._commit() is None
