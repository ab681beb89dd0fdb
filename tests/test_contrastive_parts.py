"""`multi_positive_contrastive` of a part of the anchors, as a rank of many devices computes it: every backend."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from hpkernels.ops._bits import pack_bits
from hpkernels.ops._checks import FLOATING
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.multi_positive_contrastive import cpu, reference, registration
from hpkernels.testing import assert_rows_close, available_cases

OP = "multi_positive_contrastive"
CASES = available_cases(OP, FLOATING)
IMAGES, GROUP, DIM = 5, 21, 20  # no part but the first starts with a word
ANCHORS = IMAGES * GROUP
PARTS = ((0, 2), (2, 1), (3, 2))  # first image and number of images
WHOLE = ((0, IMAGES),)
TEMPERATURE, SCALE, WEIGHT = 0.3, 1.5, 0.7
COTANGENT = torch.tensor([0.5, 2.0], dtype=torch.float64)
# rate, variant, reweight, keep_specific_only, symmetric
SETTINGS = {
    "joint": (0.1, "joint", True, False, True),
    "separate": (0.3, "separate", False, False, True),
    "not symmetric": (0.1, "separate", True, False, False),
    "every negative": (1.0, "joint", False, True, False),
    "no negative": (0.0, "joint", True, False, True),
}


class Batch:
    """Two branches, A and S, of which an image has none in A and another none in S."""

    def __init__(self, case, setting):
        self.rate, self.variant, self.reweight, self.keep, self.symmetric = SETTINGS[setting]
        self.backend, generator = case.backend, torch.Generator().manual_seed(0)
        z = normalize(torch.randn(2, ANCHORS, DIM, generator=generator, dtype=torch.float64), dim=2)
        self.z = z.to(case.device, case.dtype)
        image = torch.arange(ANCHORS) // GROUP
        density = torch.where(image == image[:, None], 0.1, 0.02)
        self.masks = [torch.rand(density.shape, generator=generator) < density for _ in range(2)]
        for without, mask in zip((1, 4), self.masks, strict=True):
            if self.symmetric:
                mask |= mask.T.clone()
            mask[image == without] = mask[:, image == without] = False
            mask.fill_diagonal_(False)
        self.bits = [pack_bits(mask.to(case.device)) for mask in self.masks]
        self.transposed = [pack_bits(mask.T.to(case.device)) for mask in self.masks]
        accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
        self.weight = torch.tensor(WEIGHT, dtype=accumulate, device=case.device)
        self.seed = torch.tensor(5, device=case.device)

    def found(self, parts):
        """Losses, row statistics and gradients of both branches, and images with a kept anchor, put together."""
        weighting, drawn = (self.variant, self.reweight, self.keep, self.symmetric), (None, self.seed)
        relations, images = [], torch.zeros(2, dtype=torch.int64, device=self.z.device)
        for image, count in parts:
            own = slice(image * GROUP, (image + count) * GROUP)
            masks = [bits[own] for bits in self.bits]
            pairs = registration.contrastive_pairs(
                *(*masks, self.weight, *drawn, GROUP, self.rate, *weighting),
                *(DIM * self.z.element_size(), ANCHORS, own.start, self.backend),
            )
            relations.append((own, masks, (*drawn, pairs)))
            if parts != WHOLE:
                images += registration.images_of(pairs, self.backend)
        forward = [
            registration.multi_positive_contrastive(
                *(*self.z, *masks, self.weight, *of_pairs, GROUP, TEMPERATURE, SCALE, self.rate, *weighting),
                *(None if parts == WHOLE else images, own.start, self.backend),
            )
            for own, masks, of_pairs in relations
        ]
        losses = torch.stack([losses for losses, _ in forward]).sum(dim=0)
        rows = torch.cat([rows for _, rows in forward], dim=1)
        backward = []
        for own, masks, of_pairs in relations:
            by_columns = (None, None)
            if not self.symmetric and parts != WHOLE:
                by_columns = [bits[own] for bits in self.transposed]
            grads = registration.multi_positive_contrastive_backward(
                *(COTANGENT.to(losses), *self.z, *masks, *of_pairs, rows, GROUP, TEMPERATURE, self.rate),
                *(self.symmetric, *by_columns, own.start, self.backend),
            )
            backward.append(torch.stack(grads))
        return losses, rows, torch.cat(backward, dim=1), images

    def expected(self, dtype):
        """The same but for the images by the specification, in a dtype."""
        leaf = self.z.detach().cpu().to(dtype).requires_grad_()
        drawn = bernoulli(torch.tensor(5), GROUP, ANCHORS, self.rate)
        options = {"anchors_per_image": GROUP, "temperature": TEMPERATURE, "scale": SCALE, "variant": self.variant}
        options |= {"reweight": self.reweight, "keep_specific_only": self.keep}
        branches = [reference.contrastive_loss(z, *self.masks, WEIGHT, drawn, **options) for z in leaf]
        losses, rows = (torch.stack(of_branches) for of_branches in zip(*branches, strict=True))
        return losses.detach(), rows.detach(), torch.autograd.grad(losses, leaf, COTANGENT.to(dtype))[0]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_make_the_whole(case, setting):
    """Losses, the statistics of each row and its gradient are those of all anchors."""
    batch = Batch(case, setting)
    *found, images = batch.found(PARTS)
    # An image has no A, and another no S: where that keeps an anchor, the first counts as well.
    assert images.tolist() == ([5, 5] if batch.keep else [4, 4])
    plain_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    names = ("losses", "rows", "gradients")
    for name, actual, exact, plain in zip(
        names, found, batch.expected(torch.float64), batch.expected(plain_dtype), strict=True
    ):
        dim = 1 if name == "losses" else actual.shape[-1]
        plain = plain.to(actual.dtype)
        assert_rows_close(actual.cpu().reshape(-1, dim), exact.reshape(-1, dim), plain.reshape(-1, dim))


@pytest.mark.parametrize("setting", ["joint", "not symmetric"])
@pytest.mark.parametrize("route", ["pairs", "images"])
@pytest.mark.parametrize("case", [case for case in CASES if case.backend == "cpu"], ids=str)
def test_statistics_have_the_bits_of_the_whole(case, route, setting, monkeypatch):
    """Where a row's pairs are summed by themselves, in the order of their columns."""
    monkeypatch.setattr(cpu, "choose_route", lambda *_: route)
    batch = Batch(case, setting)
    (losses, rows, grads, _), (whole_losses, whole_rows, whole_grads, _) = batch.found(PARTS), batch.found(WHOLE)
    assert torch.equal(rows, whole_rows)
    rounding = {"rtol": 0, "atol": 8 * torch.finfo(whole_grads.dtype).eps * whole_grads.abs().max().item()}
    torch.testing.assert_close(grads, whole_grads, **rounding)
    torch.testing.assert_close(losses, whole_losses)


@pytest.mark.parametrize("route", ["pairs", "images", "blocks"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", [case for case in CASES if case.backend == "cpu"][-1:], ids=str)
def test_routes_of_a_part(case, route, setting, monkeypatch):
    monkeypatch.setattr(cpu, "choose_route", lambda *_: route)
    monkeypatch.setattr(cpu, "_SIDE", 2 * GROUP)  # several blocks, which do not end with the parts
    test_parts_make_the_whole(case, setting)


def test_a_part_has_no_gradient_of_its_own():
    """Which would need the statistics of all anchors."""
    batch = Batch(next(case for case in CASES if case.backend == "reference"), "joint")
    z, mixed = batch.z.requires_grad_()
    masks, images = [bits[:GROUP] for bits in batch.bits], torch.tensor([IMAGES, IMAGES])
    drawn, weighting = (None, batch.seed, []), ("joint", True, False, True)
    losses, _ = registration.multi_positive_contrastive(
        z, mixed, *masks, batch.weight, *drawn, GROUP, 0.3, 1.0, 0.1, *weighting, images, 0, "reference"
    )
    with pytest.raises(RuntimeError, match="a part has not the statistics that backward takes"):
        losses.sum().backward()
