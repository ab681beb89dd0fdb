"""A run that is killed goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import tiny_values

from training import checkpoint
from training.config_file import load_config
from training.results import write_results
from training.run import open_run
from training.train import train

KILLED_AT = 3

# The program, which dies without a word in the middle of a step.
KILLED = f"""
import os, signal, sys
from training import train
step = train.train_step
def dying_step(run, images):
    if run.state.step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, images)
train.train_step = dying_step
train.main(["--config", sys.argv[1]])
"""


def test_kill_minus_nine_loses_nothing(tmp_path, repository):
    files = {name: tmp_path / f"{name}.yaml" for name in ("whole", "killed")}
    for name, file in files.items():
        file.write_text(yaml.safe_dump(tiny_values(tmp_path / name, steps=2 * KILLED_AT, checkpoint_every=1)))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", KILLED, str(files["killed"])]
    done = subprocess.run(command, cwd=repository, env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.load(tmp_path / "killed" / "checkpoint.pt")["state"]["step"] == KILLED_AT

    for file in files.values():
        run = open_run(load_config(file))
        train(run)
        write_results(run)
    runs = [tmp_path / name for name in files]
    states = [checkpoint.load(run / "checkpoint.pt")["state"] for run in runs]
    assert states[0]["history"] == states[1]["history"] and len(states[0]["history"]) == 2 * KILLED_AT
    for name, module in states[0]["modules"].items():
        for key, value in module.items():
            assert torch.equal(value, states[1]["modules"][name][key]), f"{name}.{key}"
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    assert metrics[0]["hp"] == metrics[1]["hp"] and metrics[0]["baseline"] == metrics[1]["baseline"]


def test_other_configuration_is_refused(tiny_config):
    train(open_run(tiny_config()))
    with pytest.raises(
        ValueError, match="holds a run that differs in (loss.temperature, warmup|warmup, loss.temperature);"
    ):
        open_run(tiny_config(warmup=3, loss={"temperature": 0.5}))
    assert open_run(tiny_config(warmup=3), fresh=True).state.step == 0
    assert open_run(tiny_config()).state.step == 0, "a fresh start removes the old run"
