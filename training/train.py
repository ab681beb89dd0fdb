"""Train Hidden Positives: read `train_step` beside the paper, then `train` for what surrounds it.

python -m training.train --config training/configs/camvid.yaml data.root=DIR output=runs/camvid
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hpkernels
from training.backbones.timm_vit import TimmViT
from training.config import Config
from training.config_file import load_config, overview
from training.data import batch_of_step
from training.evaluate import metrics_table
from training.evaluation.validation import validate
from training.model import channel_dropout, to_map, to_rows, update_ema
from training.objectives import current_lambda, objective_term
from training.results import write_results
from training.run import Run, open_run, resolve_device
from training.runtime import parallel
from training.runtime.clock import timed
from training.runtime.output import output_of_run
from training.runtime.program import Parser, add_overrides, expanded, one_sentence, parse_with_overrides
from training.runtime.progress import Progress, named_errors
from training.runtime.stopping import Stopped, Stopping
from training.schedule import renewal_due, seed_step, specific_weight


class Views(NamedTuple):
    """Frozen features of B images: a batch, or this rank's share of it."""

    images: Tensor  # (B,) indices
    share: parallel.Share  # of the batch
    tokens: Tensor  # (B, G, Df), f before normalisation
    features: Tensor  # (B, G, Df), what positives are found by: f, or a draw of its dropout of its own
    weights: Tensor  # (B, 9, H, W), local-propagation weights
    photometric: Tensor | None  # (B, G, Df), f of the photometric view; None without the consistency term


class Codes(NamedTuple):
    """What head and projection make of them."""

    code: Tensor  # (B, G, D), s
    ema: Tensor  # (B, G, D), s', no gradient
    z: Tensor  # (B, G, D), unit rows
    z_mixed: Tensor | None  # (B, G, D), unit rows of the locally propagated codes
    z_photometric: Tensor | None  # (B, G, D), unit rows of the photometric view


def train_step(run: Run, images: Tensor) -> dict[str, Tensor]:
    """One step of Hidden Positives on the images with these indices, of which each rank takes a share.

    Returns:
        the terms of the loss on all of them.
    """
    config, state, bank = run.config, run.state, run.train_bank
    generator = seed_step(config.seed, state.step)
    if renewal_due(state.step, config, run.steps_per_epoch):
        state.pools.renew_specific(bank, state.ema_head, generator)

    views = load_views(run, images, generator)
    codes = encode(run, views)
    terms = {"contrastive": objective_term(run, views, codes)}
    if config.loss.consistency:
        distance = (codes.z - codes.z_photometric).norm(dim=-1).mean()
        terms["consistency"] = config.loss.consistency * parallel.whole(views.share.part * distance)
    terms |= probe_terms(run, views, codes)

    if config.quirks.ema_before_step:
        update_ema(state.ema_head, state.head, config.head.ema)
    optimize(run, sum(terms.values()))
    if not config.quirks.ema_before_step:
        update_ema(state.ema_head, state.head, config.head.ema)
    state.step += 1
    return {name: term.detach() for name, term in terms.items()}


def load_views(run: Run, images: Tensor, generator: torch.Generator) -> Views:
    """Frozen features of this rank's share of the images and of a photometric view of them."""
    config, bank = run.config, run.train_bank
    share = parallel.share(len(images))
    own = share.of(images)
    tokens, weights = bank.get(own)
    photometric = bank.photometric_tokens(images, generator, share) if needs_photometric(config) else None
    features = channel_dropout(tokens, config.head.dropout, config.quirks.dropout_on_frozen, share)
    return Views(own, share, tokens, features, weights, photometric)


def needs_photometric(config: Config) -> bool:
    """Whether the loss compares with a photometric view."""
    return config.loss.consistency > 0 or config.loss.objective == "views"


@timed("head")
def encode(run: Run, views: Views) -> Codes:
    """Codes and projections, in half precision where there is a GPU; results float32."""
    state, bank, share = run.state, run.train_bank, views.share
    state.head.train()
    z_mixed = z_photometric = None
    quirk = run.config.quirks.dropout_on_frozen
    drop = partial(channel_dropout, rate=run.config.head.dropout, training=quirk, share=share)
    with torch.autocast(run.device.type, torch.float16, enabled=run.device.type == "cuda"):
        code = state.head(views.tokens, share)
        z = state.projection(code)
        if run.config.loss.local:
            code_map = to_map(code, bank.grid)
            mixed = hpkernels.apply_local_propagation(
                code_map, views.weights.to(code.dtype), backend=run.config.backend
            )
            z_mixed = state.projection(drop(to_rows(mixed))).float()
        if views.photometric is not None:
            z_photometric = state.projection(state.head(views.photometric, share)).float()
        with torch.no_grad():
            ema = drop(state.ema_head.train(quirk)(views.tokens, share).float())
    return Codes(code.float(), ema, z.float(), z_mixed, z_photometric)


@timed("probes")
def probe_terms(run: Run, views: Views, codes: Codes) -> dict[str, Tensor]:
    """The losses of the probes on all ranks' images; they learn on detached codes."""
    detached = to_map(codes.code.detach(), run.train_bank.grid)
    terms = {"cluster_probe": parallel.whole(views.share.part * run.state.cluster_probe(detached)[0])}
    labels = run.train_bank.labels(views.images)
    if labels is not None:
        labelled = parallel.total((labels >= 0).sum())
        run.state.saw_labels = run.state.saw_labels or bool(labelled)
        terms["linear_probe"] = parallel.whole(run.state.linear_probe.loss(detached, labels, labelled))
    return terms


