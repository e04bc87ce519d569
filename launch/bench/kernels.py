"""Kernel benchmark on a CUDA GPU: our Triton kernels, PyTorch, and the public packages that are installed.

How it works: each operation runs in a separate process (`amfm.kernels.acceptance`), where every variant is judged
against float32 by its worst tensor, then timed. An operation that crashes is a fault and takes no other along.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch

from amfm.kernels.acceptance.process import Finished, run_child
from amfm.kernels.proof.operations import check_names
from amfm.kernels.runtime.first_use import DEFAULT_CASES
from amfm.pretrain.monitor.environment import read_processor_name


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products; a CPU without them emulates them many times slower."""
    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())


def describe_hardware() -> dict[str, Any]:
    """Processor, threads and versions that the numbers were taken with."""
    return {
        "processor": read_processor_name(),
        "threads": torch.get_num_threads(),
        "bf16_products": multiplies_bf16(torch.device("cpu")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


# One operation's process: the slowest kernels compile for a minute, and tuning compiles each several times.
TIMING_SECONDS, TUNING_SECONDS = 600.0, 3600.0


def bench_cuda(
    names: list[str] | None = None, cases: str = DEFAULT_CASES, *, report: Callable[[str], None]
) -> dict[str, Any]:
    """Time every case on the current GPU: `rows` as `bench_cpu` has them, with `roofline_fraction` against an H100.

    A variant that cannot run its case is named in `remarks` with its reason and has no row. `relative_error` is that of
    the worst of output and gradients against our PyTorch code in float32. `faults` are those of our own kernels, and of
    operations whose process did not end well. Raises ValueError for an unknown operation.
    """
    problems = _find_problems(cases, names)
    result: dict[str, Any] = {"hardware": _describe_gpu(), "rows": [], "remarks": [], "faults": []}
    for name in names or problems:
        report(f"timing {name}")
        finished = _run("time", cases, problems[name], name, TIMING_SECONDS)
        for found in [line for line in finished.lines if "rows" in line]:
            for part in ("rows", "remarks", "faults"):
                result[part] += found[part]
        result["faults"] += [f"{name}: {finished.fault}"] if finished.fault else []
    return result


def tune_cuda(
    names: list[str] | None = None, cases: str = DEFAULT_CASES, *, report: Callable[[str], None]
) -> dict[str, Any]:
    """Tune the kernels of these operations on the current GPU: `environment`, `configs`, `faults`.

    Every candidate is compared with our PyTorch code in float32 before it is timed, forward and backward together. The
    GPU's table is saved after each operation. Raises ValueError for an unknown operation.
    """
    problems = _find_problems(cases, names)
    result: dict[str, Any] = {"environment": {}, "configs": {}, "faults": []}
    for name in names or problems:
        report(f"tuning {name}")
        finished = _run("tune", cases, problems[name], name, TUNING_SECONDS)
        for line in finished.lines:
            if "said" in line:
                report(line["said"])
            elif "configs" in line:
                result |= line
        result["faults"] += [f"{name}: {finished.fault}"] if finished.fault else []
    return result


def _find_problems(cases: str, names: list[str] | None) -> dict[str, str]:
    """The operation of each problem for a GPU. Raises ValueError for a module without cases, or for an unknown name."""
    try:
        operations = importlib.import_module(cases).OPERATIONS
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"--cases {cases} must be a module with OPERATIONS, of an installed package: {error}"
        ) from error
    problems = {name: case.name for case in operations.values() for name in case.on_gpu}
    check_names(names, problems)
    return problems


def _run(do: str, cases: str, operation: str, name: str, seconds: float) -> Finished:
    """Run one problem for a GPU in a child."""
    settings = {"do": do, "operation": operation, "names": [name], "device": "cuda", "cases": cases}
    return run_child(settings, seconds)


def _describe_gpu() -> dict[str, Any]:
    """The GPU and the versions of what ran on it. Raises RuntimeError if the GPU does not answer."""
    described = run_child({"do": "describe", "device": "cuda"}, TIMING_SECONDS)
    if described.fault:
        raise RuntimeError(f"the GPU does not answer: {described.fault}")
    machine = described.lines[0]
    return {"card": machine["card"], "cuda": machine["cuda"], **machine["versions"], **describe_hardware()}
