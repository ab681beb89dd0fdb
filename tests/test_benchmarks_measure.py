"""Timers and peak memory of a GPU with a fake `torch.cuda`, NVML with a fake package."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results as records
from benchmarks import run as runner
from benchmarks.cases import Case
from benchmarks.timing import measure, nvml, timers


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


@pytest.mark.parametrize("right_before", [0, 3])
def test_a_call_that_fails_while_it_is_timed_says_so(right_before):
    """Times of before the failure are no result."""
    left = iter(range(right_before))

    def fail():
        if next(left, None) is None:
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
