"""Objectives, ablations and the variants that name them."""

import pytest
import torch
import yaml

import hpkernels
from training.config_file import VARIANTS, load_config
from training.data import batch_of_step
from training.run import open_run
from training.train import train_step


@pytest.mark.parametrize("objective", ["views", "clusters", "stego", "none"])
def test_a_baseline_trains_the_head_unless_it_is_frozen(tiny_config, objective):
    run = open_run(tiny_config(loss={"objective": objective, "local": False, "consistency": 0}))
    before = [parameter.clone() for parameter in run.state.head.parameters()]
    terms = train_step(run, batch_of_step(0, len(run.train_bank), 4, 0))
    assert all(term.isfinite() for term in terms.values())
    moved = [not torch.equal(a, b) for a, b in zip(before, run.state.head.parameters(), strict=True)]
    assert bool(moved) == any(moved) == (objective != "none")


def test_ablations_ask_the_op_for_other_positives(tiny_config, monkeypatch):
    asked = []

    def record(z, features, pool, **options):
        asked.append((features.shape[1], len(pool), options["symmetric"]))
        return z.sum()

    monkeypatch.setattr(hpkernels, "ghp_contrastive", record)
    edits = ({}, {"symmetric": False}, {"agnostic": False})
    for number, edit in enumerate(edits):
        run = open_run(tiny_config(f"run{number}", loss=edit))
        train_step(run, batch_of_step(0, len(run.train_bank), 4, 0))
    assert asked == [(24, 32, True), (24, 32, False), (16, 32, True)]  # Df, then D: codes of the EMA head


def test_every_variant_joins_a_preset_and_edits_come_last():
    for name in yaml.safe_load(VARIANTS.read_text()):
        load_config(f"camvid,{name}", [])
    config = load_config("camvid,row_f,stego", ["loss.consistency=0.5"])
    assert (config.loss.objective, config.loss.consistency, config.loss.negative_rate) == ("stego", 0.5, 0.2)
    with pytest.raises(ValueError, match="no variant 'nonsense'"):
        load_config("camvid,nonsense")
