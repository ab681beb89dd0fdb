"""Bad values of the arguments that `multi_positive_contrastive` and `ghp_contrastive` share."""

from __future__ import annotations

import math

import pytest
import torch


def wrong_options():
    """Parameters (error, argument, got, options) for a valid call with N = 4 anchors and specific positives."""
    nan, inf = math.nan, math.inf
    table = {
        "specific_weight": [
            (ValueError, -0.1, "-0.1"),
            (ValueError, nan, "nan"),
            (ValueError, inf, "inf"),
            (TypeError, True, "bool True"),
            (TypeError, "1", "str '1'"),
            (TypeError, None, "NoneType None"),
            (TypeError, torch.tensor(1), "int64 of shape ()"),
            (ValueError, torch.ones(1), "float32 of shape (1,)"),
            (ValueError, torch.tensor(nan), "nan"),
            (ValueError, torch.tensor(inf), "inf"),
            (ValueError, torch.tensor(-0.5), "-0.5"),
            (ValueError, torch.tensor(0.5, requires_grad=True), "requires_grad=True"),
            (ValueError, torch.tensor(0.5, device="meta"), "meta"),
        ],
        "anchors_per_image": [
            (ValueError, 0, "0"),
            (ValueError, -2, "-2"),
            (ValueError, 3, "3"),
            (ValueError, 8, "8"),
            (TypeError, 2.0, "float 2.0"),
            (TypeError, True, "bool True"),
            (TypeError, "2", "str '2'"),
        ],
        "temperature": [
            (ValueError, 10**400, "1000"),
            (ValueError, 0, "0"),
            (ValueError, 0.0, "0.0"),
            (ValueError, -0.5, "-0.5"),
            (ValueError, nan, "nan"),
            (ValueError, inf, "inf"),
            (ValueError, 1e-40, "1e-40"),
            (ValueError, 1e-320, "1e-320"),
            (ValueError, 1e39, "1e+39"),
            (TypeError, True, "bool True"),
            (TypeError, None, "NoneType None"),
            (TypeError, torch.tensor(0.5), "Tensor"),
        ],
        "base_temperature": [
            (ValueError, 0.0, "0.0"),
            (ValueError, -1.0, "-1.0"),
            (ValueError, nan, "nan"),
            (ValueError, inf, "inf"),
            (ValueError, 1e-40, "1e-40"),
            (TypeError, False, "bool False"),
            (TypeError, "0.07", "str '0.07'"),
        ],
        "negative_rate": [
            (ValueError, -0.01, "-0.01"),
            (ValueError, 1.01, "1.01"),
            (ValueError, nan, "nan"),
            (TypeError, True, "bool True"),
            (TypeError, None, "NoneType None"),
        ],
        "negatives": [
            (TypeError, [[True]], "list"),
            (TypeError, torch.ones(4, 4), "float32 of shape (4, 4)"),
            (ValueError, torch.ones(3, 4).bool(), "bool of shape (3, 4)"),
            (ValueError, torch.ones(4, 5).bool(), "bool of shape (4, 5)"),
            (ValueError, torch.ones(4).bool(), "bool of shape (4,)"),
            (ValueError, torch.ones(4, 4).bool().to("meta"), "meta"),
        ],
        "seed": [
            (TypeError, 1.0, "float 1.0"),
            (TypeError, True, "bool True"),
            (ValueError, 2**63, str(2**63)),
            (ValueError, -(2**63) - 1, str(-(2**63) - 1)),
            (TypeError, torch.tensor(1.0), "float32 of shape ()"),
            (TypeError, torch.tensor(1, dtype=torch.int32), "int32 of shape ()"),
            (ValueError, torch.ones(1).long(), "int64 of shape (1,)"),
            (ValueError, torch.tensor(1, device="meta"), "meta"),
        ],
        "variant": [(ValueError, "both", "'both'"), (ValueError, 1, "1"), (ValueError, None, "None")],
        "reweight": [(TypeError, 1, "int 1"), (TypeError, None, "NoneType None"), (TypeError, "yes", "str 'yes'")],
        "keep_specific_only": [(TypeError, 0, "int 0"), (TypeError, None, "NoneType None")],
        "backend": [(ValueError, "gpu", "'gpu'"), (ValueError, None, "None")],
    }
    return [
        pytest.param(error, name, got, {name: value}, id=f"{name}-{got}")
        for name, rows in table.items()
        for error, value, got in rows
    ]
