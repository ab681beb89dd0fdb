from __future__ import annotations

import inspect
import re
from functools import partial

import pytest
import torch

from hpkernels import BackendUnavailableError, compat, ghp_contrastive
from hpkernels.compat import SupConLoss
from hpkernels.testing import helpful_error, random_problem, row_errors

GOLDENS = ("joint_allneg", "joint_medium", "joint_noreweight", "joint_small", "joint_warmup", "separate")


def options(size=3, rho=1.0, version=1, reweighting=1):
    return {"model": {"spatial_size": size}, "rho": rho, "loss_version": version, "reweighting": reweighting}


def arguments(opt=None, lmbd=0.3, mix=True, dtype=torch.float32):
    problem = random_problem(images=2, height=3, width=3, pool_size=8, dtype=dtype)
    tensors = (problem.z, problem.specific, problem.features, problem.pool, problem.specific_pool)
    return *tensors, options() if opt is None else opt, lmbd, problem.z_mixed if mix else None


def test_the_published_signatures():
    published = "self temperature contrast_mode base_temperature"
    assert list(inspect.signature(SupConLoss.__init__).parameters)[:4] == published.split()
    assert [inspect.signature(SupConLoss.__init__).parameters[name].default for name in published.split()[1:]] == [
        0.07,
        "one",
        0.07,
    ]
    forward = "modeloutput_z modeloutput_s_pr modeloutput_f Pool_ag Pool_sp opt lmbd modeloutput_z_mix"
    assert list(inspect.signature(SupConLoss().forward).parameters) == forward.split()
    with pytest.raises(TypeError):
        SupConLoss(0.07, "one", 0.07, True)  # what hpkernels adds is given by name


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden(name, dtype, golden, monkeypatch):
    data = golden(f"ghp_{name}")
    meta = data.meta
    # The published class draws its negatives; those of the goldens are put in the place of the draw.
    monkeypatch.setattr(compat, "ghp_contrastive", partial(ghp_contrastive, negatives=data.negative_mask))
    check_golden(data, meta, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_as_it_is_called(dtype, golden):
    """With a rate of 1 nothing is drawn, so that the class runs as published."""
    data = golden("ghp_joint_allneg")
    assert data.meta["negative_fraction"] == 1 and data.negative_mask.all()
    check_golden(data, data.meta, dtype)


def check_golden(data, meta, dtype):
    z, z_mix = (value.to(dtype).requires_grad_() for value in (data.z, data.z_mix))
    opt = options(meta["grid"], meta["negative_fraction"], meta["loss_version"], meta["reweighting"])
    loss = SupConLoss(temperature=meta["temperature"])(
        modeloutput_z=z,
        modeloutput_s_pr=data.specific.to(dtype),
        modeloutput_f=data.features.to(dtype),
        Pool_ag=data.pool,
        Pool_sp=data.pool_specific,
        opt=opt,
        lmbd=meta["lam"],
        modeloutput_z_mix=z_mix,
    )
    loss.backward()
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(loss.detach().double(), data.loss, rtol=tolerance, atol=0)
    branches = [(z, data.grad_z)]
    if meta["loss_version"] == 1:
        branches.append((z_mix, data.grad_z_mix))
    else:
        assert z_mix.grad is None
    for leaf, expected in branches:
        largest = expected.norm(dim=1).max()
        assert (row_errors(leaf.grad, expected) <= tolerance * expected.norm(dim=1) + 1e-3 * tolerance * largest).all()


@pytest.mark.parametrize("version", [1, 2])
def test_settings_reach_the_op(version):
    z, specific, features, pool, specific_pool, *_ = arguments()
    z_mixed = arguments()[-1]
    for size, rho, reweighting, lmbd, temperature, base in (
        (3, 1.0, 1, 0.3, 0.07, 0.07),
        (1, 0.5, 0, torch.tensor(0.9), 0.5, 0.1),
    ):
        torch.manual_seed(0)
        loss = SupConLoss(temperature, "all", base)(
            z, specific, features, pool, specific_pool, options(size, rho, version, reweighting), lmbd, z_mixed
        )
        torch.manual_seed(0)
        expected = ghp_contrastive(
            z,
            features,
            pool,
            specific=specific,
            specific_pool=specific_pool,
            specific_weight=lmbd,
            z_mixed=z_mixed if version == 1 else None,
            anchors_per_image=size**2,
            temperature=temperature,
            base_temperature=base,
            negative_rate=rho,
            variant={1: "joint", 2: "separate"}[version],
            reweight=bool(reweighting),
        )
        assert torch.equal(loss, expected)


def test_version_2_takes_the_mixed_branch_only_when_asked():
    given = arguments(options(version=2))
    z, *constants, z_mixed = given
    published, mended = SupConLoss(), SupConLoss(mix_in_separate=True)
    assert torch.equal(published(*given), published(z, *constants))
    expected = (published(z, *constants) + published(z_mixed, *constants)) / 2
    torch.testing.assert_close(mended(*given), expected)
    assert mended(*given) != published(*given)


def test_pools_of_half_precision_as_published():
    z, specific, features, pool, specific_pool, *rest = arguments()
    loss = SupConLoss()(z, specific, features, pool.half(), specific_pool.half(), *rest)
    expected = SupConLoss()(z, specific, features, pool.half().float(), specific_pool.half().float(), *rest)
    assert torch.equal(loss, expected)


def test_unknown_contrast_mode():
    with helpful_error(ValueError, "SupConLoss", "contrast_mode", "'some'"):
        SupConLoss(contrast_mode="some")
    assert torch.equal(SupConLoss(contrast_mode="all")(*arguments()), SupConLoss(contrast_mode="one")(*arguments()))


@pytest.mark.parametrize("name", ["modeloutput_s_pr", "modeloutput_f", "Pool_ag", "Pool_sp", "opt", "lmbd"])
def test_missing_arguments(name):
    names = list(inspect.signature(SupConLoss().forward).parameters)
    given = dict(zip(names, arguments(), strict=True))
    given[name] = None
    with helpful_error(TypeError, "SupConLoss", name, "None"):
        SupConLoss()(**given)


@pytest.mark.parametrize(
    ("path", "remove"),
    [
        ("['model']", lambda opt: opt.pop("model")),
        ("['model']['spatial_size']", lambda opt: opt["model"].pop("spatial_size")),
        ("['rho']", lambda opt: opt.pop("rho")),
        ("['loss_version']", lambda opt: opt.pop("loss_version")),
        ("['reweighting']", lambda opt: opt.pop("reweighting")),
    ],
)
def test_missing_settings(path, remove):
    opt = options()
    remove(opt)
    with pytest.raises(ValueError, match=rf"^SupConLoss: `opt` must have {re.escape(path)}, got none$"):
        SupConLoss()(*arguments(opt))


def test_unknown_version():
    with helpful_error(ValueError, "SupConLoss", "opt['loss_version']", "3"):
        SupConLoss()(*arguments(options(version=3)))


def test_the_backend_is_passed_on():
    with pytest.raises(BackendUnavailableError):
        SupConLoss(backend="cuda")(*arguments(dtype=torch.float64))


@pytest.mark.parametrize(
    ("error", "argument", "got", "settings"),
    [
        (ValueError, "temperature", "0", {"temperature": 0}),
        (TypeError, "temperature", "str '0.1'", {"temperature": "0.1"}),
        (ValueError, "base_temperature", "-1", {"base_temperature": -1}),
        (TypeError, "mix_in_separate", "int 1", {"mix_in_separate": 1}),
        (ValueError, "backend", "'gpu'", {"backend": "gpu"}),
    ],
)
def test_settings_are_checked_when_made(error, argument, got, settings):
    with helpful_error(error, "SupConLoss", argument, got):
        SupConLoss(**settings)
