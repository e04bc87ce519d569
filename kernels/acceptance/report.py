"""What an acceptance run has found so far: a file of JSON that is whole after each step, and tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
