"""What a start costs: processor seconds of commands next to those of the libraries that they cannot do without, in turns.

How it works: each command is a fresh process, and its user and system time are read when it ends; the least of all rounds counts,
so that other programs on the machine change little. Modules are counted by `-X importtime`. `--other` adds another checkout
(`git worktree add`), such as one from before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.bench.kernels import describe_hardware
from amfm.launch.console import print_json, print_rows
from benchmarks import ROOT
from benchmarks.command import main

HELP, TORCH = "import typer, typer.rich_utils", "import torch"
PLAN = ["plan", str(ROOT / "configs/tiny_cpu.yaml"), "--gpus", "1"]
REFUSED = ["train", str(ROOT / "configs/tiny_cpu.yaml"), "train.steps=0"]
# Name -> arguments of Python, and the libraries that it is compared with.
STARTS: dict[str, tuple[list[str], str]] = {
    HELP: (["-c", HELP], HELP),
    "amfm --help": (["-m", "amfm.launch", "--help"], HELP),
    "amfm train with a wrong setting": (["-m", "amfm.launch", *REFUSED], TORCH),
    TORCH: (["-c", TORCH], TORCH),
    "import amfm.pretrain.train": (["-c", "import amfm.pretrain.train"], TORCH),
    "amfm plan": (["-m", "amfm.launch", *PLAN], TORCH),
}


def starts(
    *,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    other: Annotated[Path | None, typer.Option(metavar="CHECKOUT", help="Another checkout, timed in turns.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time starts of commands against the libraries below them."""
    checkouts = {"": ROOT} | ({} if other is None else {"other: ": other.resolve()})
    least: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for which, root in checkouts.items():
            for name, (arguments, _) in STARTS.items():
                seconds = time_start(root, arguments)
                least[which, name] = min(seconds, least.get((which, name), seconds))
    rows = [
        {
            "start": which + name,
            "cpu_seconds": round(seconds, 3),
            "ratio": round(seconds / least[which, STARTS[name][1]], 2),
            "to": STARTS[name][1],
            "modules": count_modules(checkouts[which], STARTS[name][0]),
        }
        for (which, name), seconds in least.items()
    ]
    if as_json:
        print_json({"hardware": describe_hardware(), "rounds": rounds, "rows": rows})
    else:
        print_rows("Starts", tuple(rows[0]), [[str(value) for value in row.values()] for row in rows])


def environment(root: Path) -> dict[str, str]:
    """Variables with which Python takes amfm from a checkout."""
    return os.environ | {"PYTHONPATH": str(root / "src"), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def time_start(root: Path, arguments: list[str]) -> float:
    """Processor seconds of one process, user and system."""
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, used = os.wait4(process.pid, 0)
    return used.ru_utime + used.ru_stime


def count_modules(root: Path, arguments: list[str]) -> int:
    """Number of modules that a process imports."""
    with tempfile.TemporaryFile("w+") as errors:
        subprocess.run(
            [sys.executable, "-X", "importtime", *arguments],
            env=environment(root), stdout=subprocess.DEVNULL, stderr=errors, check=False,
        )  # fmt: skip
        errors.seek(0)
        return sum(line.startswith("import time:") for line in errors)


if __name__ == "__main__":
    main(starts)
