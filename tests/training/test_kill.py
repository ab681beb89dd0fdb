"""A run that is killed or stopped at any moment, and started again until it is done, is the run that was not."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import time

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_values

from training import train
from training.backbones.patch_dictionary import PatchDictionary
from training.runtime import checkpoint
from training.runtime.stopping import Stopped, Stopping

# A server that has imported all forks the processes: real ones, which start in no time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training.train"])


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, function, instead=die):
    """`function`, in the place of whose call of this number is another."""
    calls = iter(range(1, 10**6))
    return lambda *a, **k: (instead if next(calls) == number else function)(*a, **k)


def half(contents, file):
    file.write(b"half a checkpoint")
    file.flush()
    die()


def told(number, times=1):
    """A step in which a signal arrives."""

    def step(*a, _step=train.train_step, **k):
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(1.1 if times > 1 else 0)
        return _step(*a, **k)

    return lambda: setattr(train, "train_step", at_call(4, train.train_step, step))


def full_disk(*a, _step=train.train_step, **k):
    """A step after which no file can grow beyond some kilobytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return _step(*a, **k)


KILLED = {
    "features": lambda: setattr(PatchDictionary, "forward", at_call(2, PatchDictionary.forward)),
    "step": lambda: setattr(train, "train_step", at_call(4, train.train_step)),
    "half a checkpoint": lambda: setattr(torch, "save", at_call(3, torch.save, half)),
    "before a checkpoint is there": lambda: setattr(os, "replace", at_call(3, os.replace)),
    "results": lambda: setattr(train, "write_results", die),
}
MOMENTS = KILLED | {
    "terminated": told(signal.SIGTERM),
    "interrupted twice": told(signal.SIGINT, times=2),
    "disk full": lambda: setattr(train, "train_step", at_call(4, train.train_step, full_disk)),
}


def program(arguments, output, moment):
    """The program, which dies at a moment, in a process of its own whose output goes to a file."""
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if moment is not None:
        MOMENTS[moment]()
    train.main(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs are, of which the one called "whole" is finished."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder):
    """Start the program on a tiny run of a name, kill it after some seconds, and return the exit status."""

    def run(name, moment=None, seconds=None):
        file, output = folder / f"{name}.yaml", folder / f"{name}.txt"
        file.write_text(yaml.safe_dump(tiny_values(folder / name)))
        process = CONTEXT.Process(target=program, args=(["--config", str(file)], output, moment))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def whole(run, folder):
    """A run that was not killed: its folder, and how many seconds it took."""
    first = CONTEXT.Process(target=int)
    first.start()  # the server of processes imports all
    first.join()
    begin = time.monotonic()
    assert run("whole") == 0
    return folder / "whole", time.monotonic() - begin


def scalars(folder):
    """What TensorBoard shows but for times, by name: steps and values."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if not re.search("speed|seconds", name)]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def leaves(values, path=""):
    """What is in nested values, by its path; tensors as bytes."""
    if isinstance(values, dict | list | tuple):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, values.numpy().tobytes() if isinstance(values, torch.Tensor) else values


def assert_same(one, other):
    """Two finished runs are the same, bit by bit, but for times and names."""
    first, second = (checkpoint.load(run / "checkpoint.pt") for run in (one, other))
    for contents in (first, second):
        del contents["state"]["seconds"], contents["config"]["output"]
    assert dict(leaves(first)) == dict(leaves(second))
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (one, other))
    for metrics in (first, second):
        del metrics["run"], metrics["config"]["output"]
    assert first == second
    shown = scalars(one)
    assert [step for step, _ in shown["loss"]] == list(range(6)), "each step once"
    assert scalars(other) == shown
    for run in (one, other):
        lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if "loss" in line] == list(range(6))
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}, "and nothing is left"


def test_killed_at_chosen_moments(run, folder, whole):
    for moment in KILLED:
        assert run("killed", moment) == -signal.SIGKILL, moment
    assert run("killed") == 0
    assert_same(whole[0], folder / "killed")


@pytest.mark.parametrize(
    "moment, status, step, said",
    [
        ("terminated", 143, 4, "train: stopped after step 4 of 6, which is saved: the same command goes on"),
        ("interrupted twice", 130, 2, "train: interrupted"),
        ("disk full", 1, 2, "train: .*checkpoint.pt cannot be written: File too large"),
    ],
)
def test_stopped(run, folder, moment, status, step, said):
    assert run(moment, moment) == status
    assert re.search(rf"\n{said}\n$", (folder / f"{moment}.txt").read_text())
    assert checkpoint.load(folder / moment / "checkpoint.pt")["state"]["step"] == step
    left = {file.name for file in (folder / moment).iterdir()}
    assert left - {"log.jsonl"} == {"backbone.pt", "checkpoint.pt", "run.lock", "tensorboard"}


def test_a_stopped_run_goes_on(run, folder, whole):
    assert run("stopped", "terminated") == 143 and run("stopped") == 0
    assert_same(whole[0], folder / "stopped")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_are_kept_while_training(number, status):
    before = signal.getsignal(number)
    with Stopping() as stopping:
        assert not stopping.requested()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at once: a launcher repeats it
        assert stopping.requested() and Stopped("", stopping.number).status == status
    assert signal.getsignal(number) is before


def kill_at_random(run, folder, whole, repetitions):
    """Kill runs at random moments, up to five times each, until as many were killed as there are repetitions."""
    whole, duration = whole
    killed = 0
    for number in range(4 * repetitions):
        moments, begin = [], time.monotonic()
        while status := run(f"killed{number}", seconds=random.uniform(0, duration) if len(moments) < 5 else None):
            moments.append(round(time.monotonic() - begin, 2))
            begin = time.monotonic()
            assert status == -signal.SIGKILL, (folder / f"killed{number}.txt").read_text()
        duration = time.monotonic() - begin  # of a process that ended by itself, as busy as the machine is now
        assert_same(whole, folder / f"killed{number}")
        killed += bool(moments)
        print(f"killed after {moments} s, whole in {duration:.2f} s")
        if killed == repetitions:
            return
    raise AssertionError(f"of {number + 1} runs only {killed} were killed before they were done")


def test_killed_at_random(run, folder, whole):
    kill_at_random(run, folder, whole, 1)


@pytest.mark.deep
def test_killed_at_random_many_times(run, folder, whole):
    kill_at_random(run, folder, whole, 20)
