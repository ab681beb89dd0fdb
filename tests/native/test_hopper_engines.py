"""The engines for sm_90a on the emulator: right in whatever order copies and products end, wrong with any fault."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
from contrastive_lists import Sampled

from hpkernels import PositiveMask, _native, backends
from hpkernels.ops import _cuda
from hpkernels.ops.hidden_positives import reference as discovery
from hpkernels.ops.masked_topk import reference as ranking
from hpkernels.testing import available_cases, random_problem

CASES = [
    case
    for case in available_cases("masked_topk", _cuda.DTYPES)
    if case.backend == "cuda" and case.dtype == torch.float16
]
pytestmark = pytest.mark.skipif(
    not _native.EMULATED, reason="the order of events is chosen, and faults are planted, on the emulator alone"
)
SEEDS = range(8)


@functools.cache
def ranked(dim, k, references=1100):
    """Whether a strip of queries, in one block that goes through all tiles of the pool, finds its greatest products."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randint(-2, 3, (70 + references, dim), generator=generator).half()
    query, pool = rows[:70], rows[70:]
    values, indices = ranking.forward(query.double(), pool.double(), k)
    kernels = backends.implementation("masked_topk", "cuda")

    def is_right():
        found = kernels.forward(query, pool, k)
        return torch.equal(found[0].double(), values) and torch.equal(found[1], indices)

    return is_right


@functools.cache
def discovered(dim, anchors=300):
    generator = torch.Generator().manual_seed(dim)
    features = torch.randint(-2, 3, (anchors, dim), generator=generator).half()
    threshold = torch.randint(0, 2 * dim, (anchors,), generator=generator).float()
    keys, of_keys = features[70:], threshold[70:]
    expected = [discovery.forward(features.double(), threshold.double(), way) for way in (True, False)]
    exact = (value.double() for value in (features, keys, threshold, of_keys))
    expected.append(discovery.between(*exact, False, None))
    kernels = backends.implementation("hidden_positives", "cuda")

    def is_right():
        found = [kernels.forward(features, threshold, way) for way in (True, False)]
        found.append(kernels.between(features, keys, threshold, of_keys, False, None))
        return all(map(torch.equal, found, expected))

    return is_right


