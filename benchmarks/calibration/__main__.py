"""`python -m benchmarks.calibration`: this machine as a file for `amfm plan --gpu`, and how well the plan then does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say
from benchmarks.calibration.fit import measure_machine, write_hardware
from benchmarks.command import main


def calibration(
    path: Annotated[Path, typer.Argument(metavar="OUT.yaml", help="The hardware file to write.")],
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps per model; the models take turns.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure peak speeds and steps of six small models, and write a hardware file for `amfm plan --gpu`.

    The plan of steps that were not fitted is printed next to their measured time.
    """
    if path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
        raise ValueError(f"{path} must end in .yaml and be in a folder that exists; use hardware.yaml")
    hardware, checks = measure_machine(rounds=rounds, num_threads=threads, report=say)
    write_hardware(hardware, checks, path)
    if as_json:
        found = [{"name": c.name, "planned_seconds": c.planned, "measured_seconds": c.measured} for c in checks]
        print_json({"hardware": hardware.model_dump(), "checks": found})
    else:
        print_rows(
            f"{hardware.name} as in {path}",
            ("whole steps", "planned s", "measured s", "error"),
            [(c.name, f"{c.planned:.3f}", f"{c.measured:.3f}", f"{c.error:+.0%}") for c in checks],
        )


if __name__ == "__main__":
    main(calibration)
