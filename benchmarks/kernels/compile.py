"""Compile every kernel ahead of time for GPUs that need not be here, and table what each takes.

How it works: Triton compiles a kernel for an architecture without the GPU; registers, spills, shared memory and the
use of wgmma are read from the result. That finds on a laptop or in CI what would otherwise show as a slow kernel on a
rented GPU. The table stands between two markers of docs/benchmarks/kernels_ahead_of_time.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
# Spills that a GPU's first cache holds besides a kernel's tiles.
MANY_BYTES = 128
BEGIN, END = "<!-- compile table: begin -->", "<!-- compile table: end -->"

# Why a kernel misses the goal on sm_90: no spills, and wgmma wherever it multiplies.
_SUMS = (
    "holds two sums of N x Q and one of Q x Q over a group's heads, 80 registers, next to k q^T and a block of states; "
    "what spills is put away once per head"
)
REASONS = {
    "scan gradients": _SUMS,
    "mixer gradients": f"{_SUMS}, and the distances of tokens in the projection and its gradient are arguments",
    "gated norm, up to 8192 wide (Granite), backward": (
        "holds 16 values of a row per thread, of y, gate, gradient and weight"
    ),
    "delta gradients, 2 steps per token": (
        "holds a product of scores next to three of the states for 32 columns of keys, which half the warps would double"
    ),
    "fp8 experts up": "holds a tile of the gate next to the sum of up, and makes codes of both and of their activation",
    "attention d_k d_v, head 256": (
        "holds two sums of keys x 256; with the 64 keys that wgmma takes it spills 400 bytes or more, with 32 nothing"
    ),
}


def compile_kernels(architectures: Sequence[int] = ARCHITECTURES, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Compile every kernel for each architecture; returns a row of resources for each pair.

    Rows: `kernel`, `architecture`, `warps` a program, `registers` a thread, `spill_bytes` a thread, `shared_bytes` a
    program, `wgmma`, `multiplies` (has products, so that wgmma is wanted on sm_90). Raises RuntimeError in Triton's
    interpreter.
    """
    from amfm.kernels.proof.ahead_of_time import compile_ahead
    from amfm.kernels.proof.operations import all_launches
    from amfm.kernels.runtime.backend import triton_version

    cases = [*all_launches()]
    rows = []
    for number, case in enumerate(cases):
        report(f"compiling {case.name} ({number + 1} of {len(cases)})")
        for architecture in [each for each in architectures if each >= case.first_architecture]:
            compiled = compile_ahead(case.kernel, case.signature, case.constants, architecture, **case.options)
            rows.append(
                {
                    "kernel": case.name,
                    "architecture": architecture,
                    "warps": case.options.get("num_warps", 4),
                    "registers": compiled.registers,
                    "spill_bytes": compiled.spill_bytes,
                    "shared_bytes": compiled.shared_bytes,
                    "wgmma": compiled.uses_wgmma,
                    "multiplies": case.multiplies,
                }
            )
    version = triton_version()
    assert version is not None, "kernels were compiled without Triton"
    return {"triton": ".".join(map(str, version)), "rows": rows}


def table_of(result: dict[str, Any]) -> str:
    """Markdown table of `compile_kernels`, a line a kernel, followed by the list of kernels that miss the goal."""
    architectures = sorted({row["architecture"] for row in result["rows"]})
    head = " | ".join(f"sm_{architecture}" for architecture in architectures)
    lines = [
        f"Triton {result['triton']}, bfloat16. Registers per thread / spilled bytes per thread / KiB of shared memory per program.",
        "",
        f"| kernel | warps | {head} | wgmma on sm_90 |",
        "|---|---|" + "---|" * len(architectures) + "---|",
    ]
    by_kernel: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        by_kernel.setdefault(row["kernel"], {})[row["architecture"]] = row
    for name, rows in by_kernel.items():
        cells = " | ".join(
            f"{rows[a]['registers']} / {rows[a]['spill_bytes']} / {rows[a]['shared_bytes'] / 1024:.3g}"
            if a in rows
            else "-"
            for a in architectures
        )
        hopper = rows.get(90)
        wgmma = "" if hopper is None or not hopper["multiplies"] else "yes" if hopper["wgmma"] else "no"
        lines.append(f"| {name} | {next(iter(rows.values()))['warps']} | {cells} | {wgmma} |")
    return "\n".join([*lines, "", *_misses(result["rows"])]) + "\n"


def _misses(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel that spills on sm_90 or multiplies there without wgmma, and one for each other GPU."""
    lines = []
    for row in rows:
        if row["architecture"] != 90:
            continue
        faults = [f"spills {row['spill_bytes']} bytes per thread"] if row["spill_bytes"] else []
        faults += ["multiplies without wgmma"] if row["multiplies"] and not row["wgmma"] else []
        if faults:
            reason = next((text for name, text in REASONS.items() if row["kernel"].startswith(name)), "cause not found")
            lines.append(f"- {row['kernel']}: {' and '.join(faults)}; {reason}.")
    found = ["Misses the goal on sm_90 (no spills, wgmma in every product):", "", *lines] if lines else []
    for architecture in sorted({row["architecture"] for row in rows} - {90}):
        many = [row for row in rows if row["architecture"] == architecture and row["spill_bytes"] > MANY_BYTES]
        if many:
            named = ", ".join(f"{row['kernel']} ({row['spill_bytes']})" for row in many)
            found += [
                *([""] if found else []),
                f"Spills of more than {MANY_BYTES} bytes per thread on sm_{architecture}: {named}.",
            ]
    return found


def check_document(document: Path) -> None:
    """Check that the document holds the two markers for the table. Raises ValueError where it does not."""
    text = document.read_text()
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"{document} must hold the lines {BEGIN} and {END}, between which the table goes")


def write_table(document: Path, text: str) -> None:
    """Replace what stands between the document's two markers. Raises ValueError where it has none."""
    check_document(document)
    before, _, rest = document.read_text().partition(BEGIN)
    document.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
