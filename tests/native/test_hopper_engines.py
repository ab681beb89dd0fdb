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
    expected = discovery.forward(features.double(), threshold.double())
    find = backends.implementation("hidden_positives", "cuda").forward
    return lambda: torch.equal(find(features, threshold), expected)


@functools.cache
def differentiated(dim, anchors=315):
    """Whether a gradient is that of the first call bit by bit, which is near the right one. All pairs are negatives."""
    z = random_problem(images=3, height=7, width=15, dim=dim, dtype=torch.float16).z
    image = torch.arange(anchors) // 105
    mask = (image == image[:, None]).fill_diagonal_(False)
    bits = PositiveMask.from_dense(mask).bits
    kernels = backends.implementation("multi_positive_contrastive", "cuda")
    seed, no_weight = torch.tensor(0), torch.tensor(0.0)
    losses, rows = kernels.forward([z], bits, None, no_weight, None, seed, 105, 0.3, 1.0, 1.0, "joint", False, False)
    grad = torch.ones_like(losses)

    def backward():
        return kernels.backward(grad, [z], bits, None, None, seed, rows, 105, 0.3, 1.0, True)[0]

    first = backward()
    leaf = z.double().requires_grad_()
    logits = (leaf @ leaf.T / 0.3).masked_fill(torch.eye(anchors, dtype=torch.bool), -torch.inf)
    log_probability = logits.log_softmax(1).masked_fill(~mask, 0)
    (-log_probability.sum(1) / mask.sum(1)).mean().backward()
    assert torch.linalg.vector_norm(first - leaf.grad) < 2e-3 * torch.linalg.vector_norm(leaf.grad)
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
# And of gradients: own_full, then ready, full and empty of each side, of the first half of the columns.
OWN_FULL, READY, QUARTER_FULL, QUARTER_EMPTY = 0, 1, 2, 3
# Where both factors get gradients there is also done, of each half.
DONE, GATHERED_FULL, GATHERED_EMPTY = 2, 3, 4

WAITS_FOR_EVER = "deadlock: .* threads at barrier"
TOO_MANY = "more arrivals than a phase has"
ANY = f"wrong|{TOO_MANY}|{WAITS_FOR_EVER}"
EXPECTED_LESS = "more bytes came than were expected"
OF_BOTH = [
    ("no_swizzle:0", "wrong"),
    ("no_barrier_fence:0", "TMA uses a barrier without a fence"),
    ("early_release:0", "wrong"),
]
OF_ALL = [
    ("left_stride:0", "wrong|wgmma reads beyond shared memory"),
    ("right_stride:0", "wrong|wgmma reads beyond shared memory"),
    ("right_start:0", "wrong"),
    ("no_begin:0", "wgmma without wgmma.fence"),
    ("no_commit:0", "a warp ends before its products|accumulators are written"),
    ("no_wait_for_products:0", "a warp ends before its products"),
]
OF_STRIP = [
    *((f"no_wait:{barrier}", ANY) for barrier in (STRIP, FULL, EMPTY, TURN, OTHER_TURN)),
    *((f"other_phase:{barrier}", ANY) for barrier in (STRIP, FULL, EMPTY, TURN)),
    *((f"no_arrival:{barrier}", WAITS_FOR_EVER) for barrier in (STRIP, FULL, EMPTY, TURN)),
    *((f"two_arrivals:{barrier}", TOO_MANY) for barrier in (STRIP, FULL)),
    *((f"two_arrivals:{barrier}", ANY) for barrier in (EMPTY, TURN)),
    *((f"fewer_bytes:{barrier}", EXPECTED_LESS) for barrier in (STRIP, FULL)),
    *((f"more_bytes:{barrier}", WAITS_FOR_EVER) for barrier in (STRIP, FULL)),
]
OF_GRADIENT = [
    ("no_write_fence:0", "wrong"),
    ("one_write_fence:0", "wrong"),
    ("right_leading:0", "wrong|wgmma reads beyond shared memory"),
    *((f"no_wait:{barrier}", ANY) for barrier in (OWN_FULL, READY, QUARTER_FULL, QUARTER_EMPTY)),
    *((f"no_arrival:{barrier}", WAITS_FOR_EVER) for barrier in (OWN_FULL, READY, QUARTER_FULL, QUARTER_EMPTY)),
    *((f"two_arrivals:{barrier}", ANY) for barrier in (READY, QUARTER_EMPTY)),
    *((f"fewer_bytes:{barrier}", EXPECTED_LESS) for barrier in (OWN_FULL, QUARTER_FULL)),
    *((f"more_bytes:{barrier}", WAITS_FOR_EVER) for barrier in (OWN_FULL, QUARTER_FULL)),
]
GATHERED = (OWN_FULL, READY, DONE, GATHERED_FULL, GATHERED_EMPTY)
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


@pytest.mark.parametrize(("fault", "said"), OF_BOTH + OF_ALL + OF_STRIP)
def test_faults_of_a_strip(outcome, fault, said):
    assert re.match(said, first_that_is_not_right(outcome, ranked(512, 5), fault))


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
def test_what_cannot_matter_to_a_strip(outcome, fault):
    """It writes no operands itself, and its operands are K-major."""
    assert first_that_is_not_right(outcome, ranked(512, 5), fault) == "right"
