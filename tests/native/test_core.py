"""The code that host and device share, against PyTorch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hpkernels.ops._philox import bernoulli
from hpkernels.ops.hidden_positives import reference
from hpkernels.ops.hidden_positives.bits import pack_bits


def words(mask):
    return pack_bits(mask).numpy().view(np.uint32)


def random_mask(generator, rows, columns, rate=0.3):
    return torch.rand(rows, columns, generator=generator) < rate


def test_philox_known_answers(core):
    ones = 0xFFFFFFFF
    assert core.philox(0, 0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert core.philox(ones, ones, ones, ones, 2**64 - 1) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = core.philox(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0x299F31D0A4093822)
    assert pi == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (7, 32), (3, 33), (4, 130)])
@pytest.mark.parametrize("seed", [0, 5, 2**62 + 12345])
def test_negatives_are_those_of_the_reference(core, shape, rate, seed):
    drawn = core.draw_negatives(seed, *shape, rate)
    assert np.array_equal(drawn, words(bernoulli(torch.tensor(seed), *shape, rate)))


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (33, 31), (70, 5), (5, 70), (128, 96)])
def test_transpose(core, shape, generator):
    mask = random_mask(generator, *shape)
    assert np.array_equal(core.transpose_bits(words(mask), shape[1]), words(mask.T))


@pytest.mark.parametrize("period", [1, 3, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("times", [1, 2, 7])
def test_repeat(core, period, times, generator):
    mask = random_mask(generator, 1, period)
    repeated = core.repeat_bits(words(mask)[0], period, period * times)
    assert np.array_equal(repeated, words(mask.repeat(1, times))[0])


def test_exponential(core):
    x = np.concatenate([np.linspace(-87.3, 0, 20001), [-87.4, -1000, -np.inf, 0, -1e-30]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(core.exp_nonpositive(x) - exact)
    normal = exact > np.finfo(np.float32).tiny
    assert (error[normal] <= 2 * np.spacing(exact[normal].astype(np.float32))).all()
    assert (core.exp_nonpositive(x)[~normal] == 0).all()
    assert core.exp_nonpositive(np.float32([0]))[0] == 1


@pytest.mark.parametrize("anchors", [1, 31, 32, 33, 64, 95, 130])
@pytest.mark.parametrize("threads", [1, 3])
def test_pack(core, anchors, threads, generator):
    features = torch.randn(anchors, 8, generator=generator)
    threshold = torch.randn(anchors, generator=generator) * 3
    threshold[::9] = torch.inf
    core.set_threads(threads)
    expected = words(reference.positives(features, threshold))
    assert np.array_equal(core.pack((features @ features.T).numpy(), threshold.numpy()), expected)


def test_sanitizers_find_nothing(build_core, repository):
    module = build_core("-DHPKERNELS_SANITIZE=address,undefined")
    compiler = os.environ.get("CXX", "c++")
    runtime = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    done = subprocess.run(
        [sys.executable, "tests/native/exercise_core.py", module.parent],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
