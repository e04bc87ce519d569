"""Tokens per second of a served model by how many ask at once, in turns, and of the same model with as many rows.

How it works: as many threads as askers take all their tokens from one `SharedModel`, as requests of `amfm serve` do, without
HTTP. A prompt is read before the clocks start. Seconds are those of the clock, and those of the process on its processors, which
hold next to other programs. `--other` does the same with another checkout's amfm and examples/serve, such as one from before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.bench.kernels import describe_hardware
from amfm.launch.console import print_json, print_rows
from benchmarks import ROOT
from benchmarks.command import main

# In a process of its own, with either checkout: tokens per second of the number of askers in its arguments.
ASK = """
import json, sys, threading, time
from pathlib import Path
from amfm.pretrain.inference.generate import Sampling
from amfm_serve.completions import load_model

path, tokens, prompt, *askers = sys.argv[1:]
shared = load_model(Path(path), device="cpu", backend="auto", max_state_bytes=1 << 30).shared
paces = {}
for number in map(int, askers):
    texts = [
        shared.generate([(7 * place + row) % 400 + 3 for place in range(int(prompt))], int(tokens) + 1, Sampling(seed=row), ())
        for row in range(number)
    ]
    for text in texts:
        next(text)
    threads = [threading.Thread(target=lambda text=text: [token for token in text]) for text in texts]
    start, own = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start, time.process_time() - own
    paces[number] = [number * int(tokens) / each for each in seconds]
print(json.dumps(paces))
"""


def askers(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="What `amfm serve` takes.")] = ROOT / "runs/tiny_cpu",
    *,
    numbers: Annotated[list[int] | None, typer.Option("--askers", min=1)] = None,
    tokens: Annotated[int, typer.Option(min=1)] = 100,
    prompt: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    other: Annotated[Path | None, typer.Option(metavar="CHECKOUT", help="Another checkout, timed in turns.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time one and several askers."""
    checkouts = {"": ROOT} | ({} if other is None else {"other: ": other.resolve()})
    found: dict[tuple[str, int], list[list[float]]] = {}
    for _ in range(rounds):
        for which, root in checkouts.items():
            for number, pace in ask(root, path, tokens, prompt, numbers or [1, 2, 4, 8]).items():
                found.setdefault((which, number), []).append(pace)
    first = [median(each) for each in zip(*next(iter(found.values())))]
    rows: list[dict[str, str | float]] = []
    for (which, number), paces in found.items():
        row: dict[str, str | float] = {"askers": f"{which}{number}"}
        for kind, of_first, each in zip(("per_second", "per_cpu_second"), first, zip(*paces)):
            row[f"tokens_{kind}"] = round(median(each), 1)
            row[f"least_{kind}"], row[f"most_{kind}"] = round(min(each), 1), round(max(each), 1)
            row[f"of_first_{kind}"] = round(median(each) / of_first, 2)
        rows.append(row)
    if as_json:
        print_json(
            {"hardware": describe_hardware(), "rounds": rounds, "tokens": tokens, "prompt": prompt, "rows": rows}
        )
    else:
        print_rows("Askers", tuple(rows[0]), [[str(value) for value in row.values()] for row in rows])


def ask(root: Path, path: Path, tokens: int, prompt: int, numbers: list[int]) -> dict[int, list[float]]:
    """Tokens per second of all askers together and per CPU second, by their number."""
    given = [str(path.resolve()), str(tokens), str(prompt), *map(str, numbers)]
    variables = {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'examples/serve'}", "PYTHONWARNINGS": "ignore"}
    answer = subprocess.run(
        [sys.executable, "-c", ASK, *given],
        env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if answer.returncode:
        raise RuntimeError(f"the served model ended with {answer.returncode}: {answer.stderr[-2000:]}")
    return {int(number): pace for number, pace in json.loads(answer.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    main(askers)
