"""One operation in a separate process: `python -m amfm.kernels.acceptance.child SETTINGS`, SETTINGS being JSON.

Writes a line of JSON before and after each step, so that what had been found stands when it crashes and the step is known.
Settings: `do` (describe, check, run, time, tune), `operation`, `device`; of `check` and `run` the `kinds` of trials, of `time`
and `tune` the `names` of problems, all where there are none; `cases` is the module that has them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from amfm.kernels.acceptance.machine import describe_machine
from amfm.kernels.cases.trial import evaluate
from amfm.kernels.proof.check import check_trial

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
    """Run the kernels alone, forward and backward, for a tool that watches them."""
    for sized in _trials(settings):
        answer({"begun": sized.name})
        evaluate(sized.make(device, torch.bfloat16), "triton")
    if device.type == "cuda":
        torch.cuda.synchronize()
    answer({"done": True})


def _measure(settings: dict[str, Any], device: torch.device, answer: Answer) -> None:
    """Time the operation's problems for a GPU vs. PyTorch and installed packages, or choose its kernels' tiles."""
    from amfm.kernels.acceptance.choose_tiles import choose_tiles
    from amfm.kernels.acceptance.timing import time_problem
    from amfm.kernels.cases.problem import CardSizes
    from amfm.kernels.proof.timing import measure_milliseconds

    problems = importlib.import_module(settings["cases"]).OPERATIONS[settings["operation"]].on_card
    sizes = CardSizes(**settings.get("sizes", {}))
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


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), _open_answers())
