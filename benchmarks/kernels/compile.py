"""Compile every kernel ahead of time for GPUs that need not be here, and table what each takes.

How it works: what blocks of the presets launch is recorded (presets.py), with what trials launch of the kernels that no
preset has. Triton compiles each form for an architecture without the GPU; registers, spills, shared memory and the use of
wgmma are read from the result. That finds on a laptop or in CI what would otherwise show as a slow kernel on a rented
GPU. The table stands between two markers of docs/benchmarks/kernels_ahead_of_time.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from amfm.kernels.proof.recorded import KernelLaunch

ARCHITECTURES = (80, 90, 100)
# Most KiB of shared memory that a program may take.
SHARED_KIB = {80: 163, 90: 227, 100: 227}
# Spills that a GPU's first cache holds besides a kernel's tiles.
MANY_BYTES = 128
BEGIN, END = "<!-- compile table: begin -->", "<!-- compile table: end -->"


class Miss(NamedTuple):
    """Forms of a kernel, by words of their names, that miss the goal on sm_90: by bytes of spills at most, or by wgmma.

    `before`: most bytes with the assembler of Triton before 3.7, which needs more registers.
    """

    kernel: str
    words: tuple[str, ...]
    most: int
    before: int
    reason: str
    has_wgmma: bool = True

    def is_of(self, name: str) -> bool:
        """Whether a form of this name is one of them."""
        return name.startswith(f"{self.kernel}:") and all(word in name for word in self.words)


# The goal on sm_90: no spills, and wgmma wherever a kernel multiplies. What misses it, and why; the first that fits counts.
MISSES = (
    Miss(
        "gradients_kernel", ("TILES=",), 80, 616,
        "holds two sums of N x Q and one of Q x Q over a group's heads, 80 registers, next to k q^T and a block of states; what "
        "spills is put away once per head",
    ),
    Miss(
        "gradients_kernel", (), 16, 40,
        "holds a product of scores next to three of the states for 32 columns of keys, which half the warps would double",
    ),
    Miss(
        "norm_backward_kernel", ("BLOCK_S=8192",), 32, 32, "holds 16 values of a row per thread, of y, gate, gradient and weight"
    ),
    Miss(
        "fp8_up_kernel", (), 40, 40,
        "holds a tile of the gate next to the sum of up, and makes codes of both and of their activation",
    ),
    Miss(
        "attention_key_gradient_kernel", ("BLOCK_K=256",), 0, 0,
        "holds two sums of keys x 256; with the 64 keys that wgmma takes it spills 400 bytes or more, with 32 nothing",
        has_wgmma=False,
    ),
    Miss("attention_key_gradient_kernel", ("BLOCK_K=128",), 0, 64, "the assembler's choice"),
    Miss("down_backward_kernel", (), 0, 32, "the assembler's choice"),
    Miss("scaled_outer_kernel", ("TILED=False",), 40, 40, "on sm_100, of one matrix; cause not found"),
)  # fmt: skip


def find_forms() -> dict[str, tuple[KernelLaunch, list[str]]]:
    """What is compiled, by name, each with the presets that launch it: none for a kernel that no preset has."""
    from amfm.kernels.proof.recorded import record
    from benchmarks.kernels.operations import OPERATIONS
    from benchmarks.kernels.presets import PRESETS, record_preset

    found: dict[str, tuple[KernelLaunch, list[str]]] = {}
    for path in PRESETS:
        for name, launch in record_preset(path).items():
            found.setdefault(name, (launch, []))[1].append(path.stem)
    kernels = {launch.kernel.fn.__name__ for launch, _ in found.values()}
    recorded = [
        item for case in reversed(OPERATIONS.values()) for item in record(case).items()
    ]  # the first case's counts
    others = {name: launch for name, launch in recorded if launch.kernel.fn.__name__ not in kernels}
    return dict(sorted((found | {name: (launch, []) for name, launch in others.items()}).items()))


def compile_kernels(architectures: Sequence[int] = ARCHITECTURES, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Compile every form for each architecture; returns a row of resources for each pair.

    Rows: `kernel`, `presets`, `architecture`, `warps` a program, `registers` a thread, `spill_bytes` a thread,
    `shared_bytes` a program, `wgmma`, `multiplies` (has products, so that wgmma is wanted on sm_90). Raises RuntimeError in
    Triton's interpreter.
    """
    from amfm.kernels.proof.ahead_of_time import compile_ahead
    from amfm.kernels.runtime.backend import triton_version

    forms = find_forms()
    rows = []
    for number, (name, (launch, presets)) in enumerate(forms.items()):
        report(f"compiling {name} ({number + 1} of {len(forms)})")
        for architecture in [each for each in architectures if each >= launch.first_architecture]:
            compiled = compile_ahead(launch.kernel, launch.signature, launch.constants, architecture, **launch.options)
            rows.append(
                {
                    "kernel": name,
                    "presets": presets,
                    "architecture": architecture,
                    "warps": launch.options.get("num_warps", 4),
                    "registers": compiled.registers,
                    "spill_bytes": compiled.spill_bytes,
                    "shared_bytes": compiled.shared_bytes,
                    "wgmma": compiled.uses_wgmma,
                    "multiplies": launch.multiplies,
                }
            )
    version = triton_version()
    assert version is not None, "kernels were compiled without Triton"
    return {"triton": ".".join(map(str, version)), "rows": rows}


