"""The explanations against what dispatch does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import hpkernels
from hpkernels import __main__ as program
from hpkernels import _native, backends, explain, explanation
from hpkernels.cost import lists_may_be_faster
from hpkernels.ops import _cuda, _triton
from hpkernels.ops.multi_positive_contrastive import cpu, routes
from hpkernels.ops.multi_positive_contrastive.options import pack_bits

OPS = [*backends.registered_ops(), "ghp_contrastive"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_backend_is_the_one_that_is_selected(op, dtype):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU, whose backend depends on its self-check")
    told = explain(op, dtype=dtype)
    first = "masked_topk" if op == "ghp_contrastive" else op
    assert told.backend == backends.select(first, "auto", torch.empty(1, dtype=getattr(torch, dtype)))
    assert {*backends.BACKENDS} - {told.backend} <= set(told.not_taken)
    for backend in backends.BACKENDS[: backends.BACKENDS.index(told.backend)]:
        if (op, backend) == ("contrastive", "cuda"):  # by the kernels of another op
            assert (
                told.not_taken[backend]
                == "it takes problems of multi_positive_contrastive alone, see docs/contrastive.md"
            )
            continue
        assert told.not_taken[backend] == backends.automatic(first, backend, "cpu", getattr(torch, dtype)).reason
    routes = hpkernels.estimate(op, dtype=dtype, device="CPU").routes
    assert told.cost in routes.values() and told.device == "the CPU of this machine"
    assert f"{explanation._time(told.cost.milliseconds)} on the roofline" in str(told)


@pytest.mark.parametrize(("rate", "density"), [(0.0, 0.001), (0.02, 0.001), (0.3, 0.3), (1.0, 0.001), (0.02, 0.2)])
def test_the_route_on_the_cpu_is_the_one_that_dispatch_takes(rate, density):
    if not _native.LIBRARIES["_C"].ok:
        pytest.skip("this installation has no _C library")
    generator, anchors, group = torch.Generator().manual_seed(0), 1280, 128
    positives = torch.rand(anchors, anchors, generator=generator) < density
    negatives = torch.rand(group, anchors, generator=generator) < rate
    taken = cpu.choose_route(pack_bits(positives), None, pack_bits(negatives))
    sizes = {"N": anchors, "anchors_per_image": group, "within_image_share": group / anchors}
    told = explain("multi_positive_contrastive", device="CPU", negative_rate=rate, density=density, **sizes)
    assert told.steps[-1].route == taken
    assert told.cost == hpkernels.estimate(
        "multi_positive_contrastive", device="CPU", dtype="float32", negative_rate=rate, density=density, **sizes
    ).routes[taken]  # fmt: skip
    others = {name for name in told.not_taken if name.startswith("route ")}
    assert others == {f"route {route}" for route in ("pairs", "images", "blocks")} - {f"route {taken}"}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, True),
        ({"negative_rate": 1.0}, False),
        ({"N": 784}, False),
        ({"density": 0.5}, False),
        ({"symmetric": False}, False),
    ],
)
def test_the_route_on_a_gpu(sizes, expected):
    given = {"N": 50176, "negative_rate": 0.02, "density": 0.001} | sizes
    told = explain("ghp_contrastive", device="H100", **given)
    across = 0.2 * given["density"] * given["N"] ** 2
    allowed = lists_may_be_faster(given["N"], 784, given["negative_rate"])
    symmetric = given.get("symmetric", True)
    assert (symmetric and allowed and across <= routes.capacity(given["N"])) == expected
    route, other = ("lists of pairs, blocks within images", "blocks of all pairs")[:: 1 if expected else -1]
    assert told.steps[-1].route == route and other in told.not_taken
    assert told.steps[-1].engine == "TMA and wgmma"
    costs = hpkernels.estimate("ghp_contrastive", device="H100", **given).routes
    assert told.cost == costs["lists" if expected else "blocks"]
    assert ("lists" in costs) == symmetric


def test_numbers_have_units_and_no_exponent():
    assert [explanation._time(ms) for ms in (0.0012, 5.678, 53630, 1.2e8)] == [
        "1.2 µs",
        "5.678 ms",
        "53.63 s",
        "120,000 s",
    ]
    assert [explanation._memory(2**20 * mib) for mib in (0, 1010, 53630)] == ["0 KiB", "1010 MiB", "52.37 GiB"]
    assert explanation._work(1.319e13) == "13.19 TFLOP"
    told = explain("ghp_contrastive", N=50176, device="H100")
    assert "503,526 positives across images" in told.not_taken["blocks of all pairs"]
    assert not re.search(r"\de[+-]\d", str(told))


def test_the_dtype_of_a_call_that_names_none():
    assert [explain("masked_topk", device=device).dtype for device in ("CPU", "H100")] == ["float32", "float16"]
    assert explain("masked_topk", device="CPU", dtype="float16").dtype == "float16"


def test_the_name_of_a_device_in_lower_case():
    for device in ("cpu", "h100", "rtx 4090"):
        assert explain("masked_topk", device=device) == explain("masked_topk", device=device.upper())


def test_the_reason_against_lists_of_positives_that_are_not_symmetric():
    told = explain("multi_positive_contrastive", device="H100", symmetric=False)
    assert told.not_taken["lists of pairs, blocks within images"].endswith("known to be symmetric")


def test_the_engine_follows_the_rule_of_the_library(repository, monkeypatch):
    header = (repository / "csrc" / "common" / "cuda.h").read_text()
    assert int(re.search(r"kMostSm90Bytes = (\d+);", header)[1]) == _cuda._MOST_WGMMA_BYTES
    engine = {
        (device, dtype, dim): explain("hidden_positives", device=device, dtype=dtype, features_dim=dim).steps[0].engine
        for device in ("H100", "A100")
        for dtype in ("float16", "float32")
        for dim in (512, 513)
    }
    assert {key for key, value in engine.items() if value == "TMA and wgmma"} == {("H100", "float16", 512)}
    monkeypatch.setenv("HPKERNELS_SM90", "0")
    told = explain("hidden_positives", device="H100")
    assert told.steps[0].engine == "mma.sync" and told.not_taken["TMA and wgmma"] == "HPKERNELS_SM90=0 is set"


def test_more_values_than_the_kernels_keep():
    told = explain("masked_topk", device="H100", k=129)
    assert told.steps[0].engine == "PyTorch" and "got k = 129" in told.not_taken["cuda kernels"]
    assert explain("masked_topk", device="H100", k=128).steps[0].engine == "TMA and wgmma"


@pytest.fixture
def gpu(monkeypatch):
    """As if this machine had a GPU, on which only Triton's kernels are right."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    states = {"triton": backends.Availability(True, "checked"), "cuda": backends.Availability(False, "1 of 9 rows")}
    other = backends.Availability(True, "runs")
    monkeypatch.setattr(backends, "automatic", lambda op, backend, device, dtype: states.get(backend, other))


