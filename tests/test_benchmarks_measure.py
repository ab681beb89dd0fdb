"""Timers of a GPU with a fake `torch.cuda`, NVML with a fake package, rates on the CPU."""

from __future__ import annotations

import sys
from contextlib import contextmanager
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
from benchmarks.timing import measure, nvml, rates, timers
from hpkernels import _native
from hpkernels.cost import DEVICES, Device
from hpkernels.ops import _coarse


class FakeGpu:
    """Logs what is asked of a GPU, in order; a graph runs what was captured, and 2 ms lie between two events."""

    def __init__(self, monkeypatch, refuses: str = "", captures: bool = True):
        self.stream = "first"
        self.log, self.refuses, self.captures, self.pools = [], refuses, captures, []
        gpu = self

        class Event:
            made = 0

            def __init__(self, enable_timing):
                assert enable_timing
                Event.made += 1
                self.name = "start" if Event.made % 2 else "end"

            def record(self):
                gpu.log.append(self.name)

            def elapsed_time(self, end):
                assert (self.name, end.name) == ("start", "end")
                return 2.0  # milliseconds

        class Graph:
            def replay(self):
                gpu.log.append("replay")
                if gpu.captures:
                    self.call()

        class graph:  # noqa: N801  # as PyTorch's
            def __init__(self, graph, pool=None):
                gpu.pools.append(pool)

            def __enter__(self):
                gpu.stream = "capturing"

            def __exit__(self, *_):  # a failing one leaves its stream current, as PyTorch's does
                if gpu.refuses:
                    raise RuntimeError(gpu.refuses)
                gpu.stream = "first"

        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": self.on_stream,
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "synchronize": lambda: self.log.append("wait"),
            "is_initialized": lambda: True,
            "graph_pool_handle": lambda: "the pool",
            "current_device": lambda: 0,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        self.graph_class = Graph
        self.card = SimpleNamespace(last=nvml.Sample(), sample=self.sample, missing="")
        monkeypatch.setattr(timers, "flush_cache", lambda: self.log.append("flush"))
        monkeypatch.setattr(nvml, "card", lambda: self.card)
        monkeypatch.setattr(timers.time, "sleep", lambda seconds: self.log.append(f"sleep {seconds}"))

    @contextmanager
    def on_stream(self, stream):
        before = self.stream
        try:
            yield
        finally:
            self.stream = before

    def sample(self):
        self.log.append("sample")
        return self.card.last

    def call(self):
        """A call that writes into one tensor, as a captured one does."""
        result = torch.zeros(3)

        def run(name="call"):
            self.log.append(name)
            return result.copy_(torch.arange(3.0))

        self.graph_class.call = staticmethod(lambda: run("replayed"))
        return run


def test_a_graph_is_replayed_between_events_with_a_cold_cache(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    timer = timers.GpuTimer(gpu.call(), "a pool")
    assert (timer.times.timer, timer.times.note, gpu.pools) == ("graph", "", ["a pool"])
    gpu.log.clear()
    timer.repeat()
    device = ["flush", "start", "replay", "replayed", "end", "sample", "wait"]
    assert gpu.log == ["sleep 0.002", *device, "flush", "wait", "call", "wait"]
    assert timer.times.seconds == [0.002] and timer.times.wall[0] > 0 and len(timer.times.samples) == 1


def test_a_call_that_cannot_be_captured_is_timed_by_events(monkeypatch):
    gpu = FakeGpu(monkeypatch, refuses="operation not permitted\nmore")
    timer = timers.GpuTimer(gpu.call())
    assert (timer.times.timer, timer.times.note) == ("events", "no graph: operation not permitted")
    gpu.log.clear()
    timer.repeat()
    assert gpu.log[1:7] == ["flush", "start", "call", "end", "sample", "wait"]
    assert gpu.stream == "first"


def test_a_call_that_is_not_made_for_a_graph_is_not_captured(monkeypatch):
    gpu = FakeGpu(monkeypatch, refuses="never")
    measured = measure.times({"a": gpu.call()}, "cuda", not_captured={"a"})["a"]
    assert (measured.timer, gpu.pools) == ("events", []) and measured.note.startswith(
        "no graph: it is not made for one"
    )


def test_a_call_that_fails_while_it_is_timed_says_so():
    def fail():
        raise RuntimeError("an illegal access\nand more")

    measured = measure.times({"wrong": fail, "right": lambda: None})
    assert (measured["wrong"].note, measured["wrong"].seconds) == (f"{measure.WRONG}an illegal access", [])
    assert len(measured["right"].seconds) >= measure.REPETITIONS


@pytest.mark.parametrize("captures", [True, False])
def test_a_graph_that_does_not_do_the_work_is_not_timed(captures, monkeypatch):
    """As that of a library with streams of its own, whose replay takes no time."""
    gpu = FakeGpu(monkeypatch, captures=captures)
    results = [torch.arange(3.0) for _ in range(3)]  # of a first call, of the captured one, of one to compare with
    gpu.graph_class.call = lambda graph: results[1].copy_(torch.arange(3.0))
    left = iter(results)
    timer = timers.GpuTimer(lambda: {"loss": next(left)})
    expected = ("graph", "") if captures else ("events", "no graph: replayed, it gives other results")
    assert (timer.times.timer, timer.times.note) == expected
    assert gpu.log.count("replay") == 1


def test_warm_up_ends_when_it_is_stable():
    medians = (3, 2, 1.5, 1.01, 1, 1.02)
    series = iter([0.001 * median for median in medians for _ in range(timers.BATCH)])
    assert timers.stable(lambda: next(series))
    assert next(series, None) is None  # of six batches the last three agree


@pytest.mark.parametrize(
    ("medians", "agree"),
    [
        ((1.0, 1.015, 1.029), True),
        ((1.0, 1.0305, 1.0305), False),  # by more than 3 % of the least, if not of the greatest
        ((1.0305, 1.0305, 1.0), False),
        ((1.0, 1.05, 1.0), False),  # the first and the last are alike
    ],
)
def test_batches_agree_within_three_per_cent(medians, agree, monkeypatch):
    """The clock leaves time for three batches and no more."""
    clock = iter([0, 0, 0, 0, timers.WARM_UP])
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(clock))
    series = iter([0.001 * median for median in medians for _ in range(timers.BATCH)])
    assert timers.stable(lambda: next(series)) == agree


