"""What the report of a run says of it: positives of anchors, segmentations, where the figures come from."""

import torch

from training import results
from training.results import describe, write_results
from training.run import open_run
from training.train import train


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
