"""Rates of measured rows: the cost model's work, `torch.mm` of the shape, and what this machine can do at most."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hpkernels
from benchmarks import estimates
from benchmarks import results as records
from benchmarks import run as runner
from benchmarks.cases import OPS, Case, cases
from benchmarks.providers import provider
from benchmarks.timing import measure, rates
from hpkernels import _native
from hpkernels.cost import DEVICES, Device
from hpkernels.ops import _coarse


def measured_rows(case, mm=2e12):
    timed, untimed = (records.Row(case.op, case.call, 1, 1, 1, 1, "float32", name) for name in ("cpu", "other"))
    timed.set_times([0.002, 0.001, 0.004], wall=[0.009])  # rates are of the device's time
    rates.fill([timed, untimed], case, case.inputs(), mm)
    return timed, untimed


CEILINGS = Device({"float32": 1e12}, 1e12, 1e11, "a test")


@pytest.fixture
def ceilings(monkeypatch):
    monkeypatch.setattr(rates, "ceilings", lambda device, dtype: CEILINGS)


def test_rates_are_those_of_the_cost_model(ceilings):
    case = Case("masked_topk", "k=8", images=2, grid=(5, 6))
    row, untimed = measured_rows(case)
    cost = hpkernels.estimate(
        "masked_topk", N=60, M=2048, features_dim=384, k=8, anchors_per_image=30, dtype="float32", device=CEILINGS
    ).routes["product"]
    assert cost.flops == 2 * 60 * 2048 * 384
    assert row.tflops == pytest.approx(cost.flops / 0.002 / 1e12, rel=1e-3)
    assert row.gb_s == pytest.approx(cost.bytes / 0.002 / 1e9, rel=1e-3)
    assert row.of_roofline == pytest.approx(cost.milliseconds / 2, rel=1e-3)
    assert (row.mm_tflops, row.of_mm) == (2.0, pytest.approx(row.tflops / 2, rel=1e-3))
    assert row.roofline == "measured"
    assert untimed.tflops is untimed.mm_tflops is untimed.of_roofline is None


def test_a_known_gpu_is_found_by_name(monkeypatch):
    for name, known in {"NVIDIA H200": "H200", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA B200": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert rates.known_device("cuda") == known
    assert rates.known_device("cpu") is None


@pytest.mark.parametrize(
    ("op", "call", "missing"),
    [
        ("training_step", "forward+backward", True),
        ("contrastive", "queue", True),
        ("local_propagation", "weights", True),
        ("local_propagation", "apply", True),
        ("local_propagation", "apply+backward", False),
        ("contrastive", "own", False),
        ("hidden_positives", "forward", False),
    ],
)
def test_what_the_cost_model_does_not_know_has_no_rates(op, call, missing, ceilings):
    case = Case(op, call, images=1, grid=(5, 6))
    row, _ = measured_rows(case, mm=None)
    assert (row.of_roofline is None) == (row.gb_s is None) == (row.roofline == "") == missing
    assert row.mm_tflops is row.of_mm is None
    assert (row.tflops is None) == (missing or op == "local_propagation")  # which multiplies nothing


def density_of(dense, group):
    image = torch.arange(len(dense)) // group
    within = (dense & (image[:, None] == image)).sum().item()
    return {"density": dense.float().mean().item(), "within_image_share": within / dense.sum().item()}


def test_density_is_that_of_the_inputs():
    case = Case("multi_positive_contrastive", "sampled", images=3, grid=(5, 7))
    inputs = case.inputs()
    expected = density_of(inputs["positives"].to_dense(), 35)
    assert 0 < expected["within_image_share"] < 1
    sizes = rates._SIZES[case.op](case, inputs)
    assert {name: sizes[name] for name in expected} == pytest.approx(expected)
    assert (sizes["anchors_per_image"], sizes["negative_rate"], sizes["D"]) == (35, 0.02, 512)
    labels = replace(case, call="labels")
    sizes = rates._SIZES[case.op](labels, labels.inputs())
    assert (sizes["anchors_per_image"], sizes["negative_rate"], sizes["within_image_share"]) == (105, 1.0, 1.0)


def test_density_of_both_kinds_of_positives():
    case = Case("ghp_contrastive", "rate=1", images=2, grid=(5, 6))
    inputs = case.inputs()
    dense = torch.zeros(60, 60, dtype=torch.bool)
    for vectors, pool in (("features", "pool"), ("specific", "specific_pool")):
        dots = inputs[vectors] @ inputs[vectors].T
        threshold = (inputs[vectors] @ inputs[pool].T).amax(1)
        dense |= dots > torch.minimum(threshold[:, None], threshold)
    expected = density_of(dense.fill_diagonal_(False), 30)
    sizes = rates._SIZES[case.op](case, inputs)
    assert {name: sizes[name] for name in expected} == pytest.approx(expected)
    assert (sizes["negative_rate"], sizes["M"], sizes["features_dim"]) == (1.0, 2048, 384)


@pytest.mark.parametrize("op", OPS)
def test_products_have_the_shape_of_the_case(op, monkeypatch):
    case = replace(cases(op, quick=True)[0], images=2, grid=(5, 6))
    inputs = case.inputs()
    product = rates.product(case, inputs)
    if op in ("local_propagation", "training_step"):
        assert product is None
        return
    shape = {"masked_topk": (60, 384, 2048), "hidden_positives": (60, 384, 60)}.get(op, (60, 512, 60))
    assert product.flops == 2 * shape[0] * shape[1] * shape[2]
    whole = product.call()
    assert whole.shape == (shape[0], shape[2])
    monkeypatch.setattr(rates, "CHUNK_BYTES_ON_CPU", 4 * shape[2] * 25)  # 25 rows, of which the last chunk has 10
    last = rates.product(case, inputs).call()
    torch.testing.assert_close(last[:10], whole[50:])
    monkeypatch.setattr(rates, "MOST_FLOPS_ON_CPU", 2 * 7 * shape[1] * shape[2])
    assert rates.product(case, inputs).flops == rates.MOST_FLOPS_ON_CPU


def test_ceilings(monkeypatch):
    monkeypatch.setattr(rates, "_COPIED", 2**20)
    for name in ("_ON_CPU", "_ON_GPU"):
        monkeypatch.setattr(rates, name, (64, 64, 64))
    rates.ceilings.cache_clear()
    try:
        found = rates.ceilings("cpu", "bfloat16")
    finally:
        rates.ceilings.cache_clear()
    assert found.matrix["bfloat16"] >= found.matrix["float32"] == found.vector > 0
    assert found.bandwidth > 0 and found.capability is None and found.source == "measured"
    assert estimates.ceilings is rates.ceilings


class Counted(TorchDispatchMode):
    """Adds up the FLOPs of products, whose dtypes it keeps, and the bytes that copies read and write."""

    def __init__(self):
        super().__init__()
        self.flops, self.bytes, self.dtypes = 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "_int_mm"):
            self.dtypes.append(args[0].dtype)
            self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        if name == "copy_":
            self.bytes += sum(value.numel() * value.element_size() for value in args[:2])
        return function(*args, **(kwargs or {}))


def test_ceilings_are_what_the_calls_do_by_their_time(monkeypatch):
    """Each call counted by what PyTorch is asked for; the n-th takes n seconds."""
    monkeypatch.setattr(rates, "_COPIED", 2**12)
    monkeypatch.setattr(rates, "_ON_CPU", (32, 16, 64))
    monkeypatch.setattr(_coarse, "int8_is_fast", lambda: True)
    counted = []

    def least(call):
        with Counted() as count:
            call()
        counted.append(count)
        return float(len(counted))

    monkeypatch.setattr(rates, "least", least)
    rates.ceilings.cache_clear()
    try:
        found = rates.ceilings("cpu", "bfloat16")
    finally:
        rates.ceilings.cache_clear()
    single, half, ranking, copy = counted
    assert [each.dtypes for each in (single, half, ranking)] == [[torch.float32], [torch.bfloat16], [torch.int8]]
    assert single.flops == ranking.flops == 2 * 32 * 16 * 64 and copy.bytes == 2 * 2**12
    # Half precision, which took twice as long, is computed in float32.
    assert found.matrix == {"float32": single.flops, "bfloat16": single.flops}
    assert found.ranking == ranking.flops / 3 and found.bandwidth == copy.bytes / 4


def test_a_ceiling_is_the_least_time(monkeypatch):
    seconds = iter([5.0, 3.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(rates, "seconds_of", lambda call: next(seconds))
    assert rates.least(lambda: None) == 2.0 and next(seconds, None) is None


def test_rates_without_the_library(monkeypatch):
    """An installation without the CPU kernels has no operator to ask about int8 products."""
    missing = _native.Availability(False, "no _C")
    monkeypatch.setattr(_native, "LIBRARIES", _native.LIBRARIES | {"_C": missing})
    monkeypatch.setattr(torch.ops, "hpkernels_cpu", SimpleNamespace())
    monkeypatch.setattr(rates, "_COPIED", 2**20)
    monkeypatch.setattr(rates, "_ON_CPU", (64, 64, 64))
    for cached in (rates.ceilings, _coarse.int8_is_fast):
        cached.cache_clear()
    try:
        row, _ = measured_rows(Case("masked_topk", "k=8", images=2, grid=(5, 6)))
        assert row.roofline == "measured" and rates.ceilings("cpu", "float32").ranking is None
    finally:
        for cached in (rates.ceilings, _coarse.int8_is_fast):
            cached.cache_clear()


SMALL = Case("hidden_positives", "forward", images=2, grid=(5, 6))


def run_small(monkeypatch):
    monkeypatch.setattr(runner, "providers", lambda case: [provider(SMALL, "reference")])
    monkeypatch.setattr(measure, "peak_memory", lambda *_: measure.Memory())
    (row,) = runner.run([SMALL], None, {}, lambda row: None)
    return row


def test_a_run_fills_the_columns(monkeypatch, ceilings):
    row = run_small(monkeypatch)
    assert row.timer == "wall" and row.wall_ms == row.median_ms > 0
    assert row.tflops > 0 and row.mm_tflops > 0 and row.of_roofline > 0 and row.roofline == "measured"
    assert row.of_mm == pytest.approx(row.tflops / row.mm_tflops, rel=1e-2)


def test_times_are_kept_where_rates_fail(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(rates, "fill", fail)
    assert run_small(monkeypatch).median_ms > 0
    assert "hidden_positives forward N=60: without rates: out of memory\n" in capsys.readouterr().out


def test_devices_have_distinct_names():
    """The first that is part of the name of a GPU is taken."""
    assert not [(one, other) for one in DEVICES for other in DEVICES if one != other and one in other]
