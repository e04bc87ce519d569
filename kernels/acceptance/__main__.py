"""`python -m amfm.kernels.acceptance`: verify the kernels on the GPU of this machine, then time them.

It needs only torch, triton and numpy. Four stages, each for one operation after the other: `compile` every kernel in a pool of
processes, `check` every output and gradient against float64 (twice, for equal bits; once under torch.compile), `sanitize` under
compute-sanitizer where it is installed, `time` vs. PyTorch and installed packages. Each operation runs in a separate
process with a limit on its time, and the report, a file of JSON that is whole after each step, is written after each. Exit code
3 for any fault, 2 where the machine cannot serve.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from amfm.kernels.acceptance.process import Finished, run_child
from amfm.kernels.cases import KINDS
from amfm.kernels.runtime.backend import REQUIREMENTS, refuse_triton, triton_version
from amfm.kernels.runtime.first_use import DEFAULT_CASES
from amfm.kernels.runtime.user_cache import write_whole

STAGES = ("compile", "check", "sanitize", "time")


class Report:
    """Findings by stage and operation. A file that is there already continues: another call may run other stages.

    Raises ValueError if the file is of another GPU or other versions.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self._path = path
        self.content: dict[str, Any] = {"machine": machine} | {stage: {} for stage in STAGES}
        if path.is_file():
            known = json.loads(path.read_text())
            if known["machine"] != machine:
                raise ValueError(f"{path} is the report of another machine, {known['machine']}; name another --out")
            self.content = known

    def put(self, stage: str, name: str, found: dict[str, Any]) -> None:
        """Keep what a stage found of an operation or a kernel, and write the file."""
        self.content[stage][name] = found
        write_whole(self._path, self.content)

    def faults(self) -> list[str]:
        """All faults, each with its stage and operation."""
        return [
            f"{stage} {name}: {fault}"
            for stage in STAGES
            for name, found in self.content[stage].items()
            for fault in found["faults"]
        ]


