"""One step of the published code, traced number by number with fixed draws: an independent transcription in float64.

Facts are those of hynnsk/HP (run.py, loss.py, DinoFeaturizer.py): which dropout acts where, when the EMA head
moves, what is clipped, how lambda rises.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

import hpkernels
from training import model, pools, train
from training.data import batch_of_step
from training.pools import draw_patches
from training.run import open_run
from training.schedule import seed_step
from training.train import train_step

STEP = 5  # of 6, past a warmup of 2, and the second of its epoch, so that the pool is renewed
CLIP = 0.05
# Dropout masks by their order in the step, and what each is for.
MASKS = (
    "pool w1",
    "pool w2",
    "pool out",
    "f",
    "w1",
    "w2",
    "mixed",
    "view w1",
    "view w2",
    "ema w1",
    "ema w2",
    "ema out",
)


class Step(NamedTuple):
    """Everything a step is given and everything it leaves, by name."""

    given: dict
    left: dict


@pytest.fixture
def traced(tiny_config, monkeypatch):
    """Take one step of a run with fixed draws; arguments are edits of the quirks."""

    def take(**quirks):
        run = open_run(
            tiny_config(
                "-".join(quirks) or "published",
                quirks={"preset": "published"} | quirks,
                optim={"clip_grad_norm": CLIP},
                pool={"size": 96, "renew_every": 1},
                loss={"negative_rate": 0.2},
            )
        )
        run.state.step = STEP
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # not the head itself, as at the start of a run
            for parameter in run.state.ema_head.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        images = batch_of_step(STEP, len(run.train_bank), 4, 0)
        anchors = 4 * run.train_bank.anchors_per_image
        negatives = torch.rand(run.train_bank.anchors_per_image, anchors, generator=generator) < 0.2
        view = run.train_bank.get(images).tokens + 0.1 * torch.randn(4, anchors // 4, 24, generator=generator)
        drawn, gradients = [], {}

        def dropout(features, rate, training=True, share=None):
            if not (training and rate):
                return features
            mask = (torch.rand(len(features), 1, features.shape[2], generator=generator) >= rate) / (1 - rate)
            drawn.append(mask)
            return features * mask

        for module in (model, pools, train):
            monkeypatch.setattr(module, "channel_dropout", dropout)
        several = hpkernels.distributed
        op = several.ghp_contrastive
        with monkeypatch.context() as patch:
            patch.setattr(several, "ghp_contrastive", lambda *rows, **rest: op(*rows, **rest, negatives=negatives))
            patch.setattr(run.train_bank, "photometric_tokens", lambda *_: view)
            for name in ("head", "projection", "linear_probe", "cluster_probe"):
                step = run.state.optimizers[name].step

                def watch(*rest, name=name, step=step, **keywords):
                    gradients[name] = [p.grad.double().clone() for p in getattr(run.state, name).parameters()]
                    return step(*rest, **keywords)

                patch.setattr(run.state.optimizers[name], "step", watch)
            before = copy.deepcopy(run.state.modules)
            terms = train_step(run, images)
        given = {"run": run, "images": images, "negatives": negatives, "view": view.double(), "masks": drawn}
        left = {"terms": terms, "gradients": gradients, "modules": run.state.modules}
        return Step(given | {"modules": {name: module.double() for name, module in before.items()}}, left)

    return take


def published_contrastive(z, z_mixed, f, s, pool_f, pool_s, negatives, lam, temperature):
    """loss.py, version 1 with reweighting, on unit rows; images one after another."""
    group, anchors = negatives.shape
    limit_f, limit_s = (f @ pool_f.T).amax(dim=1), (s @ pool_s.T).amax(dim=1)
    total = z.new_zeros(())
    for first in range(0, anchors, group):
        own = slice(first, first + group)
        other = torch.ones(group, anchors, dtype=torch.bool)
        other[torch.arange(group), torch.arange(first, first + group)] = False
        agnostic, specific = (
            ((rows[own] @ rows.T > limit[own, None]) | (rows[own] @ rows.T > limit[None])) & other
            for rows, limit in ((f, limit_f), (s, limit_s))
        )
        denominator = (agnostic | negatives) & other
        kept = agnostic.any(dim=1)
        weights = (agnostic.double() + lam * specific.double())[kept]
        number = weights.sum(dim=1)
        for rows in (z, z_mixed):
            logits = rows[own] @ rows.T / temperature
            logits = logits - logits.amax(dim=1, keepdim=True).detach()
            log_probability = logits - (logits.exp() * denominator).sum(dim=1, keepdim=True).log()
            of_anchor = (weights * log_probability[kept]).sum(dim=1) / number
            total = total - (temperature / 0.07 * of_anchor * number / number.mean()).mean()
    return total / (anchors // group) / 2


def published_step(given):
    """The terms, gradients after the clip, and the state after the step."""
    run, images = given["run"], given["images"]
    masks = {name: mask.double() for name, mask in zip(MASKS, given["masks"], strict=True)}
    modules = given["modules"]
    head, ema, projection = modules["head"], modules["ema_head"], modules["projection"]
    bank = run.train_bank
    tokens, local = (part.double() for part in bank.get(images))
    height, width = bank.grid

    def code_of(weights, rows, name):
        return weights.w1(rows * masks[f"{name}w1"]) + weights.w3(F.relu(weights.w2(rows * masks[f"{name}w2"])))

    with torch.no_grad():
        chosen, places = draw_patches(len(bank), height * width, 96, seed_step(0, STEP))
        patches = bank.patches(chosen, places).double()[:, None]
        pool_s = F.normalize((code_of(ema, patches, "pool ") * masks["pool out"])[:, 0], dim=1)
        s_ema = code_of(ema, tokens, "ema ") * masks["ema out"]
        f = F.normalize((tokens * masks["f"]).flatten(0, 1), dim=1)
        s_ema = F.normalize(s_ema.flatten(0, 1), dim=1)
    code = code_of(head, tokens, "")
    padded = F.pad(code.mT.unflatten(2, (height, width)), (1, 1, 1, 1))
    cells = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    mixed = sum(local[:, None, cell] * values for cell, values in enumerate(cells)).flatten(2).mT
    z, z_mixed, z_view = (
        F.normalize(projection.linear(rows).flatten(0, 1), dim=1)
        for rows in (code, mixed * masks["mixed"], code_of(head, given["view"], "view "))
    )
    config = run.config
    lam = (STEP - config.warmup) / (run.steps - config.warmup)
    pool_f = modules["agnostic_pool"].vectors
    detached = code.detach().mT.unflatten(2, (height, width))
    centres = F.normalize(modules["cluster_probe"].clusters, dim=1)
    cosine = torch.einsum("bdhw,cd->bchw", F.normalize(detached, dim=1), centres)
    labels = torch.stack([bank.data.label(int(index)) for index in images])
    logits = F.interpolate(modules["linear_probe"](detached), labels.shape[1:], mode="bilinear")
    contrastive = published_contrastive(
        z, z_mixed, f, s_ema, pool_f, pool_s, given["negatives"], lam, config.loss.temperature
    )
    terms = {
        "contrastive": contrastive,
        "consistency": 0.05 * F.pairwise_distance(z, z_view).mean(),
        "cluster_probe": -cosine.amax(dim=1).mean(),
        "linear_probe": F.cross_entropy(logits, labels, ignore_index=-1),
    }
    names = ("head", "projection", "linear_probe", "cluster_probe")
    parameters = {name: list(modules[name].parameters()) for name in names}
    flat = iter(torch.autograd.grad(sum(terms.values()), [p for name in names for p in parameters[name]]))
    gradients = {name: [next(flat) for _ in parameters[name]] for name in names}
    norm = torch.cat([gradient.flatten() for gradient in gradients["head"]]).norm()
    assert norm > CLIP
    gradients["head"] = [gradient * CLIP / (norm + 1e-6) for gradient in gradients["head"]]
    rates, decay = {"head": 5e-4, "projection": 5e-4, "linear_probe": 1e-3, "cluster_probe": 5e-3}, {"head": 0.1}
    after = {
        name: [
            # The first step of Adam, whose moments are the gradient and its square.
            p * (1 - rates[name] * decay.get(name, 0)) - rates[name] * g / (g.abs() + 1e-8)
            for p, g in zip(parameters[name], gradients[name], strict=True)
        ]
        for name in names
    }
    momentum = config.head.ema
    pairs = zip(ema.parameters(), head.parameters(), strict=True)
    after["ema_head"] = [momentum * average + (1 - momentum) * current for average, current in pairs]
    after["specific_pool"], after["agnostic_pool"] = [pool_s], [pool_f]
    return terms, gradients, after


def differences(step):
    """The names of all numbers in which the step differs from the published one."""
    terms, gradients, after = published_step(step.given)
    found = {f"term {name}": (value, step.left["terms"][name]) for name, value in terms.items()}
    for name, values in gradients.items():
        for index, value in enumerate(values):
            found[f"gradient {name}.{index}"] = value, step.left["gradients"][name][index]
    for name, values in after.items():
        module = step.left["modules"][name]
        own = list(module.parameters()) or [module.vectors]
        for index, value in enumerate(values):
            found[f"after {name}.{index}"] = value, own[index]
    assert found.keys() >= {"term consistency", "gradient head.5", "after ema_head.0", "after specific_pool.0"}

    def differs(expected, own):
        error = (expected.detach() - own.detach().double()).norm() / expected.detach().norm().clamp(min=1e-12)
        return error > 2e-5

    return [name for name, pair in found.items() if differs(*pair)]


def test_a_step_of_the_published_preset_is_that_of_the_published_code(traced):
    assert differences(traced()) == []


@pytest.mark.parametrize("quirk", ["ema_before_step", "late_lambda", "drop_specific_only_anchors"])
def test_without_a_quirk_the_step_is_another(traced, quirk):
    assert differences(traced(**{quirk: False}))


def test_the_quirk_of_dropout_draws_masks_that_the_paper_does_not(traced):
    assert len(traced().given["masks"]) == len(MASKS)
    assert len(traced(dropout_on_frozen=False).given["masks"]) == 4  # of the head alone: codes and their view
