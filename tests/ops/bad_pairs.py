"""Bad arguments of `contrastive`."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils.checkpoint

from hpkernels import Labels, PairLists, PositiveMask
from tests.ops.contrastive_batch import INDICES, LARGE, OFFSETS, A, K, L


def wrong_arguments():
    """Parameters (error, argument, got, options) for a valid call with four anchors and five keys."""
    return [
        pytest.param(TypeError, "anchors", "list", {"anchors": [[1.0]]}, id="anchors-list"),
        pytest.param(TypeError, "anchors", "int64 of shape (4, 3)", {"anchors": A.long()}, id="anchors-int"),
        pytest.param(ValueError, "anchors", "float32 of shape (3,)", {"anchors": A[0]}, id="anchors-rank"),
        pytest.param(ValueError, "anchors", "float32 of shape (0, 3)", {"anchors": A[:0]}, id="anchors-empty"),
        pytest.param(
            ValueError, "anchors", "nan in row 2", {"anchors": A.index_fill(0, torch.tensor(2), math.nan)}, id="nan"
        ),
        pytest.param(ValueError, "anchors", "inf in row 0", {"anchors": A / 0}, id="inf"),
        pytest.param(TypeError, "keys", "str", {"keys": "own"}, id="keys-str"),
        pytest.param(ValueError, "keys", "float32 of shape (5, 2)", {"keys": K[:, :2]}, id="keys-dim"),
        pytest.param(TypeError, "keys", "float64", {"keys": K.double()}, id="keys-dtype"),
        pytest.param(ValueError, "keys", "meta", {"keys": K.to("meta")}, id="keys-device"),
        pytest.param(ValueError, "keys", "nan in row 0", {"keys": K * math.nan}, id="keys-nan"),
        pytest.param(
            ValueError, "anchors` and `keys", "a loss of", {"anchors": A * 1e25, "keys": K * 1e25}, id="large"
        ),
        pytest.param(TypeError, "positives", "NoneType", {"positives": None}, id="positives-none"),
        pytest.param(TypeError, "positives", "list", {"positives": [L]}, id="positives-list"),
        pytest.param(ValueError, "positives", "an empty tuple", {"positives": ()}, id="positives-empty"),
        pytest.param(TypeError, "positives", "a tensor of torch.float32", {"positives": A}, id="positives-float"),
        pytest.param(TypeError, "positives", "(4, 5)", {"positives": torch.ones(4, 5).long()}, id="positives-int-mask"),
        pytest.param(TypeError, "positives[1]", "NoneType", {"positives": (L, None)}, id="positives-part"),
        pytest.param(ValueError, "positives.anchor_ids", "(3,)", {"positives": Labels(torch.arange(3))}, id="ids"),
        pytest.param(
            TypeError, "positives.anchor_ids", "float32", {"positives": Labels(torch.ones(4))}, id="ids-float"
        ),
        pytest.param(ValueError, "positives.key_ids", "None", {"positives": Labels(torch.arange(4))}, id="no-key-ids"),
        pytest.param(
            ValueError,
            "positives.key_ids",
            "(5, 1)",
            {"positives": Labels(torch.ones(4, 2).long(), torch.ones(5, 1).long())},
            id="id-columns",
        ),
        pytest.param(
            ValueError, "positives", "bool of shape (4, 4)", {"positives": torch.ones(4, 4).bool()}, id="dense"
        ),
        pytest.param(
            ValueError,
            "positives",
            "PositiveMask",
            {"positives": PositiveMask.from_labels(torch.arange(4))},
            id="square",
        ),
        pytest.param(
            ValueError, "positives.offsets", "(4,)", {"positives": PairLists(OFFSETS[1:], INDICES)}, id="offsets"
        ),
        pytest.param(
            ValueError,
            "positives.offsets",
            "that descend",
            {"positives": PairLists(torch.tensor([0, 2, 1, 2, 3]), INDICES)},
            id="descending",
        ),
        pytest.param(
            ValueError, "positives.offsets", "to 3", {"positives": PairLists(OFFSETS, INDICES[:2])}, id="short"
        ),
        pytest.param(
            ValueError, "positives.indices", "5", {"positives": PairLists(OFFSETS, INDICES + 1)}, id="indices"
        ),
        pytest.param(
            ValueError, "positives.indices", "-1", {"positives": PairLists(OFFSETS, INDICES - 1)}, id="negative"
        ),
        pytest.param(
            TypeError, "positives.indices", "int32", {"positives": PairLists(OFFSETS, INDICES.int())}, id="int32"
        ),
        pytest.param(
            ValueError,
            "positives.weights",
            "-1",
            {"positives": PairLists(OFFSETS, INDICES, -torch.ones(3))},
            id="weights",
        ),
        pytest.param(
            ValueError,
            "positives.weights",
            "nan",
            {"positives": PairLists(OFFSETS, INDICES, torch.ones(3) * math.nan)},
            id="weights-nan",
        ),
        pytest.param(
            ValueError,
            "positives.weights",
            "requires_grad=True",
            {"positives": PairLists(OFFSETS, INDICES, torch.ones(3, requires_grad=True))},
            id="weights-grad",
        ),
        pytest.param(
            TypeError, "positives.weights", "list", {"positives": PairLists(OFFSETS, INDICES, [1.0])}, id="list"
        ),
        pytest.param(
            TypeError,
            "positives.weights",
            "int64 of shape (0,)",
            {"positives": PairLists(torch.zeros(5).long(), INDICES[:0], INDICES[:0])},
            id="weights-empty-int",
        ),
        pytest.param(
            ValueError,
            "exclude.weights",
            "a tensor",
            {"exclude": PairLists(OFFSETS, INDICES, torch.ones(3))},
            id="excluded",
        ),
        pytest.param(
            ValueError, "exclude.anchor_ids", "meta", {"exclude": Labels(torch.ones(4).long().to("meta"))}, id="meta"
        ),
        pytest.param(TypeError, "exclude_positives", "int", {"exclude_positives": 1}, id="exclude-positives"),
        pytest.param(ValueError, "temperature", "0", {"temperature": 0}, id="temperature-0"),
        pytest.param(ValueError, "temperature", "-1", {"temperature": -1.0}, id="temperature-negative"),
        pytest.param(TypeError, "temperature", "NoneType", {"temperature": None}, id="temperature-none"),
        pytest.param(ValueError, "temperature", "0.0", {"temperature": torch.tensor(0.0)}, id="temperature-tensor"),
        pytest.param(ValueError, "temperature", "nan", {"temperature": torch.tensor(math.nan)}, id="temperature-nan"),
        pytest.param(ValueError, "temperature", "(1,)", {"temperature": torch.ones(1)}, id="temperature-shape"),
        pytest.param(ValueError, "key_bias", "(4,)", {"key_bias": torch.ones(4)}, id="bias"),
        pytest.param(ValueError, "key_bias", "inf", {"key_bias": torch.ones(5) / 0}, id="bias-inf"),
        pytest.param(ValueError, "key_bias", "inf", {"key_bias": LARGE[:5]}, id="bias-large"),
        pytest.param(
            ValueError,
            "anchor_weight",
            "inf",
            {"anchor_weight": LARGE[:4]},
            id="weight-large",
        ),
        pytest.param(
            ValueError,
            "positives.weights",
            "inf",
            {"positives": PairLists(OFFSETS, INDICES, LARGE[:3])},
            id="weights-large",
        ),
        pytest.param(ValueError, "anchor_weight", "(5,)", {"anchor_weight": torch.ones(5)}, id="weight"),
        pytest.param(ValueError, "anchor_weight", "-1", {"anchor_weight": -torch.ones(4)}, id="weight-negative"),
        pytest.param(
            ValueError,
            "anchor_weight",
            "requires_grad=True",
            {"anchor_weight": torch.ones(4, requires_grad=True)},
            id="weight-grad",
        ),
        pytest.param(ValueError, "positive_aggregation", "'in'", {"positive_aggregation": "in"}, id="aggregation"),
        pytest.param(ValueError, "denominator", "None", {"denominator": None}, id="denominator"),
        pytest.param(ValueError, "reduction", "'avg'", {"reduction": "avg"}, id="reduction"),
        pytest.param(ValueError, "reduction", "'none'", {"reduction": "none", "both_directions": True}, id="both-none"),
        pytest.param(TypeError, "both_directions", "int", {"both_directions": 1}, id="both"),
        pytest.param(TypeError, "return_statistics", "str", {"return_statistics": "yes"}, id="statistics"),
    ]
