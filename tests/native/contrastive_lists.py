"""Lists as the CUDA kernels of `multi_positive_contrastive` take them, made by PyTorch."""

from __future__ import annotations

import torch

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
