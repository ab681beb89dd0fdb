"""Lists as the CUDA kernels of `multi_positive_contrastive` take them, made by PyTorch."""

from __future__ import annotations

import torch

from hpkernels.ops._cuda import aligned_rows

SCALE = 1.7  # of logits
_BEFORE = 3  # entries that belong to no row


def listed(mask, generator):
    """``ranges, columns`` of the set bits of each row; rows are in any order, each ascending."""
    order = torch.randperm(len(mask), generator=generator).tolist()
    lengths = mask.sum(dim=1).cpu()
    ranges = torch.empty(len(mask), 2, dtype=torch.int64)
    ranges[order, 1] = _BEFORE + lengths[order].cumsum(0)
    ranges[:, 0] = ranges[:, 1] - lengths
    columns = torch.cat([torch.full((_BEFORE,), -1), *(mask[row].nonzero()[:, 0].cpu() for row in order)])
    return ranges.to(mask.device), columns.int().to(mask.device)


def slots_of(ranges, columns, anchors, stages, generator):
    """``slots, slot_ranges, taken`` of the entries of lists by patch position; `taken` places of each stage."""
    slots = torch.full_like(columns, -1).cpu()
    slot_ranges = torch.zeros(anchors, 2, dtype=torch.int64)
    by_column = {column: [] for column in range(anchors)}
    for first, end in ranges.tolist():  # in the order of positions
        for entry in range(first, end):
            by_column[int(columns[entry])].append(entry)
    taken = []
    for stage in torch.arange(anchors).split(-(-anchors // stages)):
        place = 0
        for column in stage[torch.randperm(len(stage), generator=generator)].tolist():
            entries = by_column[column]
            slots[entries] = torch.arange(place, place + len(entries), dtype=torch.int32)
            slot_ranges[column] = torch.tensor([place, place + len(entries)])
            place += len(entries)
        taken.append(place)
    return slots.to(columns.device), slot_ranges.to(columns.device), taken


class Sampled:
    """Drawn columns of each patch position; a position without any, and one with all."""

    def __init__(self, case, images, group, dim, rate, stages=1):
        self.generator, self.group, self.anchors = torch.Generator().manual_seed(dim), group, images * group
        z = torch.randn(self.anchors, dim, generator=self.generator) / dim**0.5
        self.rows = aligned_rows(z.to(case.device, case.dtype))
        drawn = torch.rand(group, self.anchors, generator=self.generator) < rate
        drawn[-1] = True
        drawn[0] = False
        image = torch.arange(self.anchors) // group
        self.across = (drawn.repeat(images, 1) & (image[:, None] != image)).to(case.device)
        self.lists = listed(drawn.to(case.device), self.generator)
        slots = slots_of(*self.lists, self.anchors, stages, self.generator)
        self.slots, self.slot_ranges, self.taken = slots
        self.state = torch.zeros(6, dtype=torch.int64, device=case.device)
        self.numbers = torch.rand(self.anchors, 4, generator=self.generator).to(case.device)
        self.numbers[:, 1] *= 2.0**10
        width = -(-self.anchors // stages)
        self.stages = [(first, min(first + width, self.anchors)) for first in range(0, self.anchors, width)]

    def logits(self):
        rows = self.rows.double()
        return SCALE * rows @ rows.T

    def log_sums(self, found):
        inputs = (self.rows, self.group, *self.lists, self.state, SCALE)
        torch.ops.hpkernels_cuda.contrastive_sampled_forward(*inputs, found)
        return found

    def check_forward(self):
        """The log sums against those of all products; a position without columns has none."""
        found = self.log_sums(torch.full((self.anchors,), torch.nan, device=self.rows.device))
        expected = self.logits().masked_fill(~self.across, -torch.inf).logsumexp(dim=1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert (found[:: self.group] == -torch.inf).all()

    def backward(self, stage, sums, staged):
        lists = (*self.lists, self.slots, self.state, *self.stages[stage])
        torch.ops.hpkernels_cuda.contrastive_sampled_backward(
            self.rows, self.group, *lists, SCALE, self.numbers, sums, staged
        )

    def room(self, stage):
        """For what is staged, and for a place more."""
        shape = (
            self.taken[stage] + 1,
            torch.ops.hpkernels_cuda.contrastive_staged_rows(self.rows, self.group),
            self.rows.shape[1],
        )
        return torch.full(shape, torch.nan, device=self.rows.device, dtype=self.rows.dtype)

    def check_backward(self):
        """Each gradient within the rounding of its summands; returns what was found."""
        r, f = self.numbers.double()[:, :2, None].unbind(dim=1)
        g = (f * (self.logits() - r).exp()).where(self.across, 0)
        rows = self.rows.double()
        epsilon = max(torch.finfo(self.rows.dtype).eps, 4e-6)
        sums = torch.randn(rows.shape, generator=self.generator).to(rows.device)
        found = []
        for stage, (first, last) in enumerate(self.stages):
            before, staged = sums.double(), self.room(stage)
            self.backward(stage, sums, staged)
            assert staged[-1].isnan().all()
            of_stage = g[:, first:last]
            summands = of_stage.abs() @ rows[first:last].abs() + before.abs()
            assert ((sums.double() - before - of_stage @ rows[first:last]).abs() <= epsilon * summands).all()
            columns = torch.stack(
                [staged[slice(*self.slot_ranges[column])].double().sum(dim=(0, 1)) for column in range(first, last)]
            )
            assert ((columns - of_stage.T @ rows).abs() <= epsilon * (of_stage.T.abs() @ rows.abs()) + 1e-9).all()
            found += [sums.clone(), staged]
        return found
