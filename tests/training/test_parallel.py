"""One run on several ranks over gloo, against one process that has the whole batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from ranks import raised, run_ranks
from tiny import tiny_values
from torch.nn import functional as F

import hpkernels
from training.config_file import config_from_dict
from training.data import batch_of_step
from training.results import write_results
from training.run import open_run, resolve_device
from training.runtime import checkpoint, parallel
from training.schedule import seed_step
from training.state import TrainingState
from training.train import train, train_step

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")

RANKS = 3  # a batch of 4 images: 2, 1 and 1
STEPS = 3
BASELINE = {"local": False, "consistency": 0.0}
RUNS = {
    "hp": {},
    "specific": {"loss": {"agnostic": False, "symmetric": False}},
    "published": {"quirks": {"preset": "published"}},
    "views": {"loss": BASELINE | {"objective": "views"}},
    "clusters": {"loss": BASELINE | {"objective": "clusters"}},
    "stego": {"loss": BASELINE | {"objective": "stego"}},
    "none": {"loss": BASELINE | {"objective": "none"}},
}


def values_of(folder, name="hp", **top):
    """A run with dropout, lambda above 0 from its second step on, and photometric views that are made in each step."""
    pool = {"size": 31, "renew_every": 2}
    backbone = tiny_values("")["backbone"] | {"views": 0}
    return tiny_values(folder / name, warmup=1, backbone=backbone, pool=pool) | RUNS[name] | top


def opened(folder):
    """A run, with fewer labelled pixels in some images and none in one."""
    run = open_run(config_from_dict(values_of(folder)))
    labels = run.train_bank.labels

    def fewer(images):
        found = labels(images)
        for label, image in zip(found, images.tolist(), strict=True):
            label[: 32 if image == 4 else 6 * (image % 4)] = -1
        return found

    run.train_bank.labels = fewer
    return run


def at_its_start(run, name):
    """One of `RUNS` with the images and the backbone of `run`."""
    config = config_from_dict(values_of(run.checkpoint_path.parents[1], name))
    torch.manual_seed(0)
    state = TrainingState(config, run.backbone.features_dim, run.state.clusters, run.device)
    state.pools.fill_agnostic(run.train_bank, seed_step(0, -1))
    run = replace(run, config=config, state=state)
    run.checkpoint_path.parent.mkdir(exist_ok=True)
    return run


def take_steps(run, name):
    """All that a few steps of one of `RUNS` leave on this rank, by name."""
    run = at_its_start(run, name)
    state, images = run.state, batch_of_step(0, len(run.train_bank), 4, 0)
    own = F.normalize(run.train_bank.get(parallel.share(4).of(images)).tokens, dim=-1).flatten(0, 1)
    threshold = hpkernels.masked_topk(own, state.pools.agnostic()).values
    left = {"agnostic pool": state.pools.agnostic().clone(), "thresholds": parallel.gathered(threshold)}
    for step in range(STEPS):
        terms = train_step(run, batch_of_step(step, len(run.train_bank), 4, 0))
        left |= {f"term {step} {term}": value for term, value in terms.items()}
        left[f"specific pool {step}"] = state.pools.specific().clone()
        for group, optimizer in state.optimizers.items():
            for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
                if parameter.grad is not None:  # STEGO's loss uses no projection
                    left[f"gradient {step} {group}.{index}"] = parameter.grad.clone()
    for module in ("head", "ema_head", "projection", "linear_probe", "cluster_probe"):
        left |= {f"after {module}.{key}": value for key, value in state.modules[module].state_dict().items()}
    return left


def of_rank(rank, folder):
    run = opened(folder)
    found = {name: take_steps(run, name) for name in RUNS}
    found["share"] = parallel.share(4)
    found["greatest"] = parallel.greatest(15 if rank == 1 else 0)
    for key, edit in {"few": {"batch_size": 2}, "other": {"optim": {"head_lr": rank + 1}}}.items():
        found[key] = raised(open_run, config_from_dict(values_of(folder, **edit)))
    del run.train_bank.labels  # all pixels are labelled again
    train(at_its_start(run, "published"))
    save = run.save

    def save_and_stop():
        save()
        raise InterruptedError

    run.save = save_and_stop
    found["stopped"] = raised(train, run)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def of_ranks(folder):
    return run_ranks(of_rank, RANKS, folder, folder)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: the backbone that is fitted depends on it
    yield opened(tmp_path_factory.mktemp("one"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_one_process(of_ranks, one_process, name):
    expected = take_steps(one_process, name)
    first, *others = (found[name] for found in of_ranks)
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        assert all(torch.equal(first[key], other[key]) for other in others), f"ranks differ in {key}"
        if key in (
            "agnostic pool",
            "thresholds",
            "specific pool 0",
        ):  # later ones are those of a head that rounding has reached
            assert torch.equal(first[key], value), key
        error = (first[key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error < 2e-6, f"{key}: {error:.1e}"


def test_one_rank_scores_and_writes(of_ranks, folder):
    left = sorted(path.name for path in (folder / "published").iterdir())
    assert {"best.pt", "checkpoint.pt"} <= set(left) and not [name for name in left if name.endswith(".partial")]
    assert len(list((folder / "published" / "tensorboard").iterdir())) == 1


def test_shares_and_numbers(of_ranks):
    assert [found["share"] for found in of_ranks] == [(0, 2, 4), (2, 3, 4), (3, 4, 4)]
    assert [found["greatest"] for found in of_ranks] == [15] * RANKS
    assert parallel.shares(4) == [(0, 4, 4)] and parallel.greatest(2) == 2


def test_what_does_not_fit_is_refused_on_all_ranks(of_ranks):
    few = "ValueError: config: `batch_size` must be at least the 3 ranks, got 2"
    other = "ValueError: train: `optim.head_lr` must be the same on all ranks, got 1.0 on rank 0, 2.0 on rank 1, 3.0"
    for found in of_ranks:
        assert found["few"] == few
        assert found["other"].startswith(other)


def torchrun(config, *edits, ranks=2, repository):
    """Start the program, whose ranks `torchrun` numbers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    return subprocess.Popen(
        [*command, "-m", "training.train", "--config", str(config), *edits],
        cwd=repository,
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_goes_on_with_a_run_of_another_number_of_ranks(of_ranks, one_process, folder, repository):
    output = folder / "hp"
    assert [found["stopped"] for found in of_ranks] == ["InterruptedError: "] * RANKS
    assert checkpoint.load(output / "checkpoint.pt")["state"]["step"] == 2
    config = folder / "hp.yaml"
    config.write_text(yaml.safe_dump(values_of(folder)))
    process = torchrun(config, repository=repository)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said.count("resuming at step 2 of 6 steps of 4 images") == said.count("report:") == 1
    assert "from 10 (each epoch leaves out 2), on cpu, on 2 ranks with 2 or 2 of them" in said
    assert {path.name for path in output.iterdir()} >= {"checkpoint.pt", "metrics.json", "report.html", "tensorboard"}
    assert not list(output.glob("*.partial"))

    del one_process.train_bank.labels
    train(one_process)
    several = checkpoint.load(output / "checkpoint.pt")["state"]
    steps = [[figures["step"] for figures in state["history"]] for state in (several, one_process.state.state_dict())]
    assert steps[0] == steps[1] == list(range(6))
    for ours, expected in zip(several["history"], one_process.state.history, strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["linear_probe"] == pytest.approx(expected["linear_probe"], rel=1e-5)
    _, metrics = write_results(one_process)
    scores = json.loads((output / "metrics.json").read_text())["hp"]
    for name in ("cluster_probe", "linear"):
        assert scores[name]["accuracy"] == pytest.approx(metrics["hp"][name]["accuracy"], abs=0.5)
    for name in ("head", "ema_head", "specific_pool", "linear_probe", "cluster_probe"):
        for key, value in one_process.state.modules[name].state_dict().items():
            torch.testing.assert_close(several["modules"][name][key], value, rtol=1e-4, atol=1e-5)


def process_of_rank(launcher, rank):
    """The number of the process that `torchrun` started as `rank`."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise ProcessLookupError(f"no rank {rank}")


@pytest.fixture
def endless(tmp_path, repository):
    """Two ranks of `torchrun` in a run of many steps, which has begun."""
    config = tmp_path / "endless.yaml"
    config.write_text(yaml.safe_dump(values_of(tmp_path, steps=100_000, log_every=1, checkpoint_every=100_000)))
    process = torchrun(config, repository=repository)
    log, deadline = tmp_path / "hp" / "log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    yield process, tmp_path / "hp"
    process.kill()
    process.wait()


def test_sigterm_to_torchrun_saves_the_step(endless):
    process, output = endless
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, "torchrun's own"
    step = checkpoint.load(output / "checkpoint.pt")["state"]["step"]
    assert errors.count(f"train: stopped after step {step} of 100000, which is saved: the same command goes on") == 1
    assert "training/train.py" not in errors, "no traceback of ours"


def test_a_rank_whose_partner_was_killed_says_so_in_one_sentence(endless):
    process, _ = endless
    os.kill(process_of_rank(process, 1), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("train: another rank has ended, or does not answer: ") == 1, errors
    assert "; the same command goes on from the last checkpoint" in errors
    assert "training/train.py" not in errors, "no traceback of ours"


def test_the_device_of_a_rank(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [parallel.device_of_rank(name) for name in ("cpu", "cuda")] == ["cpu", "cuda:1"]
    with pytest.raises(ValueError, match="`device` must be auto, cuda or cpu for the ranks .* got 'cuda:0'"):
        parallel.device_of_rank("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="torchrun started 2 ranks for 1: start at most 1, or choose device=cpu"):
        resolve_device("cuda")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert parallel.device_of_rank("cuda:0") == "cuda:0"
