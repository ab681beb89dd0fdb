"""The CUDA kernels of `multi_positive_contrastive` over tiles of all pairs, and of those within images, row by row."""

from __future__ import annotations

import pytest
import torch

from hpkernels import backends
from hpkernels.ops import _cuda
from hpkernels.ops._bits import as_bits
from hpkernels.ops._cuda import aligned_rows
from hpkernels.ops.multi_positive_contrastive import routes
from hpkernels.testing import assert_rows_close, available_cases, random_problem

OP = "multi_positive_contrastive"
CASES = [case for case in available_cases(OP, _cuda.DTYPES) if case.backend == "cuda"]
pytestmark = pytest.mark.skipif(
    not CASES, reason=backends.availability(OP, "cuda", "cuda" if torch.cuda.is_available() else "cpu").reason
)
kernels = torch.ops.hpkernels_cuda
IMAGES = 3
# Rows of several steps of a product, and more features than a block has sums of.
LONG = {torch.float16: 300, torch.bfloat16: 72, torch.float32: 140}


class Pairs:
    """Anchors, relations and made-up row statistics, of all pairs or of those within images.

    With `first` the rows are a part of the anchors, from that image on.
    """

    def __init__(
        self,
        case,
        dim,
        *,
        within,
        size=(7, 15),
        length=1.0,
        temperature=0.3,
        drawn=True,
        specific=True,
        symmetric=True,
        shared=True,
        first=0,
    ):
        sizes = {"images": IMAGES, "height": size[0], "width": size[1], "dim": dim}
        self.z = length * random_problem(**sizes, dtype=case.dtype, device=case.device).z
        self.group, self.scale = size[0] * size[1], 1 / temperature
        self.within, self.symmetric, self.shared = within, symmetric, shared
        generator = torch.Generator().manual_seed(0)
        anchors = len(self.z)
        self.first = first * self.group

        def draw(*shape):
            return torch.rand(shape, generator=generator)

        def relation(density):
            mask = draw(anchors, anchors) < density  # an anchor may be a positive of its own
            return mask | mask.T if symmetric else mask

        image = torch.arange(anchors) // self.group
        inside = (image == image[:, None]) | torch.tensor(not within)
        self.positives = relation(0.05)
        self.specific = relation(0.02) if specific else None
        self.negatives = draw(self.group, anchors) < 0.2 if drawn else None
        negatives = torch.ones(self.group, anchors, dtype=torch.bool) if self.negatives is None else self.negatives
        self.agnostic = self.positives & inside
        self.task = (torch.zeros_like(inside) if self.specific is None else self.specific) & inside
        self.denominator = (self.positives | negatives.repeat(IMAGES, 1)) & inside & ~torch.eye(anchors).bool()
        self.coefficients = 2.0**10 * draw(anchors, 3).double()
        self.factor = 0.37

    def bits(self, mask, first=0):
        return None if mask is None else as_bits(mask[first:].to(self.z.device))

    def transposed(self):
        """Of a part that is not symmetric, what the kernels read by columns."""
        if self.symmetric or self.first == 0:
            return None, None
        rows = (self.bits(None if mask is None else mask.T, self.first) for mask in (self.positives, self.specific))
        return [None if of is None else routes._by_columns(of, len(self.z), self.first) for of in rows]

    def arguments(self, dropped=False, has_lists=False):
        state = torch.tensor([int(dropped), 0, 0, 0, 0], device=self.z.device)
        masks = (self.bits(self.positives, self.first), self.bits(self.specific, self.first), self.bits(self.negatives))
        return aligned_rows(self.z), *masks, state, self.group, self.first, self.within, has_lists

    def square(self):
        finite = self.z.isfinite().all()
        return (self.z.float() ** 2).sum(dim=1).max() if finite else torch.tensor(torch.nan, device=self.z.device)

    def forward(self, **options):
        """What the kernel says of each row, (3, N), put together from its parts."""
        rows = len(self.z) - self.first
        parts = kernels.contrastive_blocks_parts(len(self.z), self.group, self.within, self.first, rows)
        parts = torch.full((parts, 3, rows), -7.0, device=self.z.device)
        kernels.contrastive_blocks_forward(*self.arguments(**options), self.scale, self.square(), parts)
        return torch.cat((parts[:, :1].logsumexp(dim=0), parts[:, 1:].sum(dim=0)))

    def expected_forward(self, dtype):
        logits = self.logits(dtype)
        log_sum = logits.masked_fill(~self.denominator, -torch.inf).logsumexp(dim=1)
        return torch.stack((log_sum, *(logits.where(mask, 0).sum(dim=1) for mask in (self.agnostic, self.task))))

    def logits(self, dtype):
        z = self.z.cpu().to(dtype)
        return z @ z.T * self.scale

    def backward(self, **options):
        of_part = self.forward()[0].cpu().double()
        log_sums = torch.cat((self.expected_forward(torch.float64)[0][: self.first], of_part))
        shift = log_sums.max() if self.shared else torch.tensor(torch.nan)
        shifts = shift.expand(len(self.z)) if self.shared else log_sums
        push, *pulls = self.coefficients.unbind(dim=1)
        numbers = torch.stack((shifts, push * (shifts - log_sums).exp(), *pulls), dim=1)
        given = (of.float().to(self.z.device).contiguous() for of in (numbers, shift, torch.tensor(self.factor)))
        like = aligned_rows(self.z).float() if self.within else self.z
        sums = torch.full_like(like[self.first :], -7, memory_format=torch.contiguous_format)
        of_masks = (*self.arguments(**options), self.symmetric, *self.transposed())
        kernels.contrastive_blocks_backward(*of_masks, self.scale, *given, sums)
        return sums[:, : self.z.shape[1]]

    def expected_backward(self, dtype, rounded=False):
        push, pull, specific = self.coefficients.to(dtype).unbind(dim=1)
        log_sums = self.expected_forward(dtype)[0]
        g = push[:, None] * (self.logits(dtype) - log_sums[:, None]).exp().where(self.denominator, 0)
        g = g - pull[:, None] * self.agnostic - specific[:, None] * self.task
        g = g + g.T
        if rounded:  # as the kernels do
            g = g.to(self.z.dtype).to(dtype)
        sums = g @ self.z.cpu().to(dtype)
        return sums if self.within else sums * self.factor

    def check(self):
        own = slice(self.first, None)
        for actual, exact, plain in zip(
            self.forward(), self.expected_forward(torch.float64), self.expected_forward(torch.float32), strict=True
        ):
            assert_rows_close(actual.cpu(), exact[own], plain[own])
        actual, exact = self.backward(), self.expected_backward(torch.float64)
        plain = self.expected_backward(torch.float32, rounded=True).to(actual.dtype)
        assert_rows_close(actual.cpu(), exact[own], plain[own])
        assert torch.equal(self.backward(), actual)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("within", [False, True], ids=["all", "within"])
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "every negative"])
def test_of_several_tiles(engine, case, within, drawn):
    Pairs(case, LONG[case.dtype], within=within, drawn=drawn).check()


