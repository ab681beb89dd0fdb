"""The position score, and the precision of positives against labels counted pair by pair."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hpkernels
from training.data import batch_of_step
from training.evaluation.position import position_score
from training.evaluation.precision import discovered, positive_precision
from training.model import patch_classes
from training.run import open_run
from training.schedule import seed_step
from training.train import train


def test_position_decides_nothing_or_everything():
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(5).repeat_interleave(6)  # sky above, road below
    assert position_score(rows.expand(8, -1)) == pytest.approx(100)
    drawn = torch.randint(5, (8, 30), generator=generator)
    assert abs(position_score(drawn)) < 3
    mixed = torch.where(torch.rand(8, 30, generator=generator) < 0.5, rows, drawn)
    assert 10 < position_score(mixed) < 60


def test_position_score_takes_off_what_chance_gives():
    """The formula with the mean over random permutations in the place of the expectation."""
    generator = np.random.default_rng(0)
    clusters = np.where(generator.random((4, 12)) < 0.6, np.arange(12) // 4, generator.integers(3, size=(4, 12)))
    places = np.tile(np.arange(12), (4, 1))

    def information(found):
        joint = np.zeros((3, 12))
        np.add.at(joint, (found, places), 1 / found.size)
        expected = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        return (joint[joint > 0] * np.log(joint[joint > 0] / expected[joint > 0])).sum()

    chance = np.mean([information(generator.permutation(clusters.ravel()).reshape(4, 12)) for _ in range(4000)])
    share = np.bincount(clusters.ravel()) / clusters.size
    entropy = -(share * np.log(share)).sum()
    expected = 100 * (information(clusters) - chance) / (entropy - chance)
    assert position_score(torch.from_numpy(clusters)) == pytest.approx(expected, abs=1.5)
    assert expected > 20


def test_position_score_leaves_out_what_has_no_class_and_says_when_there_is_nothing_to_tell():
    rows = torch.arange(4).repeat(6, 1)
    void = rows.clone()
    void[::2, 1] = -1
    assert position_score(void) == pytest.approx(100)
    assert math.isnan(position_score(rows[:1])) and math.isnan(position_score(torch.zeros(6, 4, dtype=torch.int64)))


def test_the_class_of_a_patch_is_that_of_most_of_its_pixels():
    labels = torch.tensor([[[0, 0, 1, 1], [0, 2, -1, -1], [-1, -1, 2, 2], [-1, 1, 2, 0]]])
    assert patch_classes(labels, (2, 2), 3).tolist() == [[[0, -1], [-1, 2]]]  # of equal shares the first, void before


@pytest.mark.parametrize("preset, symmetric", [("corrected", True), ("corrected", False), ("published", True)])
def test_precision_counts_the_pairs_that_the_loss_sees(tiny_config, preset, symmetric):
    run = open_run(tiny_config(quirks={"preset": preset}, loss={"symmetric": symmetric}, pool={"size": 8}))
    train(run)
    found = positive_precision(run)
    counts = {kind: {where: [0, 0, 0] for where in ("within", "across")} for kind in ("agnostic", "specific")}
    for step in range(run.steps, run.steps + 4):
        images = batch_of_step(step, len(run.train_bank), 4, 0)
        seed_step(0, step)
        masks = discovered(run, images)
        classes = patch_classes(run.train_bank.labels(images), run.train_bank.grid, 6).flatten()
        of_image = torch.arange(4).repeat_interleave(len(classes) // 4)
        for kind, (mask, *_) in masks.items():
            for i, j in mask.to_dense().nonzero().tolist():
                count = counts[kind]["within" if of_image[i] == of_image[j] else "across"]
                count[0] += 1
                if min(classes[i], classes[j]) >= 0:
                    count[1] += 1
                    count[2] += int(classes[i] == classes[j])
    anchors = 4 * len(classes)
    for kind, of_kind in counts.items():
        for where, (number, labelled, right) in of_kind.items():
            assert found[kind][where]["per_anchor"] == pytest.approx(number / anchors)
            assert found[kind][where]["precision"] == pytest.approx(100 * right / labelled) and labelled < number * 1.01
    assert any(of["across"]["per_anchor"] > 0 for of in found.values())


def test_positives_without_dropout_are_those_of_the_frozen_features(tiny_config):
    run = open_run(tiny_config())
    run.state.pools.renew_specific(run.train_bank, run.state.ema_head, torch.Generator().manual_seed(0))
    images = torch.arange(4)
    tokens = run.train_bank.get(images).tokens
    rows = {"agnostic": tokens, "specific": run.state.ema_head.eval()(tokens)}
    pools = {"agnostic": run.state.pools.agnostic(), "specific": run.state.pools.specific()}
    for kind, (mask, *_) in discovered(run, images).items():
        unit = F.normalize(rows[kind], dim=-1).flatten(0, 1)
        threshold = hpkernels.masked_topk(unit, pools[kind]).values[:, 0]
        assert mask == hpkernels.hidden_positives(unit, threshold), kind