def test_a_gpu_of_this_machine(gpu, monkeypatch):
    told = explain("hidden_positives")
    assert told.device == "NVIDIA A100-SXM4-80GB of this machine" and told.backend == "triton"
    assert told.steps[0].engine == "tiles of sm_80" and told.not_taken["cuda"] == "1 of 9 rows"
    assert told.not_taken["reference"] == "triton comes first"
    assert told.cost == hpkernels.estimate("hidden_positives", device="A100").routes["symmetric"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    told = explain("hidden_positives")
    assert told.cost is None and "no rates of this device are known" in str(told)
    assert {_triton.architecture_of(capability) for capability in [(8, 9), (9, 0), (10, 3), (12, 0)]} == {
        "sm_80", "sm_90", "sm_100",
    }  # fmt: skip


def test_a_backend_that_is_asked_for(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    told = explain("masked_topk")
    assert told.backend == "reference" and told.not_taken["cpu"] == "reference is asked for"
    assert explain("masked_topk", device="H100").backend == "cuda"  # on another machine
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "gpu")
    with pytest.raises(ValueError, match="HPKERNELS_BACKEND must be one of auto, .* got 'gpu'"):
        explain("masked_topk")
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="^explain: backend 'cuda' is not available: "):
        explain("masked_topk", dtype="float64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": -2}, "`branches` must be at least 1, got -2"),
        ({"features_dim": 0}, "`features_dim` must be at least 1, got 0"),
        ({"device": 3}, "`device` must be one of H200, .* got 3"),
        ({"op": "topk"}, "`op` must be one of masked_topk, .* got 'topk'"),
        ({"device": "GPU"}, "`device` must be one of H200, .* got 'GPU'"),
        ({"dtype": "float8"}, "`dtype` must be one of float16, .* got 'float8'"),
        ({"rows": 3}, "sizes must be some of N, D, .* got `rows`"),
        ({"N": "many"}, "`N` must be an integer, got 'many'"),
        ({"N": True}, "`N` must be an integer, got True"),
        ({"N": 1.5}, "`N` must be an integer, got 1.5"),
        ({"specific": 1}, "`specific` must be True or False, got 1"),
        ({"density": "few"}, "`density` must be a number, got 'few'"),
        ({"density": 2.0}, r"`density` must be in \[0, 1\], got 2"),
        ({"N": 785}, "`anchors_per_image` must divide N = 785, got 784"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=rf"^explain: {message}"):
        explain(**{"op": "ghp_contrastive"} | arguments)


def test_the_command(capsys):
    assert program.main(["explain", "ghp_contrastive", "N=50176", "specific=false", "device=H100"]) == 0
    told = explain("ghp_contrastive", N=50176, specific=False, device="H100")
    assert capsys.readouterr().out == f"{told}\n"
    assert program.main(["explain", "ghp_contrastive", "N=50176", "specific=false", "device=H100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert SimpleNamespace(**found).cost["milliseconds"] == told.cost.milliseconds
    for wrong in (["N"], ["N=x"], ["op=3"], ["device=[1]"]):
        with pytest.raises(SystemExit) as ended:
            program.main(["explain", "masked_topk", *wrong])
        assert str(ended.value).startswith("explain: ")


def test_help_names_what_can_be_given(capsys):
    with pytest.raises(SystemExit):
        program.main(["explain", "--help"])
    words = set(re.findall(r"\w+", capsys.readouterr().out))
    assert {*OPS, *explanation.SIZES, "H100", "dtype"} <= words


def test_the_command_in_a_process(repository):
    command = [sys.executable, "-m", "hpkernels", "explain", "masked_topk", "N=no"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr == "explain: `N` must be an integer, got 'no'\n"
