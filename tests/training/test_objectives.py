"""Objectives, ablations and the variants that name them."""

import pytest
import torch
import yaml

from training.config_file import VARIANTS, load_config
from training.data import batch_of_step
from training.objectives import _positives
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


def test_positives_are_symmetric_or_those_of_the_anchor_alone(tiny_config):
    rows = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    pool = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    product, threshold = rows @ rows.T, (rows @ pool.T).amax(dim=1)
    own = (product > threshold[:, None]).fill_diagonal_(False)
    assert not torch.equal(own, own.T)
    for symmetric, expected in ((False, own), (True, own | own.T)):
        run = open_run(tiny_config(f"run{symmetric}", loss={"symmetric": symmetric}))
        assert torch.equal(_positives(run, rows, pool).to_dense(), expected)


def test_every_variant_joins_a_preset_and_edits_come_last():
    for name in yaml.safe_load(VARIANTS.read_text()):
        load_config(f"camvid,{name}", [])
    config = load_config("camvid,row_f,stego", ["loss.consistency=0.5"])
    assert (config.loss.objective, config.loss.consistency, config.loss.negative_rate) == ("stego", 0.5, 0.2)
    with pytest.raises(ValueError, match="no variant 'nonsense'"):
        load_config("camvid,nonsense")
