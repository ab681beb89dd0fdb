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


def coarse(core, rows):
    """The rows as numpy arrays, their int8 codes as wider integers, and their scale, norm and error."""
    codes, stats = core.coarse_int8(rows.numpy())
    return rows.numpy(), codes.astype(np.int32), stats


@pytest.mark.parametrize("anchors", [1, 31, 32, 33, 64, 95, 130])
@pytest.mark.parametrize("threads", [1, 3])
def test_pack(core, anchors, threads, generator):
    features = torch.randn(anchors, 8, generator=generator)
    threshold = torch.randn(anchors, generator=generator) * 3
    threshold[::9] = torch.inf
    core.set_threads(threads)
    expected = words(reference.positives(features.double(), threshold.double()))
    rows, codes, stats = coarse(core, features)
    assert np.array_equal(core.pack(codes @ codes.T, rows, stats, threshold.numpy()), expected)


@pytest.mark.parametrize("k", [1, 3, 16, 64, 65, 200, 300])
def test_topk(core, k, generator):
    query, pool = (torch.randn(count, 24, generator=generator) for count in (5, 300))
    (rows, codes, stats), (references, pool_codes, pool_stats) = coarse(core, query), coarse(core, pool)
    values, indices = core.topk(codes @ pool_codes.T, rows, stats, references, pool_stats, k)
    exact = (query.double() @ pool.double().T).float().sort(dim=1, descending=True, stable=True)
    assert np.array_equal(values, exact.values[:, :k]) and np.array_equal(indices, exact.indices[:, :k])


@pytest.mark.parametrize("kind", ["normal", "outliers", "tiny", "huge", "zero", "constant"])
def test_coarse_products_are_within_their_bound(core, kind, generator):
    rows = torch.randn(64, 48, generator=generator)
    if kind == "outliers":
        rows[:, 3] *= 300
    elif kind in ("tiny", "huge", "zero"):
        rows *= {"tiny": 1e-39, "huge": 1e18, "zero": 0.0}[kind]
    elif kind == "constant":
        rows = rows[:, :1].expand(-1, 48).contiguous()
    _, codes, (scale, norm, error) = coarse(core, rows)
    products = (scale[:, None] * (codes @ codes.T).astype(np.float32) * scale).astype(np.float64)
    exact = (rows.double() @ rows.double().T).numpy()
    bound = error[:, None] * norm + norm[:, None] * error + np.float32(4 * np.finfo(np.float32).tiny)
    assert (np.abs(products - exact) <= bound).all()
    if kind == "normal":  # and the bound is worth having: a hundredth or so of the product of the lengths
        assert (bound <= 0.025 * norm[:, None] * norm).all()


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