def test_what_events_do_not_resolve_is_stable():
    series = iter([1e-6 * median for median in (5, 5.5, 4.6) for _ in range(timers.BATCH)])
    assert timers.stable(lambda: next(series))


def test_warm_up_ends_at_its_limit(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timers, "WARM_UP", 5)
    series = [0.001 * median for median in range(1, 9) for _ in range(timers.BATCH)]
    left = iter(series)
    assert not timers.stable(lambda: next(left))
    assert len(series) - len(list(left)) == 4 * timers.BATCH  # begun at 1, 2, 3 and 4 of 5 seconds


def test_a_batch_of_long_calls_is_short():
    calls = []
    assert timers.stable(lambda: calls.append(1) or 0.3)
    assert len(calls) == timers.WINDOW


def test_an_unstable_time_is_told(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    timer = timers.GpuTimer(gpu.call())
    monkeypatch.setattr(timers, "stable", lambda call: call() is None)
    timer.warm_up()
    assert timer.times.note == "its time was not stable after the warm-up"
    assert timer.times.seconds == timer.times.samples == []
    assert "sample" not in gpu.log


def test_a_throttled_card_rests_longer(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    timer = timers.GpuTimer(gpu.call())
    gpu.log.clear()
    timer.repeat()
    gpu.card.last = nvml.Sample(throttled=("power cap",))
    timer.repeat()
    assert [entry for entry in gpu.log if entry.startswith("sleep")] == ["sleep 0.002", "sleep 0.1"]
    assert nvml.summary(timer.times.samples) == {"throttled": "power cap"}


def test_calls_on_a_gpu_take_turns(monkeypatch):
    gpu = FakeGpu(monkeypatch, refuses="no")
    monkeypatch.setattr(timers, "stable", lambda call: True)
    monkeypatch.setattr(measure, "ENOUGH", 0.0)
    calls = {name: lambda name=name: gpu.log.append(name) for name in "ab"}
    measured = measure.times(calls, "cuda")
    turns = [entry for entry in gpu.log if entry in "ab"]
    assert turns[4:] == ["a", "a", "b", "b"] * measure.REPETITIONS  # by events and by the wall clock
    assert gpu.pools == ["the pool"] * 2
    assert {len(times.seconds) for times in measured.values()} == {measure.REPETITIONS}


def test_a_call_that_does_not_fit_beside_others_is_told(monkeypatch):
    FakeGpu(monkeypatch, refuses="no")
    monkeypatch.setattr(timers, "stable", lambda call: True)
    monkeypatch.setattr(measure, "ENOUGH", 0.0)
    left = iter([None, None])

    def large():
        if next(left, "spent") == "spent":
            raise torch.OutOfMemoryError("out of memory")

    measured = measure.times({"large": large, "small": lambda: None}, "cuda")
    assert measured["large"].note == "no graph: no; did not fit into memory beside the other providers"
    assert len(measured["small"].seconds) == measure.REPETITIONS


class FakeAllocator:
    """The memory of a GPU, which keeps its peak until it is forgotten, and refuses what is beyond a limit."""

    TOTAL = 100

    def __init__(self, monkeypatch):
        self.used, self.peak, self.share, self.log = 10, 90, 1.0, []
        fakes = {
            "empty_cache": lambda: self.log.append("empty cache"),
            "reset_peak_memory_stats": self.reset,
            "memory_allocated": lambda: self.used,
            "max_memory_allocated": lambda: self.peak,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: SimpleNamespace(total_memory=self.TOTAL * 2**30),
            "set_per_process_memory_fraction": self.limit,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def reset(self):
        self.log.append("reset")
        self.peak = self.used

    def limit(self, share):
        self.share = share

    def take(self, amount):
        """What a call does: it takes as much, and gives it back."""
        self.log.append("call")
        if self.used + amount > self.share * self.TOTAL + 1e-9:
            raise torch.OutOfMemoryError
        self.peak = max(self.peak, self.used + amount)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, 30),
        (30.0, 30),
        (29.0, "does not fit into 29 GiB"),
    ],
)
def test_peak_memory_of_a_gpu(limit, expected, monkeypatch):
    """Of the second call alone, above what the inputs take, in GiB here; afterwards there is no limit."""
    gpu = FakeAllocator(monkeypatch)
    amounts = iter([60, 30])  # the first use of a library takes more
    run = SimpleNamespace(run=lambda inputs: gpu.take(next(amounts)))
    monkeypatch.setattr(measure, "provider", lambda case, name: run)
    monkeypatch.setattr(measure, "_limit_memory_of_gpu", scaled(measure._limit_memory_of_gpu))
    case = SimpleNamespace(device="cuda", memory_limit=limit, inputs=dict)
    found = measure.peak_memory(case, "any")
    assert gpu.log == ["call", "empty cache", "reset", "call"]
    assert gpu.share == 1.0
    if isinstance(expected, str):
        assert found == measure.Memory(error=expected)
    else:
        assert found.peak == expected and found.seconds > 0 and found.error == ""


