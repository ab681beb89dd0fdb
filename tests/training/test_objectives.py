"""Objectives, ablations and the variants that name them."""

import pytest
import torch
import yaml
from torch.nn import functional as F

import hpkernels
from training.config_file import VARIANTS, load_config
from training.data import batch_of_step
from training.objectives import feature_correlation
from training.run import open_run
from training.train import encode, load_views, train_step


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

    monkeypatch.setattr(hpkernels.distributed, "ghp_contrastive", record)
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


def test_stego_is_the_published_correlation_loss(tiny_config):
    """A transcription of STEGO's loss for one drawing of points, images and neighbours."""
    run = open_run(tiny_config(loss={"objective": "stego", "local": False, "consistency": 0}, head={"dropout": 0}))
    images = torch.tensor([3, 1, 7, 4])
    views = load_views(run, images, torch.Generator())
    codes = encode(run, views)
    torch.manual_seed(5)
    value = feature_correlation(run, views, codes)

    torch.manual_seed(5)
    grid = run.train_bank.grid
    means = F.normalize(torch.cat([run.train_bank.get(torch.tensor([i])).tokens.mean(dim=1) for i in range(10)]), dim=1)
    nearest = (means @ means.T).fill_diagonal_(-2).argsort(dim=1, descending=True)[:, :7]
    near = nearest[images, torch.randint(7, (4, 1))[:, 0]]
    points, others = torch.rand(4, 11, 11, 2) * 2 - 1, torch.rand(4, 11, 11, 2) * 2 - 1
    tokens = {"own": views.tokens, "near": run.train_bank.get(near).tokens}
    maps = {name: [rows.mT.unflatten(2, grid) for rows in (of, run.state.head(of))] for name, of in tokens.items()}

    def sampled(of, at):
        return [F.normalize(F.grid_sample(m, at, "bilinear", "border", True), dim=1) for m in of]

    def loss(one, two, shift):
        f, c = (torch.einsum("nchw,ncij->nhwij", a, b) for a, b in zip(one, two, strict=True))
        centred = f - f.mean([3, 4], keepdim=True)
        centred = centred - centred.mean() + f.mean()
        return (-c.clamp(0) * (centred - shift)).mean()

    own = sampled(maps["own"], points)
    random = []
    for _ in range(5):
        order = torch.randperm(4)
        order[order == torch.arange(4)] += 1
        random.append(loss(own, sampled([m[order % 4] for m in maps["own"]], others), 0.46))
    expected = 0.67 * loss(own, own, 0.18) + 0.25 * loss(own, sampled(maps["near"], others), 0.12)
    torch.testing.assert_close(value, expected + 0.63 * torch.stack(random).mean())


@pytest.mark.parametrize(
    "edits, message",
    [
        (
            {"loss": {"objective": "clusters"}, "pool": {"size": 4}},
            "`pool.size` must be at least the 6 clusters, got 4",
        ),
        (
            {"loss": {"objective": "stego"}, "batch_size": 1, "data": {"name": "procedural", "train_images": 1}},
            "`loss.objective` stego needs at least 2 training images, got 1",
        ),
    ],
)
def test_objectives_that_the_data_is_too_small_for(tiny_config, tmp_path, edits, message):
    with pytest.raises(ValueError, match=message):
        open_run(tiny_config(**edits))
    assert not (tmp_path / "run").exists()
