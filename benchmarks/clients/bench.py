"""Trains and exports the models, and runs the programs on the exports."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from amfm_clients.check import CLIENTS, ClientReport, check_export
from amfm_tasks.make_tasks import make_tasks

from amfm.model.huggingface.refusals import ClientName
from amfm.pretrain.tasks.suite import flatten_results
from benchmarks.clients.models import MODELS
from benchmarks.clients.page import EXPLANATION, Page, describe, to_row

TASKS = ("text_continuation", "text_next_word", "text_text")
STEPS = 20


@dataclass(frozen=True)
class Environments:
    """Interpreters: `readers` has llama.cpp, mlx-lm, lm-eval and peft with trl, `vllm` has vLLM."""

    readers: str
    vllm: str

    def of(self, client: ClientName) -> str:
        """Interpreter of a program."""
        return self.vllm if client == "vllm" else self.readers


@dataclass(frozen=True)
class ClientBench:
    """Reports by model and program, values of tasks by the way they were measured, seconds of the clock and processor."""

    reports: dict[str, dict[ClientName, ClientReport]]
    tasks: dict[str, dict[str, float]]
    seconds: float
    processor_seconds: float

    def is_as_expected(self) -> bool:
        """Whether every program agrees, or rejects or misreads as known, and the three ways to measure tasks agree."""
        outcomes = [report for row in self.reports.values() for report in row.values()]
        return (
            all(report.outcome in ("equal", "refused", "misread") for report in outcomes)
            and not self.task_differences()
        )

    def task_differences(self) -> list[str]:
        """Tasks whose values differ by more than rounding between the ways, relatively above 1e-4."""
        first, *others = self.tasks.values() or ({},)
        return [
            name
            for name, value in first.items()
            if any(abs(other[name] - value) > 1e-4 * max(1.0, abs(value)) for other in others)
        ]


def choose_models(classes: Sequence[str]) -> list[str]:
    """Names of the models of the classes, of all if there are none. Raises ValueError for a class that has none."""
    by_class = {name: name.split()[0] for name in MODELS}
    unknown = [each for each in classes if each not in by_class.values()]
    if unknown:
        known = ", ".join(dict.fromkeys(by_class.values()))
        raise ValueError(f"--only {unknown[0]!r} is not a class of the page; use one of {known}")
    return [name for name, its_class in by_class.items() if not classes or its_class in classes]


def bench_clients(
    folder: Path, environments: Environments, names: Sequence[str], say: Callable[[str], None]
) -> ClientBench:
    """Train, export and check models; measure tasks on the first of all. Leaves all of it in `folder`.

    Raises RuntimeError for a command of ours that fails.
    """
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    reports: dict[str, dict[ClientName, ClientReport]] = {}
    tasks: dict[str, dict[str, float]] = {}
    run_amfm(folder, "sample-data", "shakespeare", "corpus")
    for number, name in ((number, name) for number, name in enumerate(MODELS) if name in names):
        run, export = f"runs/{number}", f"exports/{number}"
        config = folder / f"{number}.yaml"
        fields = run_config(run, name.split()[0], MODELS[name])
        config.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        if not reports:
            run_amfm(folder, "prepare", config.name)
        if number == 0:
            make_tasks(folder / "store", folder / "tasks", name="text", num_documents=40)
        measured = ["evaluate.include_path=tasks", f"evaluate.tasks=[{','.join(TASKS)}]"] if number == 0 else []
        if not (folder / export).exists():
            say(f"{name}: {STEPS} steps, export")
            run_amfm(folder, "train", config.name, *measured)
            run_amfm(folder, "export", run, export)
        if number == 0:
            tasks = dict(measure_tasks(folder, run, export, environments.readers))
        reports[name] = {}
        for client in CLIENTS:
            report = check_export(folder / export, client, python=environments.of(client))
            reports[name][client] = report
            say(f"{name}: {client}: {describe(report)}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ClientBench(reports, tasks, time.monotonic() - start, used.ru_utime + used.ru_stime)


def to_page(bench: ClientBench, hardware: str, command: str) -> Page:
    """The page of a run; one of some classes only has their rows, and shows that others are not of this run."""
    is_whole = list(bench.reports) == list(MODELS)
    minutes = f"{bench.seconds / 60:.1f} minutes, {bench.processor_seconds / 60:.1f} of a processor"
    made = f"A model of each class trains {STEPS} steps and is exported. {EXPLANATION}"
    rest = f". {made}" if is_whole else f"; rows of {', '.join(bench.reports)}."
    versions = (
        next((row[client].version for row in bench.reports.values() if row[client].version), None) for client in CLIENTS
    )
    return Page(
        (f"`{command}` on {hardware}: {minutes}{rest}",),
        {name: to_row(MODELS[name]["pattern"], row) for name, row in bench.reports.items()},
        tuple(each for version in versions if version for each in version.split(", ")),
        tuple(_task_lines(bench.tasks)) if bench.tasks else (),
    )


def _task_lines(tasks: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    ways = list(tasks)
    yield "| task | " + " | ".join(ways) + " |"
    yield "|---" * (1 + len(ways)) + "|"
    for name in tasks[ways[0]]:
        yield f"| {name} | " + " | ".join(f"{tasks[way][name]:.6g}" for way in ways) + " |"


def run_config(run: str, target: str, model: dict[str, Any]) -> dict[str, Any]:
    """Build the configuration of a small run."""
    return {
        "run": {"dir": run, "tensorboard": False},
        "model": {"vocab_size": 512, "hidden_size": 64, **model},
        "data": {
            "store": "store",
            "sources": [{"name": "shakespeare", "paths": ["corpus"]}],
            "tokenizer": {"vocab_size": 512},
        },
        "train": {
            "steps": STEPS,
            "sequence_length": 256,
            "micro_batch_size": 4,
            "global_batch_size": 4,
            "num_threads": 1,
            "precision": "float32",
            "validation_batches": 1,
        },
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "wsd", "warmup_steps": 5},
        "export": {"target": target},
    }


def measure_tasks(folder: Path, run: str, export: str, readers: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield values of the tasks as the run logged them, as `amfm evaluate` finds them, and as lm-eval does on the export."""
    lines = (folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    yield "in the loop", json.loads(lines[-1])["tasks"]
    printed = run_amfm(folder, "evaluate", run, "--tasks", ",".join(TASKS), "--include-path", "tasks", "--json")
    yield "amfm evaluate", json.loads(printed)["tasks"]
    out = folder / "lm_eval"
    run_command(
        folder,
        [
            *(readers, "-P", "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={export},dtype=float32"),
            *("--tasks", ",".join(TASKS), "--include_path", "tasks", "--batch_size", "1", "--device", "cpu"),
            *("--output_path", str(out)),
        ],
    )
    newest = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    yield "lm-eval on the export", flatten_results(json.loads(newest.read_text(encoding="utf-8"))["results"])


def run_amfm(folder: Path, *arguments: str) -> str:
    """Run one of our commands in the folder and return what it printed."""
    return run_command(folder, [sys.executable, "-P", "-m", "amfm.launch", *arguments], ours=True)


def run_command(folder: Path, command: Sequence[str], *, ours: bool = False) -> str:
    """Run a command in the folder, offline for data sets; raises RuntimeError with the end of its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if ours:  # `-m amfm.launch` is found from any folder, installed or not
        environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    else:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:6])} ended with {done.returncode}: {done.stderr[-600:]}")
    return done.stdout