def scaled(limit_memory):
    """A limit for a GPU whose bytes are GiB."""
    return lambda case, used: limit_memory(case, used * 2**30)


@pytest.mark.parametrize(("l2", "size"), [(50 * 2**20, 100 * 2**20), (0, timers.UNKNOWN_L2)])
def test_flushing_writes_twice_the_cache(l2, size, monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=l2))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    buffer = SimpleNamespace(zero_=lambda: made.append("written"))
    monkeypatch.setattr(torch, "empty", lambda count, dtype, device: made.append((count, dtype, device)) or buffer)
    timers._flushing_buffer.cache_clear()
    try:
        timers.flush_cache()
        timers.flush_cache()
    finally:
        timers._flushing_buffer.cache_clear()
    assert made == [(size, torch.int8, "cuda:0"), "written", "written"]


class NVMLError(Exception):
    pass


class NotSupportedError(NVMLError):
    pass


def raising(*_):
    raise NotSupportedError("Not Supported")


def fake_nvml(**changes):
    answers = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetHandleByPciBusId": lambda bus: bus,
        "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
        "nvmlDeviceGetPowerUsage": lambda handle: 412345,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 61,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x05,  # idle, and the power cap
    }
    return SimpleNamespace(**{name: value for name, value in (answers | changes).items() if value is not None})


@pytest.fixture
def card(monkeypatch):
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def made(package):
        monkeypatch.setitem(sys.modules, "pynvml", package)
        return nvml.Card()

    return made


def test_nvml(card):
    found = card(fake_nvml())
    assert (found.driver, found.missing, found._handle) == ("580.1", "", "00000000:3B:00.0")
    sample = found.sample()
    assert sample == found.last == nvml.Sample(1980, 2619, 412.345, 61, ("power cap",))
    hotter = sample._replace(temperature_c=63, sm_mhz=1900, throttled=("power cap", "hardware thermal"))
    assert nvml.summary([sample, hotter, sample]) == {
        "sm_mhz": 1980,
        "memory_mhz": 2619,
        "power_w": 412.3,
        "temperature_c": 63,
        "throttled": "power cap, hardware thermal",
    }


