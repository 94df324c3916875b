"""Numbers of NVML, with a stand-in for the library: the GPUs themselves are nothing that a CPU has."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from benchmarks import measure
from copd_engine import gpu_meter
from copd_engine.gpu_meter import GpuMeter, GpuUse, gpu_stats
from copd_engine.metrics import system_stats


class NvmlDouble:
    """Stands in for pynvml: two GPUs, of which the second is a slice that offers neither utilisation, power nor energy.

    ``energy_mj``, ``utilization`` and ``used`` are of the first and are set by the test.
    """

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.energy_mj, self.utilization, self.used = 5_000_000, 97, 2**30
        self.num_questions = 0

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, device: int) -> str:  # noqa: N802
        return f"GPU-{device}"

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=self.used if device == 0 else 2 * 2**30, total=80 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, device: int) -> SimpleNamespace:  # noqa: N802
        self._refuse(device)
        self.num_questions += 1
        return SimpleNamespace(gpu=self.utilization)

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:  # noqa: N802
        self._refuse(device)
        return 412_500

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:  # noqa: N802
        self._refuse(device)
        return self.energy_mj

    def _refuse(self, device: int) -> None:
        if device == 1:
            raise self.NVMLError("not supported")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[NvmlDouble]:
    gpu_meter.nvml.cache_clear()
    double = NvmlDouble()
    monkeypatch.setitem(sys.modules, "pynvml", double)
    yield double
    gpu_meter.nvml.cache_clear()


def test_numbers_of_the_moment(double: NvmlDouble) -> None:
    first, second = system_stats()["gpu"]
    assert first == {
        "memory_used_bytes": 2**30,
        "memory_total_bytes": 80 * 2**30,
        "utilization_percent": 97.0,
        "power_w": 412.5,
    }
    assert second["memory_used_bytes"] == 2 * 2**30
    assert second["utilization_percent"] is None
    assert second["power_w"] is None


def test_energy_utilisation_and_peak_of_a_block(double: NvmlDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_meter, "SAMPLE_S", 1e-3)
    double.utilization = 0
    with GpuMeter(["GPU-0"]) as meter:
        double.utilization, double.used = 100, 7 * 2**30  # a peak between the ends
        seen, deadline = double.num_questions, time.monotonic() + 30
        while double.num_questions < seen + 3:
            assert time.monotonic() < deadline, "the thread does not sample"
            time.sleep(1e-3)
        double.used, double.energy_mj = 3 * 2**30, 5_012_500
    assert set(meter.use) == {0}
    use = meter.use[0]
    assert use.energy_j == 12.5
    assert use.peak_memory_bytes == 7 * 2**30
    assert use.mean_utilization_percent is not None
    assert 60 < use.mean_utilization_percent < 100  # one sample of 0 and at least three of 100
    assert meter.energy_j() == 12.5
    with meter:  # again: of this block alone
        double.energy_mj += 500
    assert meter.energy_j() == 0.5
    assert meter.use[0].peak_memory_bytes == 3 * 2**30


def test_the_meters_thread_ends_with_its_block_and_with_an_error_in_it(double: NvmlDouble) -> None:
    meter = GpuMeter(["GPU-0"])
    before = threading.active_count()
    seen = []

    def fail() -> None:
        with meter:
            seen.append(threading.active_count())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [before + 1]
    assert threading.active_count() == before


def test_what_a_gpu_does_not_offer_is_none(double: NvmlDouble) -> None:
    with GpuMeter(["GPU-1"]) as meter:
        pass
    assert meter.use == {1: GpuUse(None, None, 2 * 2**30)}
    assert meter.energy_j() is None
    with GpuMeter(["GPU-0", "GPU-1"]) as meter:
        double.energy_mj += 1000
    assert meter.use[0].energy_j == 1.0
    assert meter.energy_j() is None  # the sum would leave one out


def test_a_steps_numbers_join_those_of_the_moment(double: NvmlDouble) -> None:
    with GpuMeter(["GPU-0"]) as meter:
        double.energy_mj += 30_000
    stats = system_stats(meter, 1200)
    assert stats["energy_per_token_j"] == 0.025
    first, second = stats["gpu"]
    assert (first["energy_j"], first["mean_utilization_percent"], first["peak_memory_bytes"]) == (30.0, 97.0, 2**30)
    assert first["power_w"] == 412.5
    assert "energy_j" not in second  # not measured: another's GPU
    assert system_stats(meter, 0)["energy_per_token_j"] is None


def test_only_gpus_that_torch_sees_are_measured(double: NvmlDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid="0"))
    with GpuMeter() as meter:
        pass
    assert set(meter.use) == {0}


def test_no_driver_means_no_gpu(double: NvmlDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NvmlDouble.NVMLError("driver not loaded")

    monkeypatch.setattr(double, "nvmlInit", fail)
    nothing_is_measured()


def test_no_package_means_no_gpu(double: NvmlDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nothing_is_measured()


def nothing_is_measured() -> None:
    assert gpu_stats() is None
    before = threading.active_count()
    with GpuMeter(["GPU-0"]) as meter:
        assert threading.active_count() == before
    assert meter.use == {}
    stats = system_stats(meter, 100)
    assert stats["gpu"] is None
    assert stats["energy_per_token_j"] is None


def test_joules_are_of_one_call(double: NvmlDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ENERGY_S", 0.05)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)

    def call() -> None:
        double.energy_mj += 250

    assert measure.joules(call, GpuMeter(["GPU-0"])) == pytest.approx(0.25)
    assert measure.joules(call, GpuMeter(["GPU-1"])) is None


def test_a_benchmarks_table_of_gpus() -> None:
    assert measure.gpu_table({}) == ""
    text = measure.gpu_table({0: GpuUse(1234.4, 87.6, 3 * 2**30), 1: GpuUse(None, None, None)})
    assert "| 0 | 1,234 | 88 | 3,072 |" in text
    assert "| 1 | - | - | - |" in text
