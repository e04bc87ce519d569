"""What is measured: the operations of `kernels/`, and those of packages in examples/ (`pip install ./examples/mixers`)."""

from __future__ import annotations

from collections.abc import Callable

from amfm.kernels.cases import GpuSizes, HostSizes, Inputs, OperationCase, Problem, find_package
from amfm.kernels.proof import operations

_PACKAGED = [find_package("amfm_mixers.diag_scan.case")]
OPERATIONS: dict[str, OperationCase] = operations.OPERATIONS | {
    name: case for module in _PACKAGED if module is not None for name, case in module.OPERATIONS.items()
}
# What is timed on a GPU or a CPU, by the name that benchmarks give it; an operation may be timed in two forms.
ON_CARD: dict[str, Callable[[Inputs, GpuSizes], Problem]] = {
    name: build for case in OPERATIONS.values() for name, build in case.on_gpu.items()
}
ON_HOST: dict[str, Callable[[Inputs, HostSizes], Problem]] = {
    name: build for case in OPERATIONS.values() for name, build in case.on_host.items()
}