def test_columns_are_medians(card):
    """Of three samples whose means, first, last and greatest values are others."""
    three = [
        nvml.Sample(1980, 2619, 100.0, 50),
        nvml.Sample(1500, 1593, 690.0, 70),
        nvml.Sample(1935, 2600, 600.0, 65),
    ]
    assert nvml.summary(three) == {"sm_mhz": 1935, "memory_mhz": 2600, "power_w": 600.0, "temperature_c": 70}


THROTTLING = {
    "nvmlClocksThrottleReasonSwPowerCap": "power cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "software thermal",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "hardware thermal",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
}


@pytest.mark.parametrize(
    ("bit", "reason"),
    [
        *zip((0x04, 0x08, 0x20, 0x40, 0x80), THROTTLING.values(), strict=True),
        *((bit, None) for bit in (0x01, 0x02, 0x10, 0x100)),  # idle, clocks that were set, of another GPU, of a display
    ],
)
def test_reasons_for_throttling(bit, reason, card):
    found = card(fake_nvml(nvmlDeviceGetCurrentClocksEventReasons=lambda handle: bit)).sample().throttled
    assert found == (() if reason is None else (reason,))


def test_reasons_are_those_of_nvml():
    package = pytest.importorskip("pynvml")
    assert {getattr(package, name): reason for name, reason in THROTTLING.items()} == nvml._THROTTLING


def test_without_the_package_there_is_nothing(card):
    found = card(None)
    assert (found.driver, found.missing) == ("", "nvidia-ml-py is not installed")
    assert found.sample() == nvml.Sample() and nvml.summary([found.sample()]) == {}


def test_without_a_driver_there_is_nothing(card):
    found = card(fake_nvml(nvmlInit=raising))
    assert (found.driver, found.missing) == ("", "NVML: Not Supported")
    assert found.sample() == nvml.Sample()


def test_what_nvml_does_not_support_stays_empty(card):
    changes = {"nvmlDeviceGetPowerUsage": raising, "nvmlDeviceGetCurrentClocksEventReasons": None}
    found = card(fake_nvml(nvmlSystemGetDriverVersion=raising, **changes))
    assert found.driver == ""
    assert nvml.summary([found.sample()]) == {"sm_mhz": 1980, "memory_mhz": 2619, "temperature_c": 61}


def test_a_run_says_once_that_clocks_are_missing(monkeypatch, capsys):
    monkeypatch.setattr(nvml, "card", lambda: SimpleNamespace(missing="nvidia-ml-py is not installed"))
    monkeypatch.setattr(runner, "providers", lambda case: [])
    all_cases = [Case("masked_topk", "k=1", 1, device="cuda"), Case("masked_topk", "k=8", 1, device="cuda")]
    assert list(runner.run(all_cases, None, {}, print)) == []
    assert capsys.readouterr().out == "without clocks, power and temperature: nvidia-ml-py is not installed\n"
    assert list(runner.run([replace(case, device="cpu") for case in all_cases], None, {}, print)) == []
    assert capsys.readouterr().out == ""


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
    """Adds up the FLOPs of products, and the bytes that copies read and write."""

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "_int_mm"):
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
    single, _, ranking, copy = counted
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


def test_times_of_a_gpu_in_a_row():
    row = records.Row("masked_topk", "k=1", 1, 28, 28, 784, "float16", "cuda")
    row.set_times([0.001, 0.002, 0.003], [0.002, 0.004, 0.003], "graph")
    assert (row.median_ms, row.wall_ms, row.timer, row.repetitions) == (2.0, 3.0, "graph", 3)


def test_files_of_before_are_read(tmp_path, repository):
    (tmp_path / "masked_topk.csv").write_text(
        "op,call,images,height,width,anchors,dtype,provider,median_ms,q1_ms,q3_ms,repetitions,peak_mib,note,threads\n"
        "masked_topk,k=1,4,28,28,3136,float32,cpu,10.9,10.8,11.3,46,,,2\n"
    )
    (row,) = records.read_folder(tmp_path)
    assert (row.anchors, row.median_ms, row.repetitions, row.threads) == (3136, 10.9, 46, 2)
    assert row.timer == row.driver == "" and row.wall_ms is row.tflops is row.sm_mhz is None
    records.write(tmp_path, [replace(row, timer="wall", provider="faiss")])
    assert [(row.provider, row.timer) for row in records.read_folder(tmp_path)] == [("cpu", ""), ("faiss", "wall")]
    for folder in (repository / "benchmarks" / "results").iterdir():
        records.read_folder(folder)


def test_devices_have_distinct_names():
    """The first that is part of the name of a GPU is taken."""
    assert not [(one, other) for one in DEVICES for other in DEVICES if one != other and one in other]
