"""Energy is the driver's counter between readings, and a driver without one is said and ends nothing."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.hooks.energy import ENERGY_STEPS, Energy, EnergyMeter
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from tests.pretrain.tiny_run import tiny_config


class Driver:
    """NVML of one GPU that has used 5 J more at each reading; `code`: what its counter answers."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.millijoules, self.asked = code, 90_000, b""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        self.asked = uuid
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, found: Any) -> int:
        self.millijoules += 5_000
        ctypes.cast(found, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
        return self.code


def test_a_reading_is_the_difference_to_the_one_before_in_joules() -> None:
    driver = Driver()
    meter = EnergyMeter("GPU-1234", driver)
    assert (meter.take(), meter.take(), driver.asked) == (5.0, 5.0, b"GPU-1234")


def test_a_driver_that_does_not_count_says_its_code_and_one_that_is_not_there_its_library() -> None:
    with pytest.raises(RuntimeError, match=r"NVML has no energy of this GPU \(code 3\)"):
        EnergyMeter("GPU-1234", Driver(code=3))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"libnvidia-ml.so.1 cannot be opened"):
            EnergyMeter.of(torch.device("cuda", 0))


def test_a_step_that_is_due_gets_joules_and_watts_and_a_run_without_a_meter_none(
    data: DataConfig, tmp_path: Path
) -> None:
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path), signals)
        driver = Driver()
        hook = Energy(run, EnergyMeter("GPU-1234", driver))
        result = train_step(run)
        hook.after_step(result)
        assert "energy" not in result.found
        run.progress.step = ENERGY_STEPS
        hook.after_step(result)
        assert result.found["energy"]["joules"] == 5.0 and result.found["energy"]["watts_per_gpu"] > 0
        driver.code = 15  # the GPU fell off the bus
        hook.after_step(result)
        assert result.found["energy"] == {"joules": None, "watts_per_gpu": None}
        close_run(run)
