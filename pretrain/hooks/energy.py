"""Energy of all GPUs, every ENERGY_STEPS steps, where NVIDIA's driver counts it (NVML, read by its library; no package needed)."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import torch

from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult

ENERGY_STEPS = 20
LIBRARY = "libnvidia-ml.so.1"


class Energy(Hook):
    """Puts `energy` into a step's line: joules of all GPUs since the reading before, and watts of one in the mean.

    meter: of this rank; None: the driver's. Where one rank has none, no rank reads, and the start says why.
    """

    def __init__(self, run: Run, meter: EnergyMeter | None = None) -> None:
        self.run, self.problem = run, ""
        try:
            self.meter = meter or EnergyMeter.of(run.parallel.device)
        except RuntimeError as error:
            self.problem = str(error)
        (is_missing,) = run.parallel.max_over_all([int(bool(self.problem))])
        self.is_read = not is_missing
        self.since = time.monotonic()

    def at_start(self) -> None:
        """Say that energy is not logged."""
        if not self.is_read:
            self.run.say(f"energy of GPUs is not logged: {self.problem or 'another rank has no reading'}")

    def after_step(self, result: StepResult) -> None:
        """Read, and add up what all ranks have used."""
        if not self.is_read or not is_due(self.run.progress.step, ENERGY_STEPS):
            return
        try:
            own = self.meter.take()
        except RuntimeError:  # all ranks learn of it: the sum has no number
            own = float("nan")
        joules = torch.tensor([own], dtype=torch.float64, device=self.run.parallel.device)
        if self.run.parallel.world_size > 1:
            torch.distributed.all_reduce(joules)
        now = time.monotonic()
        total, seconds, self.since = float(joules), now - self.since, now
        watts = total / seconds / self.run.parallel.world_size
        result.found["energy"] = {"joules": finite(total), "watts_per_gpu": finite(watts)}


class EnergyMeter:
    """Reads how much energy a GPU has used. Raises RuntimeError, saying why, if the driver does not count it.

    uuid: of the GPU, as `nvidia-smi -L` shows it; numbers of GPUs differ between the driver and this process. library: NVML.
    """

    def __init__(self, uuid: str, library: Any) -> None:
        self.library, self.device = library, ctypes.c_void_p()
        self.check(library.nvmlInit_v2())
        self.check(library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self.device)))
        self.last = self.total()

    @classmethod
    def of(cls, device: torch.device) -> EnergyMeter:
        """The meter of a CUDA device."""
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise RuntimeError(f"{LIBRARY} cannot be opened") from error
        return cls(f"GPU-{torch.cuda.get_device_properties(device).uuid}", library)

    def total(self) -> int:
        """Millijoules since the driver was loaded."""
        found = ctypes.c_ulonglong()
        self.check(self.library.nvmlDeviceGetTotalEnergyConsumption(self.device, ctypes.byref(found)))
        return found.value

    def take(self) -> float:
        """Joules since the last call, or since this was made."""
        before, self.last = self.last, self.total()
        return (self.last - before) / 1e3

    def check(self, code: int) -> None:
        """Raise RuntimeError for a code other than 0."""
        if code:
            raise RuntimeError(f"NVML has no energy of this GPU (code {code})")
