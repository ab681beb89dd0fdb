"""Train a ViT from scratch on photographs without labels: read `pretrain_step`, then what surrounds it.

python -m training.pretrain --config pretrain_camvid data.root=DIR output=FOLDER
python -m training.train --config camvid data.root=DIR backbone.name=NAME backbone.weights=FOLDER/backbone.safetensors
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack

import torch
from torch import nn

from training.config_file import load_config, overview
from training.model import update_ema
from training.pretraining.distillation import assign, distillation_loss, health, hide, tokens_at
from training.pretraining.progress import PretrainingLog
from training.pretraining.run import Pretraining, check_config, open_pretraining
from training.pretraining.state import PretrainingState, learning_rate, momentum
from training.pretraining.views import draw_views, matches, render
from training.runtime.output import output_of_run
from training.runtime.program import Parser, add_overrides, expanded, one_sentence, parse_with_overrides
from training.runtime.progress import named_errors
from training.runtime.stopping import Stopped, Stopping
from training.schedule import seed_step

_WARM, _TIMED = 5, 20  # steps that are taken to find out how many fit into `pretraining.minutes`


def pretrain_step(run: Pretraining, state: PretrainingState, steps: int, *, logged: bool = False) -> dict[str, float]:
    """One of `steps` steps of self-distillation; figures if it is `logged`, for which a GPU is waited for."""
    settings, device = run.config.pretraining, run.device
    generator = seed_step(run.config.seed, state.step)
    done = (state.step + 0.5) / steps

    photographs = run.photographs[run.batch(state.step)]
    drawn = draw_views(len(photographs), run.grid, settings.least_scale, settings.mask, generator)
    places, matched = matches(drawn, run.grid)
    rows = matched.flatten().nonzero()[:, 0].to(device, non_blocking=True)
    views = state.backbone.normalize(render(photographs, drawn, settings.crop))

    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        with torch.no_grad():
            seen = state.teacher.tokens(views)
            at_places = tokens_at(seen, places.to(device, non_blocking=True)).flatten(0, 1)
            targets = assign(state.teacher.cosines(at_places[rows]), settings.teacher_temperature)
        tokens = state.student.tokens(hide(views, drawn.hidden.to(device, non_blocking=True)))
        scores = state.student.cosines(tokens.flatten(0, 1)[rows])
    loss = distillation_loss(scores, targets, settings.temperature)

    rate = learning_rate(done, settings.peak_lr, settings.warmup)
    optimize(state, loss, rate, settings.clip_grad_norm)
    update_ema(state.teacher, state.student, momentum(done, settings.ema))
    state.step += 1
    if not logged:
        return {}
    return {"loss": loss.item(), **health(seen, scores.detach(), settings.temperature), "lr": rate}


def optimize(state: PretrainingState, loss: torch.Tensor, rate: float, most: float) -> None:
    """One step of the optimizer with this learning rate; gradients are clipped to the norm `most`, or with 0 not."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if most:
        nn.utils.clip_grad_norm_(state.student.parameters(), most)
    state.optimizer.step()


def pretrain(run: Pretraining) -> None:
    """Take the steps that are left, logging and saving as configured.

    Raises:
        Stopped: SIGTERM or Ctrl-C asked to; the state is saved.
        ValueError: the loss is not finite any more.
    """
    config, state = run.config, run.state
    with named_errors(config.output), PretrainingLog(run) as log, Stopping() as stopping:
        while state.step < run.steps:
            step, last = state.step, state.step + 1 == run.steps
            logged = step % config.log_every == 0 or last
            figures = pretrain_step(run, state, run.steps, logged=logged)
            log.count()
            if logged:
                if not math.isfinite(figures["loss"]):
                    raise ValueError(
                        f"the loss of step {step} is {figures['loss']}: start anew with --fresh and a smaller"
                        f" `pretraining.peak_lr` than {config.pretraining.peak_lr}"
                    )
                log.write(step, figures)
            if state.step % config.checkpoint_every == 0 or last or stopping.number:
                run.save()
            if stopping.number:
                raise Stopped(
                    f"stopped after step {state.step} of {run.steps}, which is saved: the same command goes on",
                    stopping.number,
                )


def steps_in(minutes: float, run: Pretraining) -> int:
    """About how many steps the device takes in so many minutes, by some steps of a state that is thrown away."""
    trial = PretrainingState(run.config, run.device)
    for number in range(_WARM + _TIMED):
        if number == _WARM:
            begin = _now(run.device)
        pretrain_step(run, trial, _WARM + _TIMED)
    return max(1, int(60 * minutes * _TIMED / (_now(run.device) - begin)))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(
        "pretrain",
        "Train a ViT from scratch on photographs without labels; go on with a run that was interrupted.",
        epilog=overview(),
    )
    parser.add_argument("--config", required=True, type=expanded, help="a YAML file, or the name of a preset")
    parser.add_argument("--fresh", action="store_true", help="start anew even if the output folder holds a run")
    add_overrides(parser, "edits of the configuration, e.g. pretraining.minutes=10; --keys lists all")
    options = parse_with_overrides(parser, arguments)
    with one_sentence("pretrain"), ExitStack() as held:
        config = load_config(options.config, options.overrides)
        check_config(config)
        held.enter_context(output_of_run(config))
        run = open_pretraining(config, fresh=options.fresh)
        if not run.steps:
            run.steps = steps_in(config.pretraining.minutes, run)
        announce(run)
        pretrain(run)
        weights = run.write_weights()
        print(f"\nweights: {weights}\nuse them: backbone.name={config.backbone.name} backbone.weights={weights}")


def announce(run: Pretraining) -> None:
    """Say what is about to happen."""
    config, state = run.config, run.state
    begin = f"resuming at step {state.step} of" if state.step else "pretraining for"
    minutes = config.pretraining.minutes
    why = "" if minutes is None else f", about {minutes:g} minutes here (steps={run.steps} repeats them)"
    print(
        f"{begin} {run.steps} steps{why} of {config.batch_size} photographs from {len(run.photographs)}, two crops of"
        f" {run.grid[0]}x{run.grid[1]} patches of each, on {run.device}, into {config.output}"
    )


if __name__ == "__main__":
    main()
