"""The golden vectors of the published implementation (tests/golden) by a GPU backend, in each dtype.

In half precision the inputs are rounded, and other pairs may be positive. So a row may be as far from what is stored as
three times the reference of the same dtype, which sees the same inputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from hpkernels import apply_local_propagation, ghp_contrastive, local_propagation_weights
from hpkernels.testing import assert_rows_close

FOLDER = Path(__file__).parents[2] / "tests" / "golden"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CPU = torch.device("cpu")


def goldens(backend: str, device: torch.device, folder: Path = FOLDER, largest: int = 10**6) -> list[str]:
    """What differs from the files of a folder, of those up to a size in bytes: a sentence each."""
    wrong, compared = [], 0
    for path in sorted(path for path in folder.glob("*.npz") if path.stat().st_size <= largest):
        results = next((of for prefix, of in _RESULTS.items() if path.name.startswith(prefix)), None)
        if results is None:
            continue
        data = _load(path)
        for dtype in DTYPES:
            found, plain = results(data, backend, device, dtype), results(data, "reference", _CPU, dtype)
            for name, value in found.items():
                compared += 1
                try:
                    assert_rows_close(value.cpu(), getattr(data, name), plain[name])
                except AssertionError as error:
                    wrong.append(f"{path.stem}, {name}, {dtype}: {error}")
    return wrong if compared else [f"{folder} has no golden vectors"]


def _load(path: Path) -> SimpleNamespace:
    with np.load(path) as arrays:
        values = {key: torch.from_numpy(arrays[key]) for key in arrays if key != "meta"}
        data = SimpleNamespace(**values, meta=json.loads(str(arrays["meta"])))
    for name in ("mixed", "grad_code"):
        if name in values:
            setattr(data, name, _rows(values[name]))
    return data


def _rows(planes: Tensor) -> Tensor:
    """(B, D, H, W) as a row for each patch."""
    return planes.detach().flatten(2).transpose(1, 2).flatten(0, 1)


def _loss(data: SimpleNamespace, backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    meta, joint = data.meta, data.meta["loss_version"] == 1
    given = {name: getattr(data, name).to(device, dtype) for name in ("features", "pool", "specific", "pool_specific")}
    leaves = [getattr(data, name).to(device, dtype).requires_grad_() for name in ("z", "z_mix")[: 2 if joint else 1]]
    loss = ghp_contrastive(
        leaves[0],
        given["features"],
        given["pool"],
        specific=given["specific"],
        specific_pool=given["pool_specific"],
        specific_weight=meta["lam"],
        z_mixed=leaves[1] if joint else None,
        anchors_per_image=meta["grid"] ** 2,
        temperature=meta["temperature"],
        negatives=data.negative_mask.to(device),
        variant="joint" if joint else "separate",
        reweight=bool(meta["reweighting"]),
        backend=backend,
    )
    gradients = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach()} | dict(zip(("grad_z", "grad_z_mix"), gradients, strict=False))


def _propagation(data: SimpleNamespace, backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    code, query, key, cotangent = (
        getattr(data, name).to(device, dtype) for name in ("code", "query", "key", "cotangent")
    )
    options = {"sigma": data.meta["sigma"], "quantiles": tuple(data.meta["quantiles"]), "backend": backend}
    weights = local_propagation_weights(query, key, tuple(code.shape[2:]), **options)
    mixed = apply_local_propagation(code.requires_grad_(), weights, backend=backend)
    (grad,) = torch.autograd.grad(mixed, code, cotangent)
    return {"mixed": _rows(mixed), "grad_code": _rows(grad)}


_RESULTS = {"ghp_": _loss, "lhp_": _propagation}