def compile_lines(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Kernels that spill, and those that do not compile."""
    spilling = {name: row["spill_bytes"] for name, row in rows.items() if row.get("spill_bytes")}
    yield f"compiled {len(rows)} kernels; registers spill in {len(spilling)}"
    yield from (f"  {name}: {bytes_} bytes per thread" for name, bytes_ in spilling.items())


def check_lines(operation: str, found: dict[str, Any]) -> Iterator[str]:
    """A line a trial: its worst tensor, that tensor's error vs. PyTorch's and the bound."""
    for trial in found["trials"]:
        worst = trial["tensors"][0] if trial["tensors"] else None
        numbers = (
            f"{worst['name']} off {_shown(worst['error'])}, torch {_shown(worst['torch_error'])}, bound {worst['bound']:.2g}"
            if worst
            else "no numbers"
        )
        verdict = "FAULT" if trial["faults"] else "right"
        yield f"  {verdict}  {operation}: {trial['trial']} ({trial['seconds']:.1f} s): {numbers}"
        yield from (f"         {fault}" for fault in trial["faults"])


def _shown(error: float | None) -> str:
    """An error with two digits; None is one that is not finite."""
    return "not finite" if error is None else f"{error:.2g}"


def time_lines(found: dict[str, Any]) -> Iterator[str]:
    """A line a variant: milliseconds of forward, backward and both, times ours, share of an H100's roofline."""
    by_variant: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        by_variant.setdefault((row["op"], row["backend"]), {})[row["pass"]] = row
    for (operation, variant), passes in by_variant.items():
        both = passes["both"]
        times = " ".join(f"{passes[which]['milliseconds']:9.3f}" for which in ("forward", "backward", "both"))
        ratio = f"{both['ratio']:5.2f} x ours" if both["ratio"] else " " * 12
        yield f"  {operation:22} {variant:16} {times} ms  {ratio}  {both['roofline_fraction']:4.0%} of an H100"
    yield from (f"  {remark}" for remark in found["remarks"])


BAD_MACHINE, FAULTY = 2, 3
# Without a GPU the kernels are compiled for Hopper.
DEFAULT_ARCHITECTURE = 90


def main(words: list[str]) -> int:
    """Run the stages that are asked for and return the exit code."""
    given = read_arguments(words)
    if given.device != "cpu":
        obstacle = find_obstacle(given.device)
        if obstacle is not None:
            print(f"error: {obstacle}", file=sys.stderr)
            return BAD_MACHINE
    try:
        operations = _operations(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_MACHINE
    described = run_child({"do": "describe", "device": given.device}, given.seconds, interpreted=given.device == "cpu")
    if described.fault:
        print(f"error: the GPU does not answer: {described.fault}", file=sys.stderr)
        return BAD_MACHINE
    machine = described.lines[0]
    operations = _that_run(given, operations, machine["capability"] or DEFAULT_ARCHITECTURE)
    try:
        report = Report(given.out, machine)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_MACHINE
    print(
        ", ".join(f"{name} {value}" for name, value in {**machine, **machine["versions"]}.items() if name != "versions")
    )
    runs = {"compile": _compile, "check": _check, "sanitize": _sanitize, "time": _time}
    for stage in given.stages:
        runs[stage](given, machine, operations, report)
    return _conclude(report, given.out)


def read_arguments(words: list[str]) -> argparse.Namespace:
    """The command's arguments; exits with 2 for wrong ones."""
    parser = argparse.ArgumentParser(prog="python -m amfm.kernels.acceptance", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu: a rehearsal in Triton's interpreter")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)}")
    parser.add_argument("--op", action="append", help="only this operation; may be given again")
    parser.add_argument("--kinds", default="", help="trials: first, small, long; all on a GPU, first on a CPU")
    parser.add_argument("--out", type=Path, default=Path("acceptance.json"), help="the report; an old one continues")
    parser.add_argument("--seconds", type=float, default=300.0, help="limit of one operation's process")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--cases", default=DEFAULT_CASES, help="module with OPERATIONS")
    given = parser.parse_args(words)
    given.stages = given.stages.split(",")
    for stage in given.stages:
        if stage not in STAGES:
            parser.error(f"--stages {stage}: there is no such stage; use {', '.join(STAGES)}")
    if given.device == "cpu" and "time" in given.stages and given.stages != list(STAGES):
        parser.error("--stages time: kernels are timed on a GPU; leave out time, or --device cpu")
    if given.device == "cpu":
        given.stages = [stage for stage in given.stages if stage not in ("sanitize", "time")]
    given.kinds = given.kinds.split(",") if given.kinds else ["first"] if given.device == "cpu" else []
    for kind in given.kinds:
        if kind not in KINDS:
            parser.error(f"--kinds {kind}: there is no such kind of trial; use {', '.join(KINDS)}")
    return given


def find_obstacle(device: str) -> str | None:
    """What keeps kernels from running on a CUDA device: versions found, versions that work, what pip can install.

    None if nothing does.
    """
    version = triton_version()
    found = f"found torch {torch.__version__}, Triton {'.'.join(map(str, version)) if version else 'none'}"
    if torch.version.cuda is None:
        return f"this torch is built without CUDA ({found}): `pip install 'torch>=2.15'` brings one with it. {REQUIREMENTS}"
    try:
        torch.cuda.init()
        gpu = torch.device(device)
        properties = torch.cuda.get_device_properties(gpu)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"there is no CUDA GPU that answers ({reason}; {found}, CUDA {torch.version.cuda}): see whether nvidia-smi lists "
            f"one; a driver too old for this CUDA wants a newer driver, or a torch of an older CUDA (`pip install torch "
            f"--index-url https://download.pytorch.org/whl/cu126`). {REQUIREMENTS}"
        )
    refusal = refuse_triton(gpu)
    return f"{properties.name}: {refusal}" if refusal else None


def _operations(given: argparse.Namespace) -> list[str]:
    """Names of the operations to go through. Raises ValueError for an unknown one, and for cases that are none."""
    try:
        known = importlib.import_module(given.cases).OPERATIONS
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--cases {given.cases}: {error}; name a module that Python finds (PYTHONPATH), with OPERATIONS in it"
        ) from error
    for name in given.op or ():
        if name not in known:
            raise ValueError(f"--op {name}: there is no such operation; use {', '.join(known)}")
    return given.op or [*known]


def _that_run(given: argparse.Namespace, operations: list[str], architecture: int) -> list[str]:
    """Those of the operations that the GPU has instructions for; says which it leaves out."""
    known = importlib.import_module(given.cases).OPERATIONS
    for name in operations:
        if known[name].first_architecture > architecture:
            print(f"{name} needs sm_{known[name].first_architecture}: left out on this GPU", flush=True)
    return [name for name in operations if known[name].first_architecture <= architecture]


def _compile(given: argparse.Namespace, machine: dict[str, Any], operations: list[str], report: Report) -> None:
    """Compile all kernels of these operations for the GPU."""
    from amfm.kernels.proof.ahead_of_time import compile_all

    architecture = machine["capability"] or DEFAULT_ARCHITECTURE
    for row in compile_all(given.cases, architecture, operations, given.jobs, given.seconds):
        fault = row.pop("fault")
        report.put("compile", row["kernel"], row | {"faults": [fault] if fault else []})
        if fault:
            print(f"  FAULT  {row['kernel']}: {fault}", flush=True)
    print(*compile_lines(report.content["compile"]), sep="\n", flush=True)


def _check(given: argparse.Namespace, machine: dict[str, Any], operations: list[str], report: Report) -> None:
    """Hold every operation's trials against float64."""
    for operation in operations:
        settings = {"do": "check", "operation": operation, "kinds": given.kinds, "compiled": True}
        finished = _child(given, settings)
        trials = [line for line in finished.lines if "trial" in line]
        faults = [f"{trial['trial']}: {fault}" for trial in trials for fault in trial["faults"]]
        found = {"trials": trials, "faults": faults + ([finished.fault] if finished.fault else [])}
        report.put("check", operation, found)
        print(*check_lines(operation, found), sep="\n", flush=True)
        if finished.fault:
            print(f"  FAULT  {operation}: {finished.fault}", flush=True)


def _sanitize(given: argparse.Namespace, machine: dict[str, Any], operations: list[str], report: Report) -> None:
    """Run the first trials under compute-sanitizer's memcheck and racecheck, where it is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        print("compute-sanitizer is not installed: nothing was sanitized", flush=True)
        return
    for operation in operations:
        faults = []
        for check in ("memcheck", "racecheck"):
            before = [tool, "--tool", check, "--error-exitcode", "86"]
            finished = _child(given, {"do": "run", "operation": operation, "kinds": ["first"]}, before)
            faults += [f"{check}: {finished.fault}"] if finished.fault else []
        report.put("sanitize", operation, {"faults": faults})
        print(f"  {'FAULT' if faults else 'right'}  {operation}: memcheck, racecheck", *faults, sep="\n  ", flush=True)


def _time(given: argparse.Namespace, machine: dict[str, Any], operations: list[str], report: Report) -> None:
    """Time every operation that has a problem for a GPU."""
    for operation in operations:
        finished = _child(given, {"do": "time", "operation": operation})
        for found in [line for line in finished.lines if "rows" in line]:
            report.put("time", found["op"], found)
            print(*time_lines(found), sep="\n", flush=True)
        if finished.fault:
            report.put("time", operation, {"rows": [], "remarks": [], "faults": [finished.fault]})
            print(f"  FAULT  {operation}: {finished.fault}", flush=True)


def _child(given: argparse.Namespace, settings: dict[str, Any], before: list[str] | None = None) -> Finished:
    """Run a child on the run's device with its limit of time."""
    settings = settings | {"device": given.device, "cases": given.cases}
    return run_child(settings, given.seconds, interpreted=given.device == "cpu", before=before)


def _conclude(report: Report, path: Path) -> int:
    """Report what is wrong, and return the exit code."""
    faults = report.faults()
    print(f"report: {path}")
    if not faults:
        print("no fault")
        return 0
    print(f"{len(faults)} faults:", *faults, sep="\n  ", file=sys.stderr)
    return FAULTY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
