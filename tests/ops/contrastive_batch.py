"""Problems of `contrastive` by option, for its tests."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch.nn.functional import normalize

from hpkernels import Labels, PairLists, PositiveMask, contrastive
from hpkernels.testing import (
    available_cases,
)
from tests.ops.oracles import contrastive_of_pairs

OP = "contrastive"
CASES = available_cases(OP, (torch.float64, torch.float32, torch.float16, torch.bfloat16))
EXACT_CASES = available_cases(OP, (torch.float64,))
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_exact_case = pytest.mark.parametrize("case", EXACT_CASES, ids=str)

OPTIONS = {
    "plain": {},
    "own": {"own": True},
    "own-inside-decoupled": {"own": True, "positive_aggregation": "inside", "denominator": "negatives"},
    "own-lists": {"own": True, "lists": True, "excluding": "lists"},
    "own-each": {"own": True, "excluding": "labels", "reduction": "none"},
    "both": {"both_directions": True, "key_bias": True, "excluding": "mask", "exclude_positives": False},
    "both-inside-lists": {"both_directions": True, "positive_aggregation": "inside", "lists": True, "reduction": "sum"},
    "weights": {"lists": True, "weighted": True, "key_bias": True, "excluding": "labels", "denominator": "negatives"},
    "sum": {"reduction": "sum", "excluding": "lists", "exclude_positives": False, "positive_aggregation": "inside"},
    "each": {"reduction": "none", "lists": True, "weighted": True, "key_bias": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def values_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def lists_of(weights, weighted=True):
    """The pairs of positive weight (N, K), the keys of each anchor in descending order."""
    taken = weights > 0
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), taken.sum(dim=1).cumsum(0)))
    rows, columns = taken.flip(1).nonzero().T
    columns = weights.shape[1] - 1 - columns
    return PairLists(offsets, columns, weights[rows, columns] if weighted else None)


def moved(pairs, device):
    if isinstance(pairs, tuple):
        return tuple(moved(part, device) for part in pairs)
    if isinstance(pairs, PositiveMask):
        return pairs.to(device)
    fields = {name: value if value is None else value.to(device) for name, value in vars(pairs).items()}
    return type(pairs)(**fields)


class Batch:
    """Anchors 0 and 1 have no positives, key 0 is nobody's; of weighted lists some weights are 0."""

    def __init__(
        self, case, own=False, lists=False, weighted=False, key_bias=False, excluding=None, anchors=37, keys=45, dim=6,
        classes=5, length=1.0, seed=0, **options,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        keys = anchors if own else keys

        def random(*shape):
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        def vectors(count):
            rows = normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64))
            return (length * rows).to(case.device, case.dtype)

        self.case, self.options = case, {"temperature": 0.3, **options}
        self.anchors, self.keys = vectors(anchors), None if own else vectors(keys)
        anchor_ids = torch.randint(classes, (anchors,), generator=generator)
        key_ids = anchor_ids.clone() if own else torch.randint(classes, (keys,), generator=generator)
        anchor_ids[:2], key_ids[:1] = -1, -2
        key_ids = anchor_ids if own else key_ids
        self.weights = ((anchor_ids[:, None] == key_ids) & (key_ids >= 0)).double()
        self.positives = Labels(anchor_ids, None if own else key_ids)
        if lists:
            listed = random(anchors, keys).where(random(anchors, keys) < 0.2, 0.0) * 2
            listed = listed if weighted else (listed > 0).double()
            listed[:2] = 0
            self.weights = torch.maximum(self.weights, listed)
            self.positives = (self.positives, lists_of(listed.to(values_dtype(case.dtype)), weighted))
            self.weights = self.weights.to(values_dtype(case.dtype)).double()
        self.excluded = torch.zeros(anchors, keys, dtype=torch.bool)
        if excluding == "labels":
            documents = [torch.randint(9, (count, 2), generator=generator) for count in (anchors, keys)]
            documents[1] = documents[0] if own else documents[1]
            self.excluded = (documents[0][:, None] == documents[1]).any(dim=2)
            exclude = Labels(documents[0], None if own else documents[1])
        elif excluding is not None:
            self.excluded = random(anchors, keys) < 0.3
            if own:
                self.excluded.fill_diagonal_(False)
            exclude = lists_of(self.excluded.double(), weighted=False) if excluding == "lists" else self._mask(own)
        if excluding is not None:
            self.options["exclude"] = moved(exclude, case.device)
        self.positives = moved(self.positives, case.device)
        accumulate = values_dtype(case.dtype)
        self.key_bias = (random(keys) - 0.5).to(case.device, accumulate) if key_bias else None
        if options.get("reduction") != "none" and not own:
            self.options["anchor_weight"] = random(anchors).to(case.device, accumulate)
        self.temperature = torch.tensor(self.options.pop("temperature"), device=case.device, dtype=accumulate)
        cotangent = random(anchors).to(accumulate) if options.get("reduction") == "none" else torch.tensor(1.5)
        self.cotangent = cotangent.to(case.device)  # while a CUDA graph is captured nothing can be copied there

    def _mask(self, own):
        return PositiveMask.from_dense(self.excluded) if own else PositiveMask.from_dense(self.excluded, keys=True)

    def inputs(self, device=None, dtype=None):
        """Leaves: anchors, keys, temperature and bias, those that there are."""
        values = {
            "anchors": self.anchors,
            "keys": self.keys,
            "temperature": self.temperature,
            "key_bias": self.key_bias,
        }
        return {
            name: value.detach().to(device or value.device, dtype or value.dtype).requires_grad_()
            for name, value in values.items()
            if value is not None
        }

    def rounding_of_g(self, name):
        """What sums over g may be off where it is rounded to half precision, as Triton's is."""
        if self.case.backend != "triton" or self.case.dtype == torch.float32:
            return 0.0
        losses = len(self.anchors) if self.options.get("reduction") in ("sum", "none") else 1.5
        longest = self.anchors.double().norm(dim=1).max().item() ** 2 / self.temperature.item() ** 2
        return 2 * torch.finfo(self.case.dtype).eps * losses * (longest if name == "temperature" else 1.0)

    def call(self, backend=None, **inputs):
        return contrastive(**inputs, positives=self.positives, **self.options, backend=backend or self.case.backend)

    def result(self, **options):
        """The loss, and its gradients by name."""
        return self._differentiated(partial(self.call, **options), self.inputs(), self.anchors.device)

    def oracle(self, dtype, oracle=contrastive_of_pairs):
        """The same in `dtype`, on the CPU."""
        options = {name: value for name, value in self.options.items() if name != "exclude"}
        if "anchor_weight" in options:
            options["anchor_weight"] = options["anchor_weight"].cpu()

        def call(anchors, keys=None, **inputs):
            return oracle(anchors, keys, self.weights.to(dtype), self.excluded, **options, **inputs)

        return self._differentiated(call, self.inputs("cpu", dtype), "cpu")

    def _differentiated(self, call, inputs, device):
        loss = call(**inputs)
        cotangent = self.cotangent.to(device, loss.dtype)
        return loss.detach(), dict(
            zip(
                inputs, torch.autograd.grad(loss, list(inputs.values()), cotangent, materialize_grads=True), strict=True
            )
        )


A, K = torch.eye(4, 3), torch.eye(5, 3)
L = Labels(torch.arange(4), torch.arange(5))
OFFSETS, INDICES = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([4, 0, 1])
LARGE = torch.full((5,), 1e300, dtype=torch.float64)
