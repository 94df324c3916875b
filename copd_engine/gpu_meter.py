"""What NVML says of a machine's GPUs: now, and over an interval with the energy that was spent.

nvidia-ml-py is installed with the package; without a driver or a GPU every answer is None.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

import torch

#: Utilisation and memory have no counters in NVML: they are asked for this often while a meter runs.
SAMPLE_S = 0.1


@dataclass(frozen=True)
class GpuUse:
    """One GPU over an interval: joules, mean utilisation, peak of the memory in use on it (by anybody).

    None for what the GPU does not offer.
    """

    energy_j: float | None
    mean_utilization_percent: float | None
    peak_memory_bytes: int | None


@dataclass
class _Device:
    handle: Any
    energy_mj: int | None = None
    utilization: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


class GpuMeter:
    """Measures GPUs while the block of a ``with`` runs, as often as one likes; :attr:`use` is of the last block.

    Energy is the difference of NVML's counter of millijoules since the driver was loaded, which a GPU renews some tens
    of times a second: a block should last longer. The rest is sampled every :data:`SAMPLE_S` seconds by a thread, and
    at both ends. What other processes do on the same GPU is in all of it. A block that ends before its kernels do
    leaves them out.

    ``uuids``: the GPUs to measure, by NVML's names; by default those that torch sees in this process. Where there are
    none, ``use`` is empty and no thread is started.
    """

    def __init__(self, uuids: Collection[str] | None = None) -> None:
        self._nvml = nvml()
        self._uuids = visible_uuids() if uuids is None else set(uuids)
        self._devices: dict[int, _Device] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        #: By NVML's index of the GPU.
        self.use: dict[int, GpuUse] = {}

    def __enter__(self) -> GpuMeter:
        self._devices = self._find()
        self._sample()
        for device in self._devices.values():
            device.energy_mj = self._energy_mj(device)
        if self._devices:
            self._done.clear()
            self._thread = threading.Thread(target=self._run, name="gpu meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ends = {index: self._energy_mj(device) for index, device in self._devices.items()}
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self._thread = None
        self._sample()
        self.use = {index: _use(device, ends[index]) for index, device in self._devices.items()}

    def energy_j(self) -> float | None:
        """Joules of all measured GPUs in the last block; None without a GPU, or where one of them has no counter."""
        energies = [use.energy_j for use in self.use.values()]
        known = [energy for energy in energies if energy is not None]
        return sum(known) if known and len(known) == len(energies) else None

    def _find(self) -> dict[int, _Device]:
        if self._nvml is None or not self._uuids:
            return {}
        handles = {i: self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())}
        uuids = {index: ask(self._nvml, self._nvml.nvmlDeviceGetUUID, handle) for index, handle in handles.items()}
        return {index: _Device(handle) for index, handle in handles.items() if uuids[index] in self._uuids}

    def _energy_mj(self, device: _Device) -> int | None:
        assert self._nvml is not None
        energy: int | None = ask(self._nvml, self._nvml.nvmlDeviceGetTotalEnergyConsumption, device.handle)
        return energy

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        for device in self._devices.values():
            assert self._nvml is not None
            rates = ask(self._nvml, self._nvml.nvmlDeviceGetUtilizationRates, device.handle)
            memory = ask(self._nvml, self._nvml.nvmlDeviceGetMemoryInfo, device.handle)
            device.utilization += [] if rates is None else [float(rates.gpu)]
            device.memory += [] if memory is None else [int(memory.used)]


def _use(device: _Device, end_mj: int | None) -> GpuUse:
    known = end_mj is not None and device.energy_mj is not None
    return GpuUse(
        energy_j=(end_mj - device.energy_mj) / 1e3 if known else None,  # type: ignore[operator]
        mean_utilization_percent=statistics.fmean(device.utilization) if device.utilization else None,
        peak_memory_bytes=max(device.memory, default=None),
    )


def visible_uuids() -> set[str]:
    """NVML's names of the GPUs that torch sees in this process."""
    count = torch.cuda.device_count()
    return {f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)}


def gpu_stats() -> list[dict[str, float | None]] | None:
    """Memory, utilisation and power of every GPU of the machine at this moment; None where there is none."""
    library = nvml()
    if library is None:
        return None
    stats = []
    for index in range(library.nvmlDeviceGetCount()):
        device = library.nvmlDeviceGetHandleByIndex(index)
        memory = ask(library, library.nvmlDeviceGetMemoryInfo, device)
        rates = ask(library, library.nvmlDeviceGetUtilizationRates, device)
        power_mw = ask(library, library.nvmlDeviceGetPowerUsage, device)
        stats.append(
            {
                "memory_used_bytes": None if memory is None else int(memory.used),
                "memory_total_bytes": None if memory is None else int(memory.total),
                "utilization_percent": None if rates is None else float(rates.gpu),
                "power_w": None if power_mw is None else power_mw / 1000,
            }
        )
    return stats or None


def ask(library: ModuleType, question: Any, device: Any) -> Any:
    """An answer of NVML about a device; None where the device does not offer it."""
    try:
        return question(device)
    except library.NVMLError:
        return None


@functools.cache  # opening NVML takes long enough to be felt in every step
def nvml() -> ModuleType | None:
    """nvidia-ml-py, opened; None where the package, the driver or the GPU is missing."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
    except library.NVMLError:
        return None
    return library
