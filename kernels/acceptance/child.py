"""One operation in a separate process: `python -m amfm.kernels.acceptance.child SETTINGS`, SETTINGS being JSON.

Writes a line of JSON before and after each step, so that what had been found stands when it crashes and the step is known.
Settings: `do` (describe, check, run, time, tune), `operation`, `device`; of `check` and `run` the `kinds` of trials, of `time`
and `tune` the `names` of problems, all if there are none; `cases` is the module that has them, `folders` those of its package.

An operation is timed next to PyTorch and the public packages that are installed, each variant compared with float32 first. A peer
that cannot run is a warning; one of our own kernels that cannot run, or has a tensor that is too far from float32, is a fault.
Figures are medians of forward, of backward and of both, and shares of an H100's roofline. Tiles are chosen in the same way, each
candidate verified before it is timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.attention.varlen import activate_newest, restore
from amfm.kernels.cases import Compute, GpuSizes, Inputs, Problem, evaluate
from amfm.kernels.proof.check import (
    REFUSALS,
    TensorVerdict,
    check_trial,
    finite,
    judge,
    measure_milliseconds,
    narrowest,
)
from amfm.kernels.runtime.tuning import Table, describe_launch_failure, find_environment, tune

FIRST_FP8 = 89  # compute capability from which products take FP8
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "mamba_ssm",
    "causal_conv1d",
    "flash-linear-attention",
    "flash_attn",
    "liger_kernel",
)
# Relative RMS of any output or gradient in bfloat16 against float32 that a tuned kernel may have.
LARGEST_ERROR = 5e-2


def describe_machine(device: torch.device) -> dict[str, Any]:
    """GPU, driver and versions, as the report has them; `capability` is 0 without a GPU."""
    found: dict[str, Any] = {"card": "none: Triton's interpreter", "capability": 0}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "card": properties.name,
            "capability": properties.major * 10 + properties.minor,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver_version(),
        } | describe_presence(properties.major * 10 + properties.minor)
    return found | {"python": platform.python_version(), "cuda": torch.version.cuda, "versions": _versions()}


def describe_presence(capability: int) -> dict[str, str]:
    """Which FlashAttention PyTorch's attention would run on such a GPU, and whether its products take FP8; for a log line."""
    name, reason = activate_newest(capability // 10)
    restore()
    takes_fp8 = hasattr(torch, "_scaled_mm") and capability >= FIRST_FP8
    return {"flash_attention": f"{name} ({reason})" if reason else name, "fp8": "yes" if takes_fp8 else "no"}


def _versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _driver_version() -> str | None:
    """Version of the driver, None if nvidia-smi is missing."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split()[0] if answer.split() else None


FLOPS_A_SECOND, BYTES_A_SECOND = 800e12, 3.0e12
PASSES = ("forward", "backward", "both")
Measure = Callable[[Callable[[], object]], float]


def time_problem(
    name: str,
    build: Callable[[Inputs, GpuSizes], Problem],
    device: torch.device,
    sizes: GpuSizes,
    measure: Measure,
) -> dict[str, Any]:
    """`op`, its `rows` (one for each variant and pass), `remarks` and `faults`, in bfloat16; the same numbers in every process.

    Rows: `op`, `pass`, `shape`, `dtype`, `backend`, `milliseconds`, `roofline_fraction` (of an H100), `ratio` (how many times
    as long as ours), `relative_error` (that of the worst of output and gradients, against float32) and `worst_tensor`.
    """
    torch.manual_seed(0)
    problem = build(Inputs(device, torch.bfloat16), sizes)
    ours = {"triton": problem.on("triton"), "torch": problem.on("torch")}
    return time_variants(name, problem, ours | problem.peers(), measure)


def time_variants(name: str, problem: Problem, variants: Mapping[str, Compute], measure: Measure) -> dict[str, Any]:
    """As `time_problem`, of given variants; "torch" is what the others are compared with."""
    wide = tuple(leaf.detach().float().requires_grad_() for leaf in problem.tensors)
    exact, beside = _results(variants["torch"], wide), _results(variants["torch"], problem.tensors)
    found: dict[str, Any] = {"op": name, "rows": [], "remarks": [], "faults": []}
    our_times: tuple[float, ...] | None = None
    for variant, compute in variants.items():
        try:
            verdict = judge(_results(compute, problem.tensors), beside, exact, narrowest(problem.tensors))[0]
            times = _time(problem, compute, measure)
        except REFUSALS as error:
            words = describe_launch_failure(error) or str(error)
            found["remarks"].append(f"{name}: {variant} cannot run here: {words}")
            if variant == "triton":
                found["faults"].append(f"{name} did not run: {words}")
            continue
        if variant == "triton":
            our_times = times
            found["faults"] += [] if verdict.holds else [_describe(name, verdict)]
        for place, which in enumerate(PASSES):
            found["rows"].append(
                {
                    "op": name,
                    "pass": which,
                    "shape": problem.shape,
                    "dtype": "bf16",
                    "backend": variant,
                    "milliseconds": times[place],
                    "roofline_fraction": _fraction(problem, which, times[place]),
                    "ratio": None if our_times is None or variant == "triton" else times[place] / our_times[place],
                    "relative_error": finite(verdict.error),
                    "worst_tensor": verdict.name,
                }
            )
    return found


def _describe(name: str, verdict: TensorVerdict) -> str:
    return (
        f"{name}: {verdict.name} is off by {verdict.error:.2g}, above {verdict.bound:.2g} (PyTorch in bfloat16: "
        f"{verdict.torch_error:.2g})"
    )


def _results(variant: Compute, leaves: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output and gradients of a variant by name, with ones as the incoming gradient."""
    output = variant(*leaves)
    gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
    return {"output": output.detach()} | {f"gradient {place}": each for place, each in enumerate(gradients)}


def _time(problem: Problem, compute: Compute, measure: Measure) -> tuple[float, float, float]:
    """Milliseconds of forward, of backward, and of both in a row."""
    output = compute(*problem.tensors)
    direction = torch.ones_like(output)

    def differentiate(output: Tensor, *, keep: bool) -> None:
        torch.autograd.grad(output, problem.tensors, direction, retain_graph=keep)

    return (
        measure(lambda: compute(*problem.tensors)),
        measure(lambda: differentiate(output, keep=True)),
        measure(lambda: differentiate(compute(*problem.tensors), keep=False)),
    )


def _fraction(problem: Problem, which: str, milliseconds: float) -> float:
    """Fraction of an H100's roofline: its least time for the pass over the time taken."""
    passes = {
        "forward": (problem.forward,),
        "backward": (problem.backward,),
        "both": (problem.forward, problem.backward),
    }
    least = sum(max(moved / BYTES_A_SECOND, flops / FLOPS_A_SECOND) for moved, flops in passes[which])
    return least * 1e3 / milliseconds


Answer = Callable[[dict[str, Any]], None]


def serve(settings: dict[str, Any], answer: Answer) -> None:
    """Do what the settings ask."""
    device = torch.device(settings["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if settings["do"] == "describe":
        answer(describe_machine(device))
    elif settings["do"] in ("time", "tune"):
        _measure(settings, device, answer)
    elif settings["do"] == "run":
        _run(settings, device, answer)
    else:
        _check(settings, device, answer)


def _trials(settings: dict[str, Any]) -> list[Any]:
    """The trials that the settings name."""
    case = importlib.import_module(settings["cases"]).OPERATIONS[settings["operation"]]
    return list(case.trials_of(settings["kinds"]))


def _check(settings: dict[str, Any], device: torch.device, answer: Answer) -> None:
    """Hold each trial against float64; the first also under torch.compile where asked."""
    for place, sized in enumerate(_trials(settings)):
        answer({"begun": sized.name})
        compiled = place == 0 and settings.get("compiled", False)
        answer(check_trial(sized, device, torch.bfloat16, compiled=compiled).as_json())
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _run(settings: dict[str, Any], device: torch.device, answer: Answer) -> None:
    """Run only the kernels, forward and backward, for a tool that watches them."""
    for sized in _trials(settings):
        answer({"begun": sized.name})
        evaluate(sized.make(device, torch.bfloat16), "triton")
    if device.type == "cuda":
        torch.cuda.synchronize()
    answer({"done": True})


def _measure(settings: dict[str, Any], device: torch.device, answer: Answer) -> None:
    """Time the operation's problems for a GPU vs. PyTorch and installed packages, or choose its kernels' tiles."""
    problems = importlib.import_module(settings["cases"]).OPERATIONS[settings["operation"]].on_gpu
    sizes = GpuSizes(**settings.get("sizes", {}))
    for name in settings.get("names") or problems:
        answer({"begun": name})
        if settings["do"] == "tune":
            table = choose_tiles(problems[name], device, sizes, lambda text: answer({"said": text}))
            answer({"environment": vars(table.environment), "configs": table.configs})
        else:
            answer(time_problem(name, problems[name], device, sizes, measure_milliseconds))
        torch.cuda.empty_cache()


def _open_answers() -> Answer:
    """A function that writes lines of JSON; what libraries print goes to standard error from now on."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(found: dict[str, Any]) -> None:
        lines.write(json.dumps(found) + "\n")
        lines.flush()

    return answer


def choose_tiles(
    build: Callable[[Inputs, GpuSizes], Problem],
    device: torch.device,
    sizes: GpuSizes,
    report: Callable[[str], None],
) -> Table:
    """Tune the kernels that a problem launches, forward and backward together, and save this GPU's table; returns it.

    Raises RuntimeError if this compiler miscompiles a kernel as it stands.
    """
    torch.manual_seed(0)
    problem = build(Inputs(device, torch.bfloat16), sizes)
    wide = tuple(leaf.detach().float().requires_grad_() for leaf in problem.tensors)
    exact = list(_results(problem.on("torch"), wide).values())
    table = Table.load(find_environment(device))
    tune(
        lambda: list(_results(problem.on("triton"), problem.tensors).values()), exact, measure_milliseconds, table,
        tolerance=LARGEST_ERROR, report=report,
    )  # fmt: skip
    table.save()
    return table


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    sys.path += [os.path.dirname(folder) for folder in asked["folders"]]
    serve(asked, _open_answers())
