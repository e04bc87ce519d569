"""Energy of this rank's GPU, as NVIDIA's driver counts it (NVML, read by its library; no package needed)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"


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
