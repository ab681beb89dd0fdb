"""The code that host and device share, against PyTorch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hpkernels.ops._bits import pack_bits
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.hidden_positives import reference
from hpkernels.ops.local_propagation import reference as local_propagation


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


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 128), (3, 4), (31, 33), (32, 64), (40, 40), (70, 128)])
def test_bits_outside(core, first, last):
    column = torch.arange(128)[None]
    assert np.array_equal(core.bits_outside(4, first, last), words((column < first) | (column >= last))[0])


@pytest.mark.parametrize("split", [0, 1, 5, 9])
def test_log_sum(core, split, generator):
    values = torch.randn(9, generator=generator) * 200
    values[3] = -torch.inf
    np.testing.assert_allclose(core.log_sum(values.numpy(), split), values.logsumexp(dim=0), rtol=1e-6)
    assert core.log_sum(values.numpy()[:0], 0) == core.log_sum(values.numpy()[3:4], 1) == -np.inf
    values[split % 9] = torch.nan
    assert np.isnan(core.log_sum(values.numpy(), split))


ROWS_OF_NUMBERS = {
    "normal": lambda x: x,
    "integers": lambda x: (2 * x).round(),
    "equal": lambda x: torch.full_like(x, -3.5),
    "zeros of both signs": lambda x: torch.where(x < 0, -0.0, 0.0),
    "tiny": lambda x: x * 1e-44,
    "huge": lambda x: x.sign() * 1.5e38,
    "any size": lambda x: x.sign() * (80 * x).exp(),
    "outliers": lambda x: torch.where(x.abs() > 2, 1e30 * x, x),
    "infinite": lambda x: torch.where(x.abs() > 1, torch.inf * x.sign(), x),
    "greatest at the end": lambda x: torch.where(x > 0.5, torch.inf, x),
}


@pytest.mark.parametrize("numbers", ROWS_OF_NUMBERS)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 257, 784])
def test_quantiles(core, numbers, count, generator):
    values = ROWS_OF_NUMBERS[numbers](torch.randn(count, generator=generator))
    ordered = values.sort().values[None]
    for low, high in ((0.1, 0.9), (0.0, 1.0), (0.25, 0.3), (0.5, 0.5)):
        *found, steps = core.quantiles(values.numpy(), low, high)
        expected = [local_propagation._quantile(ordered, quantile).item() for quantile in (low, high)]
        np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=1e-6, atol=1e-45)
        assert steps <= 16 + 32
        if numbers == "normal":  # some number between two neighbours is enough, and found by halving the values
            assert steps <= 20
    if values.isfinite().all():  # whose quantiles are the numbers themselves at their own ranks
        ranks = sorted({0, count // 3, count // 2, count - 1})
        for rank in ranks:
            quantile = rank / max(1, count - 1)
            assert core.quantiles(values.numpy(), quantile, quantile)[0] == ordered[0, rank]


@pytest.mark.parametrize("count", [1, 2, 9, 50])
def test_quantiles_of_nan_end(core, count, generator):
    values = torch.randn(50, generator=generator)
    values[:count] = torch.nan
    assert core.quantiles(values.numpy(), 0.1, 0.9)[2] <= 16 + 32


def test_exponential(core):
    x = np.concatenate([np.linspace(-87.3, 0, 20001), [-87.4, -1000, -np.inf, 0, -1e-30]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(core.exp_nonpositive(x) - exact)
    normal = exact > np.finfo(np.float32).tiny
    assert (error[normal] <= 2 * np.spacing(exact[normal].astype(np.float32))).all()
    assert (core.exp_nonpositive(x)[~normal] == 0).all()
    assert core.exp_nonpositive(np.float32([0]))[0] == 1


GEOMETRIES = [
    *("Geometry80", "WarpGeometry80<2>", *(f"GradientGeometry80<{width}>" for width in (64, 128, 256))),
    *("Geometry90", "WideGeometry90", "GradientGeometry90<64>", "GradientGeometry90<256>"),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry(core, geometry):
    rows, columns, positions = core.geometries()[geometry]
    places = positions[..., 0] * columns + positions[..., 1]
    assert np.array_equal(np.sort(places, axis=None), np.arange(rows * columns))  # each has one owner

    # Blocks of 16 x 8 are fragments of mma, four of which make a word of 32 columns.
    lane, part = np.arange(32)[:, None, None, None], np.arange(4)
    fragment = np.stack(np.broadcast_arrays(lane // 4 + part // 2 * 8, lane % 4 * 2 + part % 2), axis=-1)
    start = positions.reshape(-1, 32, *positions.shape[1:]) - fragment
    assert (start == start[:, :1, ..., :1, :]).all()
    assert (start[..., 0] % 16 == 0).all()
    n = np.arange(positions.shape[2])[:, None]
    assert ((start[..., 1] - n % 4 * 8) % 32 == 0).all()


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (0, 7), (3, 3), (5, 22), (100, 2**40)])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
def test_parts_cover_a_range(core, first, last, parts):
    ranges = [core.part_of(first, last, part, parts) for part in range(parts)]
    assert [ranges[0][0], *(end for _, end in ranges)] == [*(start for start, _ in ranges), last]
    assert ranges[0][0] == first
    lengths = [end - start for start, end in ranges]
    assert min(lengths) >= 0 and max(lengths) - min(lengths) <= 1


def test_parts_are_enough_and_not_too_short(core):
    for strips in (1, 2, 7, 511, 512, 600):
        for tiles in (0, 1, 3, 4, 100, 5000):
            for least in (1, 2, 5):
                parts = core.parts_for(strips, tiles, 512, least)
                assert parts >= 1
                assert parts == 1 or (tiles // parts >= least and strips * (parts - 1) < 512)
                assert strips * parts >= 512 or tiles // (parts + 1) < least


def test_rank_keys(core):
    falling = [np.inf, 3e38, 1.5, 1.0, 1e-45, 0.0, -1e-45, -1.0, -1.5, -3e38, -np.inf]
    indices = [0, 1, 31, 2**31 - 2]
    equal = {0.0: [0.0, -0.0], np.nan: [np.nan, -np.nan]}
    keys = [core.greatest_key]
    for value in [np.nan, *falling]:
        for index in indices:
            (key,) = {core.rank_key(same, index) for same in equal.get(value, [value])}
            keys.append(key)
            np.testing.assert_equal(core.value_of_key(key), float(np.float32(value)))
    keys.append(core.nothing_found)
    assert np.isnan(core.value_of_key(core.greatest_key)) and core.value_of_key(core.nothing_found) == -np.inf
    assert all(key > following for key, following in zip(keys, keys[1:], strict=False))


@pytest.mark.parametrize("kind", ["ties", "zeros", "nan", "nothing"])
def test_best(core, kind, generator):
    values = torch.randint(-2, 3, (40,), generator=generator).float()
    if kind == "zeros":  # of both signs, which are equal
        values = values.clamp(max=0) * torch.tensor([1.0, -1.0]).repeat(20)
        values[values > 0] = -1
    elif kind == "nan":
        values[[3, 17]] = torch.nan
    elif kind == "nothing":
        values[:] = -torch.inf
    indices = torch.arange(40).where(values > -torch.inf, -1).int()  # NaN has no index, either
    greatest = values.max().item()
    first = (values == greatest).nonzero().flatten().tolist()[:1] if kind in ("ties", "zeros") else []
    expected = (values[first[0]].item(), first[0]) if first else (greatest, -1)
    for split in range(0, 41, 4):
        order = torch.randperm(40, generator=generator)
        np.testing.assert_equal(core.best(values[order].numpy(), indices[order].numpy(), split), expected)


@pytest.mark.parametrize("tile", [(128, 128), (64, 128), (64, 64)], ids=str)
@pytest.mark.parametrize(
    ("images", "group"), [(1, 1), (5, 1), (3, 31), (3, 33), (2, 64), (3, 97), (4, 105), (2, 128), (1, 300), (3, 130)]
)
def test_tiles_meet_every_pair_once(core, tile, images, group):
    anchors = images * group
    image = np.arange(anchors) // group
    assert (core.pairs_met(*tile, anchors, group, False) == 1).all()
    assert np.array_equal(core.pairs_met(*tile, anchors, group, True), image[:, None] == image)


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
    rows, codes, stats = coarse(core, features)
    for symmetric in (True, False):
        expected = words(reference.positives(features.double(), threshold.double(), symmetric))
        assert np.array_equal(core.pack(codes @ codes.T, rows, stats, threshold.numpy(), symmetric), expected)


@pytest.mark.parametrize("anchors", [1, 33, 70])
@pytest.mark.parametrize("keys", [1, 31, 64, 95])
def test_pack_between(core, anchors, keys, generator):
    core.set_threads(3)
    rows, of_keys = (torch.randn(count, 8, generator=generator) for count in (anchors, keys))
    threshold, key_threshold = (torch.randn(count, generator=generator) for count in (anchors, keys))
    threshold[::9], key_threshold[::7] = torch.inf, -torch.inf
    (left, codes, stats), (right, key_codes, key_stats) = coarse(core, rows), coarse(core, of_keys)
    given = codes @ key_codes.T, left, stats, right, key_stats, threshold.numpy(), key_threshold.numpy()
    exact = rows.double(), of_keys.double(), threshold.double(), key_threshold.double()
    assert np.array_equal(core.pack_between(*given, False, -anchors), words(reference.positives_between(*exact)))
    found = core.pack_between(*given, True, 5)
    expected = reference.between(*exact, either=True, first=None)
    own = torch.zeros(anchors, keys, dtype=torch.bool)
    own.diagonal(min(5, keys)).fill_(True)
    assert np.array_equal(found, expected.numpy().view(np.uint32) & ~words(own))


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


@pytest.mark.deep
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
