"""The verb profile: where a traced step's time went, and how to look at the trace itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_pairs, print_rows
from amfm.launch.existing import require_exists

if TYPE_CHECKING:
    from amfm_profile.trace import Profile


def profile(
    run_dir: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR", help="Run directory with traced steps (train.profile).", callback=require_exists
        ),
    ],
    *,
    step: Annotated[int | None, typer.Option(min=1, help="Traced step; default: the newest.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Rank of the trace; default: the first available.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `profile`.

    Example: amfm profile runs/tiny_cpu --step 20
    """
    from amfm_profile.trace import profile_run

    found = profile_run(run_dir, step, rank)
    if as_json:
        print_json(found.as_json())
    else:
        print_profile(found)


def print_profile(found: Profile) -> None:
    """Print three tables and where to open the files."""
    from amfm_profile.trace import PASSES, describe_peak

    untraced = found.untraced_milliseconds
    beside = "" if untraced is None else f"; steps without a trace: {untraced:,.1f} ms, the median"
    memory = found.file.memory()
    pairs = [
        ("length", f"{found.milliseconds:,.1f} ms{beside}"),
        ("times of", "kernels on the GPU" if found.on_device else "operations on the CPU"),
        ("peak memory", describe_peak(found)),
    ]
    print_pairs(f"Step {found.file.step} of rank {found.file.rank}", pairs)

    def share(milliseconds: float) -> str:
        return f"{milliseconds / found.milliseconds:.1%}"

    rows = [(kind, f"{time:,.1f}", share(time)) for kind, time in found.kinds.items()]
    print_rows("By kind of work", ("kind", "ms", "of the step"), rows)
    of_blocks = [
        (name, *(f"{times[kind]:,.1f}" for kind in PASSES), share(sum(times.values())))
        for name, times in found.blocks.items()
    ]
    print_rows("By part of the model", ("part", *(f"{kind} ms" for kind in PASSES), "of the step"), of_blocks)
    longest = [
        (
            line["operation"][:60],
            line["kind"],
            f"{line['calls']:,}",
            f"{line['milliseconds']:,.1f}",
            share(line["milliseconds"]),
        )
        for line in found.operations
    ]
    print_rows("Longest operations", ("operation", "kind", "calls", "ms", "of the step"), longest)
    places = [("trace", f"{found.file.path}: drag it into https://ui.perfetto.dev, which reads it only in the browser")]
    if memory is not None:
        places.append(("memory", f"{memory}: drag it into https://pytorch.org/memory_viz"))
    print_pairs("To look closer", places)