@timed("optimizer")
def optimize(run: Run, loss: Tensor) -> None:
    """One step of all optimizers, gradients of the head clipped (``clip_grad_norm=0``: as they are)."""
    state = run.state
    for optimizer in state.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    with run.train_bank.clock.part("backward"):
        state.scaler.scale(loss).backward()
    groups = [group for optimizer in state.optimizers.values() for group in optimizer.param_groups]
    parallel.sum_gradients(parameter for group in groups for parameter in group["params"])
    for optimizer in state.optimizers.values():
        state.scaler.unscale_(optimizer)
    if run.config.optim.clip_grad_norm and run.config.loss.objective != "none":
        nn.utils.clip_grad_norm_(state.head.parameters(), run.config.optim.clip_grad_norm)
    for optimizer in state.optimizers.values():
        state.scaler.step(optimizer)
    state.scaler.update()


@torch.no_grad()
def positives_per_anchor(run: Run, images: Tensor) -> float:
    """Mean number of task-agnostic positives of the anchors of the batch of the last step, whose features are there."""
    own = parallel.share(len(images)).of(images)
    features = parallel.gathered(F.normalize(run.train_bank.get(own).tokens, dim=-1)).flatten(0, 1)
    threshold = hpkernels.masked_topk(features, run.state.pools.agnostic(), backend=run.config.backend).values[:, 0]
    positives = hpkernels.hidden_positives(features, threshold, backend=run.config.backend)
    return positives.count().double().mean().item()


def train(run: Run) -> None:
    """Take the steps that are left, logging and saving as configured.

    Raises:
        Stopped: SIGTERM or Ctrl-C asked to; the state is saved.
    """
    config, state = run.config, run.state
    if state.step < run.steps:
        state.clusterings.forget()
    steps = range(state.step, run.steps)
    batches = (parallel.share(config.batch_size).of(batch(run, step)) for step in steps)
    with (
        named_errors(config.output),
        Progress(run) as progress,
        Stopping() as stopping,
        run.train_bank.ahead(batches, views=needs_photometric(config)),
    ):
        while state.step < run.steps:
            step, lam = state.step, current_lambda(run)
            images, last = batch(run, step), step + 1 == run.steps
            logged = step % config.log_every == 0 or last
            with progress.step(timed=logged):
                terms = train_step(run, images)
            if logged:
                progress.log(step, figures_of_step(run, images, terms) | {"lambda": lam})
            state.seconds = progress.seconds
            validate(run, progress)
            stop = parallel.greatest(stopping.number or 0)  # the signal that asked a rank to
            if state.step % config.checkpoint_every == 0 or last or stop:
                progress.flush()  # a step that the state has is never logged again
                run.save()
            if stop:
                parallel.meet()  # torchrun ends all ranks when one ends
                raise Stopped(
                    f"stopped after step {state.step} of {run.steps}, which is saved: the same command goes on",
                    stop,
                )


def batch(run: Run, step: int) -> Tensor:
    """The image indices (B,) of a step."""
    return batch_of_step(step, len(run.train_bank), run.config.batch_size, run.config.seed)


def figures_of_step(run: Run, images: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
    """What is logged of a step: the terms of the loss, their sum that trains the head, and the positives."""
    figures = {name: term.item() for name, term in terms.items()}
    figures["loss"] = figures["contrastive"] + figures.get("consistency", 0.0)
    figures["positives_per_anchor"] = positives_per_anchor(run, images)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(
        "train",
        "Train Hidden Positives on a folder of photographs; go on with a run that was interrupted.",
        epilog=overview(),
    )
    parser.add_argument("--config", required=True, type=expanded, help="a YAML file, or the name of a preset")
    parser.add_argument("--fresh", action="store_true", help="start anew even if the output folder holds a run")
    add_overrides(parser, "edits of the configuration, e.g. loss.local=false; --keys lists all")
    options = parse_with_overrides(parser, arguments)
    with one_sentence("train"), ExitStack() as held:
        config = load_config(options.config, options.overrides)
        with parallel.joined(resolve_device(config.device), config.rank_timeout) as first:
            if first:
                held.enter_context(output_of_run(config))
            run = open_run(config, fresh=options.fresh)
            announce(run)
            train(run)
        if first:  # alone: the other ranks have left
            report, metrics = write_results(run)
            print(f"\n{metrics_table(metrics)}\n\nreport: {report}")
    parallel.end()


def announce(run: Run) -> None:
    """Say what is about to happen."""
    state, grid = run.state, run.train_bank.grid
    begin = f"resuming at step {state.step} of" if state.step else "training for"
    if state.step == run.steps:
        begin = "scoring a run that is finished:"
    elif state.step and run.planned_steps != run.steps:
        was = specific_weight(state.step - 1, run.config.warmup, run.planned_steps)
        now = specific_weight(state.step, run.config.warmup, run.steps)
        print(f"{run.steps} steps instead of {run.planned_steps}: lambda was {was:.2f} and goes on from {now:.2f}")
    backbone = run.config.backbone
    if isinstance(run.backbone, TimmViT) and not (backbone.pretrained or backbone.weights):
        print(
            f"the weights of {backbone.name} are random: `backbone.pretrained=true` downloads them, `backbone.weights`"
            " names a file",
            file=sys.stderr,
        )
    batch, images = run.config.batch_size, len(run.train_bank)
    left_over = f" (each epoch leaves out {images % batch})" if images % batch else ""
    own = [share.stop - share.first for share in parallel.shares(batch)]
    ranks = f", on {len(own)} ranks with {max(own)} or {min(own)} of them" if len(own) > 1 else ""
    print(
        f"{begin} {run.steps} steps of {batch} images ({grid[0]}x{grid[1]} patches) from {images}{left_over}, on"
        f" {run.device}{ranks}, into {run.config.output}"
    )


if __name__ == "__main__":
    main()