@functools.cache
def differentiated(dim, anchors=315):
    """Whether a gradient is that of the first call bit by bit, which is near the right one.

    Anchors in fives are positives of one another; the negatives are all others.
    """
    z = random_problem(images=1, height=1, width=anchors, dim=dim, dtype=torch.float16).z
    logits = z.double() @ z.double().T / 0.3
    logits.fill_diagonal_(-torch.inf)
    log_sums = logits.logsumexp(1)
    mask = (torch.arange(anchors) // 5 == torch.arange(anchors)[:, None] // 5).fill_diagonal_(False)
    g = (logits - log_sums[:, None]).exp() - 0.1 * mask
    expected = 2 * (g + g.T) @ z.double()
    numbers = torch.stack((log_sums.float(), *torch.tensor([[1.0], [0.1], [0.0]]).expand(3, anchors)), dim=1)
    bits, state = PositiveMask.from_dense(mask).bits, torch.zeros(5, dtype=torch.int64)
    given = (
        _cuda.aligned_rows(z),
        bits,
        None,
        None,
        state,
        anchors,
        0,
        False,
        False,
        True,
        None,
        None,
        1 / 0.3,
        numbers,
    )
    shift, factor = torch.tensor(torch.nan), torch.tensor(2.0)

    def backward():
        sums = torch.empty_like(z)
        torch.ops.hpkernels_cuda.contrastive_blocks_backward(*given, shift, factor, sums)
        return sums

    first = backward()
    assert torch.linalg.vector_norm(first - expected) < 2e-3 * torch.linalg.vector_norm(expected)
    return lambda: torch.equal(backward(), first)


@functools.cache
def sampled(dim, gradients, images=60, group=7):
    """The same of log sums or both gradients of sampled negatives, by one block that goes through four tiles."""
    problem = Sampled(CASES[0], images, group, dim, 0)

    def found():
        if not gradients:
            return problem.log_sums(torch.zeros(problem.anchors))
        sums, staged = torch.zeros(problem.rows.shape), problem.room(0).zero_()
        problem.backward(0, sums, staged)
        return torch.cat((sums, staged.flatten(0, 1)))

    first = None

    def is_right():
        nonlocal first
        if first is None:  # by the engine, which is chosen when the kernel runs
            problem.check_backward() if gradients else problem.check_forward()
            first = found()
        return torch.equal(found(), first)

    return is_right


@pytest.fixture
def outcome(hopper, monkeypatch):
    """``outcome(is_right, seed, fault)``: "right", "wrong" or what the emulator says."""

    def outcome(is_right, seed, fault=""):
        monkeypatch.setenv("HPKERNELS_EMULATION_SEED", str(seed))
        monkeypatch.setenv("HPKERNELS_EMULATION_FAULT", fault)
        try:
            return "right" if is_right() else "wrong"
        except RuntimeError as error:
            return str(error).removeprefix("hpkernels, emulated CUDA: ")
        finally:
            monkeypatch.delenv("HPKERNELS_EMULATION_FAULT")

    return outcome


PROBLEMS = [
    *((ranked, 8, 1), (ranked, 512, 1), (ranked, 300, 5)),
    *((discovered, 330), (differentiated, 200), (differentiated, 300), (sampled, 200, True)),
    *((differentiated, 300, 60), (differentiated, 300, 128), (differentiated, 300, 190)),  # of one tile to three
    *((sampled, 330, True), (sampled, 330, False)),
]


@pytest.mark.parametrize(
    "problem",
    PROBLEMS,
    ids=lambda problem: " ".join([problem[0].__name__, *map(str, problem[1:])]),
)
def test_any_order(outcome, problem):
    make, *sizes = problem
    is_right = make(*sizes)
    assert {outcome(is_right, seed) for seed in SEEDS} == {"right"}


# Barriers of a strip in the order in which it initialises them; there are four stages for 512 elements and k > 1.
STRIP, FULL, EMPTY, TURN, OTHER_TURN = 0, 1, 2, 9, 10
LEAD = 8  # of wide tiles, which have three stages
# And of gradients: own_full, then for each of two places ready, and full and empty of each side.
OWN_FULL, READY, QUARTER_FULL, QUARTER_EMPTY = 0, (1, 6), (2, 4, 7, 9), (3, 5, 8, 10)
# Of the first half of gathered rows: ready, done, full and empty.
GATHERED_READY, DONE, GATHERED_FULL, GATHERED_EMPTY = 1, 2, 3, 4

WAITS_FOR_EVER = "deadlock: .* threads at barrier"
TOO_MANY = "more arrivals than a phase has"
ANY = f"wrong|{TOO_MANY}|{WAITS_FOR_EVER}|a block ends before its copies"
EXPECTED_LESS = "more bytes came than were expected"
OF_BOTH = [
    ("no_swizzle:0", "wrong"),
    ("no_barrier_fence:0", "TMA uses a barrier without a fence"),
]
OF_ALL = [
    ("left_stride:0", "wrong|wgmma reads beyond shared memory"),
    ("right_stride:0", "wrong|wgmma reads beyond shared memory"),
    ("right_start:0", "wrong"),
    ("no_begin:0", "wgmma without wgmma.fence"),
    ("no_commit:0", "a warp ends before its products|accumulators are written"),
    ("no_wait_for_products:0", "a warp ends before its products"),
]
OF_ANY_STRIP = [
    ("early_release:0", "wrong"),
    *((f"no_wait:{barrier}", ANY) for barrier in (STRIP, FULL, EMPTY)),
    *((f"other_phase:{barrier}", ANY) for barrier in (STRIP, FULL, EMPTY)),
    *((f"no_arrival:{barrier}", WAITS_FOR_EVER) for barrier in (STRIP, FULL, EMPTY)),
    *((f"two_arrivals:{barrier}", TOO_MANY) for barrier in (STRIP, FULL)),
    (f"two_arrivals:{EMPTY}", ANY),
    *((f"fewer_bytes:{barrier}", EXPECTED_LESS) for barrier in (STRIP, FULL)),
    *((f"more_bytes:{barrier}", WAITS_FOR_EVER) for barrier in (STRIP, FULL)),
]
OF_TURNS = [
    *((f"no_wait:{barrier}", ANY) for barrier in (TURN, OTHER_TURN)),
    (f"other_phase:{TURN}", ANY),
    (f"no_arrival:{TURN}", WAITS_FOR_EVER),
    (f"two_arrivals:{TURN}", ANY),
]
OF_GRADIENT = [
    ("no_write_fence:0", "wrong"),
    ("one_write_fence:0", "wrong"),
    ("right_leading:0", "wrong|wgmma reads beyond shared memory"),
    *((f"no_wait:{barrier}", ANY) for barrier in (OWN_FULL, *READY, *QUARTER_FULL, *QUARTER_EMPTY)),
    *((f"other_phase:{barrier}", ANY) for barrier in (OWN_FULL, *READY, *QUARTER_FULL, *QUARTER_EMPTY)),
    *((f"no_arrival:{barrier}", WAITS_FOR_EVER) for barrier in (OWN_FULL, *READY, *QUARTER_FULL, *QUARTER_EMPTY)),
    *((f"two_arrivals:{barrier}", ANY) for barrier in (*READY, *QUARTER_EMPTY)),
    *((f"fewer_bytes:{barrier}", EXPECTED_LESS) for barrier in (OWN_FULL, *QUARTER_FULL)),
    *((f"more_bytes:{barrier}", WAITS_FOR_EVER) for barrier in (OWN_FULL, *QUARTER_FULL)),
]
GATHERED = (OWN_FULL, GATHERED_READY, DONE, GATHERED_FULL, GATHERED_EMPTY)
OF_GATHERED = [
    ("no_write_fence:0", "wrong"),
    ("one_write_fence:0", "wrong"),
    ("right_leading:0", "wrong|wgmma reads beyond shared memory"),
    ("not_transposed:0", "wrong|wgmma reads beyond shared memory"),
    *((f"{fault}:{barrier}", ANY) for fault in ("no_wait", "other_phase", "two_arrivals") for barrier in GATHERED),
    *((f"no_arrival:{barrier}", WAITS_FOR_EVER) for barrier in GATHERED),
]
# Only these barriers are there without gradients.
OF_GATHERED_PRODUCTS = [
    ("no_write_fence:0", "wrong"),
    *(
        (f"{fault}:{barrier}", ANY)
        for fault, barrier in itertools.product(
            ("no_wait", "other_phase", "two_arrivals"), (OWN_FULL, GATHERED_FULL, GATHERED_EMPTY)
        )
    ),
    *((f"no_arrival:{barrier}", WAITS_FOR_EVER) for barrier in (OWN_FULL, GATHERED_FULL, GATHERED_EMPTY)),
]


def first_that_is_not_right(outcome, is_right, fault):
    return next((found for seed in SEEDS if (found := outcome(is_right, seed, fault)) != "right"), "right")


@pytest.mark.parametrize(("fault", "said"), OF_BOTH + OF_ALL + OF_ANY_STRIP + OF_TURNS)
def test_faults_of_a_strip(outcome, fault, said):
    assert re.match(said, first_that_is_not_right(outcome, ranked(512, 5), fault))


@pytest.mark.parametrize(("fault", "said"), [*OF_BOTH, *OF_ALL, *OF_ANY_STRIP, (f"no_arrival:{LEAD}", WAITS_FOR_EVER)])
def test_faults_of_wide_tiles(outcome, fault, said):
    assert re.match(said, first_that_is_not_right(outcome, ranked(512, 1), fault))


@pytest.mark.parametrize(("fault", "said"), OF_BOTH + OF_ALL + OF_GRADIENT)
def test_faults_of_a_gradient(outcome, fault, said):
    assert re.match(said, first_that_is_not_right(outcome, differentiated(300), fault))


@pytest.mark.parametrize(
    ("gradients", "fault", "said"),
    [
        *((True, *fault) for fault in OF_ALL + OF_GATHERED),
        *((False, *fault) for fault in OF_ALL + OF_GATHERED_PRODUCTS),
    ],
)
def test_faults_of_gathered_rows(outcome, gradients, fault, said):
    is_right = sampled(200, gradients)
    assert outcome(is_right, 0) == "right"
    assert re.match(said, first_that_is_not_right(outcome, is_right, fault))


@pytest.mark.parametrize("fault", ["no_write_fence:0", "right_leading:0"])
@pytest.mark.parametrize("k", [1, 5])
def test_what_cannot_matter_to_a_strip(outcome, k, fault):
    """It writes no operands itself, and its operands are K-major."""
    assert first_that_is_not_right(outcome, ranked(512, k), fault) == "right"


def test_wide_tiles_without_a_lead(outcome):
    """Which group is ahead changes when the work is done, not what comes of it."""
    assert first_that_is_not_right(outcome, ranked(512, 1), f"no_wait:{LEAD}") == "right"
