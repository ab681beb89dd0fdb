"""What a run tells while it trains."""

import json
import math
import time

import pytest
import torch

from training import train as loop
from training.features import bank as features
from training.run import open_run
from training.runtime.clock import Clock
from training.runtime.progress import LOG
from training.train import positives_per_anchor, train, train_step


def logged(run):
    return [json.loads(line) for line in (run.checkpoint_path.parent / LOG).read_text().splitlines()]


def test_each_logged_step_is_a_line_with_its_figures_and_its_speed(tiny_config):
    run = open_run(tiny_config(log_every=2))
    train(run)
    lines = logged(run)
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    for line, figures in zip(lines, run.state.history, strict=True):
        assert figures.items() <= line.items()
        assert line["anchors_per_second"] == pytest.approx(20 * line["images_per_second"], rel=1e-3)
        assert line["images_per_second"] > 0 and line["memory_gb"] > 0
        parts = line["seconds"]
        assert {"data", "head", "loss", "probes", "backward", "optimizer", "other"} <= parts.keys()
        assert line["loss_share"] == pytest.approx(parts["loss"] / sum(parts.values()), abs=1e-3)
        assert all(math.isfinite(seconds) and seconds >= 0 for seconds in parts.values())
    assert "pools" in lines[0]["seconds"] and "pools" not in lines[-1]["seconds"]


def test_speed_is_no_part_of_the_history_which_resume_restores(tiny_config):
    run = open_run(tiny_config())
    train(run)
    assert not {"images_per_second", "seconds"} & run.state.history[0].keys()


def test_a_resumed_run_has_every_step_once(tiny_config, monkeypatch):
    run = open_run(tiny_config(checkpoint_every=2))
    step = loop.train_step

    def killed(run, images):
        if run.state.step == 5:
            raise KeyboardInterrupt
        return step(run, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", killed)
        train(run)
    assert [line["step"] for line in logged(run)] == [0, 1, 2, 3, 4]
    with open(run.checkpoint_path.parent / LOG, "a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    resumed = open_run(tiny_config(checkpoint_every=2))
    assert resumed.state.step == 4
    train(resumed)
    assert [line["step"] for line in logged(resumed)] == [0, 1, 2, 3, 4, 5]


def test_a_log_whose_first_line_was_cut_off_is_a_runs_own(tiny_config):
    config = tiny_config()
    run = open_run(config)
    (run.checkpoint_path.parent / LOG).write_text('{"step": 0, "contras')
    run = open_run(config)
    train(run)
    assert [line["step"] for line in logged(run)] == list(range(6))


def test_a_new_run_begins_a_new_log(tiny_config):
    train(open_run(tiny_config()))
    run = open_run(tiny_config(), fresh=True)
    train(run)
    assert [line["step"] for line in logged(run)] == list(range(6))


def test_a_log_line_asks_for_no_features_anew(tiny_config, monkeypatch):
    backbone = {"name": "patch_dictionary", "patch_size": 8, "features_dim": 24}
    run = open_run(tiny_config(backbone=backbone, loss={"consistency": 0}))
    calls = []
    whole = features.features_of
    monkeypatch.setattr(features, "features_of", lambda *a, **k: (calls.append(a), whole(*a, **k))[1])
    images = torch.tensor([3, 1, 4, 9])
    run.state.step = 1  # without renewal
    train_step(run, images)
    assert len(calls) == 1
    assert positives_per_anchor(run, images) >= 0
    assert len(calls) == 1


def test_parts_inside_of_others_count_for_themselves():
    clock = Clock(torch.device("cpu"))
    with clock.step() as seconds:
        with clock.part("outer"):
            time.sleep(0.02)
            with clock.part("inner"):
                time.sleep(0.04)
            time.sleep(0.02)
        time.sleep(0.01)
    assert set(seconds) == {"outer", "inner", "other"}
    assert seconds["outer"] >= 0.04 and seconds["inner"] >= 0.04 and seconds["other"] >= 0.01
    assert seconds["outer"] < 0.06 + seconds["inner"]


def test_a_step_that_is_not_timed_has_no_parts():
    clock = Clock(torch.device("cpu"))
    with clock.step(timed=False) as seconds, clock.part("a"):
        pass
    assert not seconds
    with clock.part("outside of steps"):
        pass
    with pytest.raises(KeyError), clock.step(), clock.part("a"):
        raise KeyError
    with clock.step() as seconds, clock.part("b"):
        pass
    assert set(seconds) == {"b", "other"}


def test_the_clock_changes_no_result(tiny_config):
    heads = []
    for every in (1, 100):
        run = open_run(tiny_config(f"every{every}", log_every=every))
        train(run)
        heads.append(torch.cat([parameter.flatten() for parameter in run.state.head.parameters()]))
    assert torch.equal(*heads)
