"""A run that is killed goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from tiny import tiny_values

from training import checkpoint
from training.run import open_run
from training.train import train

STEPS = 40


@pytest.fixture
def command(tmp_path, repository):
    """Start ``python -m training.train`` on a tiny run into a folder of this name."""

    def start(name):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tiny_values(tmp_path / name, steps=STEPS, checkpoint_every=1)))
        arguments = [sys.executable, "-m", "training.train", "--config", str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
        return subprocess.Popen(arguments, cwd=repository, env=environment, stderr=subprocess.PIPE, text=True)

    return start


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def test_kill_minus_nine_loses_nothing(command, tmp_path):
    finish(command("whole"))

    process, path = command("killed"), tmp_path / "killed" / "checkpoint.pt"
    while not path.is_file() or checkpoint.load(path)["state"]["step"] < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    step = checkpoint.load(path)["state"]["step"]
    assert 3 <= step < STEPS, "the run must be killed half way for this test to mean something"
    finish(command("killed"))

    runs = [tmp_path / name for name in ("whole", "killed")]
    states = [checkpoint.load(run / "checkpoint.pt")["state"] for run in runs]
    assert states[0]["history"] == states[1]["history"]
    for name, module in states[0]["modules"].items():
        for key, value in module.items():
            assert torch.equal(value, states[1]["modules"][name][key]), f"{name}.{key}"
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    assert metrics[0]["hp"] == metrics[1]["hp"] and metrics[0]["baseline"] == metrics[1]["baseline"]


def test_other_configuration_is_refused(tiny_config):
    train(open_run(tiny_config()))
    with pytest.raises(ValueError, match="holds a run whose loss.temperature, warmup differ|whose warmup, loss.temp"):
        open_run(tiny_config(warmup=3, loss={"temperature": 0.5}))
    assert open_run(tiny_config(warmup=3), fresh=True).state.step == 0
    assert open_run(tiny_config()).state.step == 0, "a fresh start removes the old run"