@pytest.mark.parametrize("within", [False, True], ids=["all", "within"])
def test_words_in_fours(one_case, within):
    """Four words of a mask are read at once; images of 105 anchors start within words."""
    Pairs(one_case, 24, within=within, size=(8, 16)).check()


@pytest.mark.parametrize("within", [False, True], ids=["all", "within"])
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "every negative"])
def test_logits_far_apart(one_case, within, drawn):
    """Then the kernels keep the greatest logit of each row, and g_ij and g_ji take an exponential each."""
    Pairs(one_case, 24, within=within, drawn=drawn, temperature=0.01, shared=False).check()
    Pairs(one_case, 24, within=within, drawn=drawn, temperature=0.01).check()  # as the shift is large


def test_large_logits():
    """Of thousands: many a probability is 1, which it is only if log-sums and logits are rounded alike."""
    case = next(case for case in CASES if case.dtype == torch.float32)  # others round more
    Pairs(case, 24, within=False, length=30.0, temperature=0.07, shared=False).check()


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "every negative"])
def test_masks_that_are_not_symmetric(one_case, drawn):
    for within in (False, True):
        Pairs(one_case, 20, within=within, drawn=drawn, symmetric=False, specific=drawn).check()


@pytest.mark.parametrize("first", [1, 2], ids=["two images", "one image"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "not symmetric"])
def test_rows_of_a_part(one_case, first, symmetric):
    """Of some images, which start within a word, against all anchors."""
    drawn = symmetric == (first == 1)
    Pairs(one_case, 24, within=False, first=first, symmetric=symmetric, drawn=drawn, specific=first == 1).check()


def test_one_mask_and_odd_rows(one_case):
    """Without S; of rows that are padded, the gradient has the features of the branch."""
    for within in (False, True):
        Pairs(one_case, 13, within=within, specific=False).check()


@pytest.mark.parametrize("within", [False, True], ids=["all", "within"])
def test_the_route_that_is_not_taken_writes_nothing(one_case, within):
    pairs = Pairs(one_case, 8, within=within)
    taken = {"has_lists": True, "dropped": not within}
    other = {"has_lists": True, "dropped": within}
    assert torch.equal(pairs.forward(**taken), pairs.forward(has_lists=within))
    assert (pairs.forward(**other)[1:] % 7 == 0).all()
    assert torch.equal(pairs.backward(**taken), pairs.backward(has_lists=within))
    assert (pairs.backward(**other) == -7).all()


def test_a_row_without_pairs(one_case):
    """Its log-sum is -inf."""
    pairs = Pairs(one_case, 8, within=False)
    pairs.positives[:] = False
    pairs.negatives[:] = False
    pairs.positives[40, 7] = pairs.positives[7, 40] = True
    found = pairs.forward()[0].cpu()
    assert found.isfinite().nonzero().flatten().tolist() == [7, 40]
    assert (found[~found.isfinite()] == -torch.inf).all()


def test_what_is_not_finite_is_not_silent(one_case):
    pairs = Pairs(one_case, 8, within=False, drawn=False)
    pairs.z[40, 3] = torch.nan
    assert pairs.forward()[0].isnan().all()
