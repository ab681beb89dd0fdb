"""Clocks, power, temperature and throttling of the current GPU, as NVML says them (package nvidia-ml-py, optional)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch

# The bits of NVML's clocks event reasons that slow work down. Others say that the GPU idles or that its user chose.
_THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


class Sample(NamedTuple):
    """What NVML said at one moment; None or nothing where it did not.

    Attributes:
        sm_mhz: clock of the multiprocessors.
        memory_mhz: clock of the memory.
        power_w: as NVML averages it, on newer GPUs over a second.
        temperature_c: of the GPU.
        throttled: why clocks are lowered.
    """

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()


class Card:
    """The current GPU of PyTorch, as NVML sees it.

    Attributes:
        driver: version of the driver, or "".
        missing: why there is nothing to sample, or "".
        last: what was sampled last.
    """

    def __init__(self) -> None:
        self.driver, self.missing, self.last = "", "", Sample()
        try:
            import pynvml
        except ImportError:
            self.missing = "nvidia-ml-py is not installed"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(_bus_id())
        except pynvml.NVMLError as error:
            self.missing = f"NVML: {error}"
            return
        self.driver = self._asked(pynvml.nvmlSystemGetDriverVersion) or ""

    def sample(self) -> Sample:
        """What NVML says now."""
        if self.missing:
            return self.last
        nvml, handle = self._nvml, self._handle
        power = self._asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        # Packages before that of driver 535 have no such function.
        reasons = self._asked(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0
        self.last = Sample(
            self._asked(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            self._asked(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            None if power is None else power / 1e3,
            self._asked(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            tuple(name for bit, name in _THROTTLING.items() if reasons & bit),
        )
        return self.last

    def _asked(self, query: Callable[[], Any]) -> Any:
        try:
            return query()
        except (self._nvml.NVMLError, AttributeError):  # this GPU, driver or package does not say
            return None


def _bus_id() -> str:
    """Where the GPU is plugged in: NVML does not count GPUs as CUDA_VISIBLE_DEVICES does."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.pci_domain_id:08X}:{found.pci_bus_id:02X}:{found.pci_device_id:02X}.0"


@cache
def card() -> Card:
    """The current GPU, asked for once."""
    return Card()


def summary(samples: Iterable[Sample]) -> dict[str, float | str]:
    """The columns of a row: medians, the highest temperature, and all reasons for throttling; no others."""
    clocks, memory, powers, temperatures, reasons = ([], [], [], [], [])
    for sample in samples:
        for values, value in zip((clocks, memory, powers, temperatures), sample[:4], strict=True):
            values += [] if value is None else [value]
        reasons += sample.throttled
    columns = {"sm_mhz": clocks, "memory_mhz": memory, "power_w": powers}
    found: dict[str, float | str] = {name: round(statistics.median(own), 1) for name, own in columns.items() if own}
    if temperatures:
        found["temperature_c"] = max(temperatures)
    return found | ({"throttled": ", ".join(dict.fromkeys(reasons))} if reasons else {})