def table_of(result: dict[str, Any]) -> str:
    """Markdown table of `compile_kernels`, a line a form, followed by the list of those that miss the goal."""
    architectures = sorted({row["architecture"] for row in result["rows"]})
    head = " | ".join(f"sm_{architecture}" for architecture in architectures)
    lines = [
        f"Triton {result['triton']}, bfloat16. Registers per thread / spilled bytes per thread / KiB of shared memory per program.",
        "",
        f"| form | presets | warps | {head} | wgmma on sm_90 |",
        "|---|---|---|" + "---|" * len(architectures) + "---|",
    ]
    by_form: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        by_form.setdefault(row["kernel"], {})[row["architecture"]] = row
    for name, rows in by_form.items():
        cells = " | ".join(
            f"{rows[a]['registers']} / {rows[a]['spill_bytes']} / {rows[a]['shared_bytes'] / 1024:.3g}"
            if a in rows
            else "-"
            for a in architectures
        )
        first, hopper = next(iter(rows.values())), rows.get(90)
        wgmma = "" if hopper is None or not hopper["multiplies"] else "yes" if hopper["wgmma"] else "no"
        lines.append(f"| {name} | {len(first['presets'])} | {first['warps']} | {cells} | {wgmma} |")
    return "\n".join([*lines, "", *_misses(result["rows"])]) + "\n"


def _misses(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each form that spills on sm_90 or multiplies there without wgmma, and one for each other GPU."""
    lines = []
    for row in rows:
        if row["architecture"] != 90:
            continue
        faults = [f"spills {row['spill_bytes']} bytes per thread"] if row["spill_bytes"] else []
        faults += ["multiplies without wgmma"] if row["multiplies"] and not row["wgmma"] else []
        if faults:
            reason = next((miss.reason for miss in MISSES if miss.is_of(row["kernel"])), "cause not found")
            lines.append(f"- {row['kernel']}: {' and '.join(faults)}; {reason}.")
    found = ["Misses the goal on sm_90 (no spills, wgmma in every product):", "", *lines] if lines else []
    for architecture in sorted({row["architecture"] for row in rows} - {90}):
        many = [row for row in rows if row["architecture"] == architecture and row["spill_bytes"] > MANY_BYTES]
        if many:
            named = ", ".join(f"{row['kernel'].partition(':')[0]} ({row['spill_bytes']})" for row in many)
            found += [
                *([""] if found else []),
                f"Spills of more than {MANY_BYTES} bytes per thread on sm_{architecture}: {named}.",
            ]
    return found


def check_document(document: Path) -> None:
    """Check that the document holds the two markers for the table. Raises ValueError if it does not."""
    text = document.read_text()
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"{document} must hold the lines {BEGIN} and {END}, between which the table goes")


def write_table(document: Path, text: str) -> None:
    """Replace what stands between the document's two markers. Raises ValueError if it has none."""
    check_document(document)
    before, _, rest = document.read_text().partition(BEGIN)
    document.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
