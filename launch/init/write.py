"""Turn the answers of `amfm init` into a commented configuration: compose, lay out by the plan, check, then write.

How it works: sections are plain dictionaries; the file exists as a draft in a scratch folder until it has passed the
checks that `amfm train` makes, and only then is it renamed into place. So whatever this command writes can be trained.
A model that fits no layout of the machine is rejected with the next larger machine that holds it.

How long a step takes on this machine's CPU: passes of the model itself are timed, in seconds of the processor.

Seconds of the processor and not of the clock: what else runs on the machine takes its cores, not the run's later ones. A
product of matrices would take a tenth of the time and say less: small blocks reach an eighth to a half of its rate.
"""

from __future__ import annotations

import math
import re
import shlex
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.prepare.hub import is_hub, parse_hub
from amfm.data_pipeline.store.object_store import is_url
from amfm.launch.init.laws import LAWS, Recipe, recipe_of
from amfm.launch.init.machine import Choice, Machine, find_layout, larger_machines
from amfm.launch.init.shapes import SIZES, STYLES, Size, bias_update_rate, model_section, size_of, with_experts
from amfm.launch.init.text import DEFAULT, Text, describe_text
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters, flops_per_token
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.parallel import count_cores

TIMED_PARAMETERS = 50e6  # a larger model would take a minute, and a machine's memory
TIMED_TOKENS = 1_024  # of a pass: more rows than that cost more and say the same
PASSES = 3  # after one that is not counted, which starts threads and fills caches


def cpu_seconds_per_token(model: ModelConfig, tokens: int, smaller: ModelConfig) -> float:
    """Seconds of one core for a forward and a backward pass of one token, in rows of `tokens`.

    A model above TIMED_PARAMETERS is judged by a `smaller` one of its kind, at the same rate of operations.
    """
    timed = model if count_parameters(model).total <= TIMED_PARAMETERS else smaller
    of_all, of_timed = (sum(flops_per_token(config, tokens).values()) for config in (model, timed))
    return time_passes(timed, tokens) * of_all / of_timed


def time_passes(config: ModelConfig, tokens: int) -> float:
    """The fastest of some passes, on one thread, in seconds of the processor per token."""
    import torch

    from amfm.model.hybrid import HybridModel
    from amfm.model.packing import PackMeta
    from amfm.model.parallel.groups import single_rank_groups

    rows, threads = max(1, TIMED_TOKENS // tokens), torch.get_num_threads()
    model = HybridModel(config, single_rank_groups(), seed=0)
    tokens_BT = torch.arange(rows * tokens).remainder(config.vocab_size).view(rows, tokens)
    meta = PackMeta.one_document_a_row(rows, tokens)

    def run() -> float:
        began = time.process_time()
        loss: Any = model(tokens_BT, meta, labels=tokens_BT).loss
        loss.total.backward()
        return time.process_time() - began

    torch.set_num_threads(1)
    try:
        return min(run() for _ in range(1 + PASSES)) / tokens_BT.numel()
    finally:
        torch.set_num_threads(threads)


FILE_NAME = "run.yaml"
# Pieces that a tokenizer trained on so little text should have; SentencePiece rejects more than it can find.
SMALL_VOCABULARIES = ((2e6, 1_024), (10e6, 2_048), (50e6, 8_192))


@dataclass(frozen=True)
class Answers:
    """Inputs of a first configuration. `data`: a file, folder, glob or URL with text, or hub:OWNER/NAME.

    `depth`: layers of the one dial (laws.py), instead of a size of the table.
    """

    folder: Path
    size: str
    style: str
    data: str
    machine: Machine
    depth: int | None = None

    @property
    def option(self) -> str:
        """The option that said how large the model is."""
        return f"--size {self.size}" if self.depth is None else f"--depth {self.depth}"


@dataclass(frozen=True)
class Written:
    """Path of the written file, and the layout that the plan chose for it."""

    path: Path
    choice: Choice
    warnings: tuple[str, ...] = ()


def write_config(answers: Answers) -> Written:
    """Write `FOLDER/run.yaml`.

    Raises ValueError for text that is not there, a model that does not fit, or a file that exists already.
    """
    path = answers.folder / FILE_NAME
    if path.exists():
        raise ValueError(f"{path} is there already; name another folder, or move it away")
    text = describe_text(answers.data)
    tree = compose(answers, text)
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / FILE_NAME
        choice = lay_out(tree, answers.machine, draft)
        if choice is None:
            raise ValueError(
                f"{answers.option} does not fit --hardware {answers.machine.name} "
                f"({answers.machine.hardware.memory_gib:.1f} GiB per rank); choose a smaller {answers.option.split()[0]}"
                + name_enough(answers, text, draft)
            )
        tree["train"] |= {"micro_batch_size": choice.config.train.micro_batch_size}
        tree["train"] |= {"recompute": "full"} if choice.config.train.recompute == "full" else {}
        tree["parallel"] = changed_settings(choice)
        written = explain(answers, choice, tree, find_recipe(answers, text))
        # The text that is written, warnings included, is what is checked, not the dictionary it came from.
        draft.write_text(written, encoding="utf-8")
        load_checked(draft, world_size=answers.machine.ranks)
    answers.folder.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, written.encode())
    recipe = find_recipe(answers, text)
    return Written(path, choice, recipe.warnings if recipe else ())


def source_section(data: str, column: str, train: dict[str, Any]) -> dict[str, Any]:
    """The source of the text; of a data set of the Hub as many tokens as the run trains on, and some for validation."""
    if not is_hub(data):
        return {"name": "text", "paths": [data]} | ({} if column == DEFAULT else {"text_column": column})
    trained = train["steps"] * train["global_batch_size"] * train["sequence_length"]
    name = parse_hub(data).repository.partition("/")[2]
    return {"name": name, "paths": [data], "max_tokens": math.ceil(trained * 1.02 / 1e6) * 1_000_000}


def lay_out(tree: dict[str, Any], machine: Machine, draft: Path) -> Choice | None:
    """Check the sections in a file at `draft` and find a layout for them; None if nothing fits."""
    draft.write_text(to_yaml(tree, {}), encoding="utf-8")
    return find_layout(load_checked(draft), machine)


def name_enough(answers: Answers, text: Text, draft: Path) -> str:
    """Fix that names the first larger machine on which the model fits; empty if none is found."""
    for machine in larger_machines(answers.machine):
        if lay_out(compose(replace(answers, machine=machine), text), machine, draft) is not None:
            return f", or --hardware {machine.name}"
    return ""


def compose(answers: Answers, text: Text) -> dict[str, Any]:
    """All sections but `parallel`, as plain values; small texts get a small vocabulary."""
    recipe, folder = find_recipe(answers, text), answers.folder
    size = size_of(answers.size, answers.style) if recipe is None else recipe.size
    model = model_section(answers.size, answers.style, size)
    is_short = answers.machine.is_cpu and recipe is None  # the dial's run is the laws' on every machine
    train = short_training() if is_short else training(size)
    if answers.machine.is_cpu:
        train["precision"] = "float32"
    if "bias_update_rate" in model.get("moe", {}):
        model["moe"]["bias_update_rate"] = bias_update_rate(train["steps"])
    model["vocab_size"] = min([model["vocab_size"], *small_vocabularies(answers, text)])
    held = text.held_fraction(train["sequence_length"])
    if not held:
        del train["validate_every_steps"]
    return {
        "run": {"dir": str(folder / "runs" / f"{answers.style}_{answers.size}")},
        "model": model,
        "data": {
            # Named for the project: tasks of a store are named after its folder.
            "store": str(folder / "store" / project_name(answers)),
            "sources": [source_section(answers.data, text.column, train)],
            "tokenizer": {"vocab_size": model["vocab_size"], "training_bytes": 200_000_000},
            "validation_fraction": held,
        },
        "train": train,
        "optimizer": optimizer(size, is_short),
        "schedule": {"kind": "wsd", "warmup_steps": 20 if is_short else size.warmup_steps, "min_ratio": 0.1},
        "export": {"target": "auto"},
    }


def find_recipe(answers: Answers, text: Text) -> Recipe | None:
    """Shapes and run of `depth` by the laws; None for a size of the table."""
    if answers.depth is None:
        return None
    return recipe_of(answers.depth, answers.style, min(small_vocabularies(answers, text), default=None))


def small_vocabularies(answers: Answers, text: Text) -> list[int]:
    """Vocabularies that are as large as a small text allows; none for a large one."""
    return [] if is_url(answers.data) else [pieces for limit, pieces in SMALL_VOCABULARIES if text.num_bytes < limit]


def project_name(answers: Answers) -> str:
    """Name of the folder, as a name of files; of style and size where it has none."""
    letters = re.sub(r"[^A-Za-z0-9_.-]+", "_", answers.folder.resolve().name).strip("_.")
    return letters or f"{answers.style}_{answers.size}"


def training(size: Size) -> dict[str, Any]:
    """The `train` section that suits a size on accelerators."""
    return {
        "steps": size.steps,
        "sequence_length": size.sequence_length,
        "micro_batch_size": 1,
        "global_batch_size": size.global_batch_size,
        "precision": "bf16",
        "checkpoint_every_steps": 500,
        "validate_every_steps": 500,
    }


def short_training() -> dict[str, Any]:
    """The `train` section of some minutes (3m) to an hour (20m) on a CPU, to see text come out."""
    return {
        "steps": 400,
        "sequence_length": 256,
        "micro_batch_size": 1,
        "global_batch_size": 16,
        "precision": "float32",
        "checkpoint_every_steps": 50,
        "validate_every_steps": 50,
    }


def optimizer(size: Size, is_short: bool) -> dict[str, Any]:
    """The `optimizer` section: AdamW at the rate of the size, and in the short run Muon at twice that rate.

    Muon's lead is measured in short runs of small models (docs/benchmarks/speedrun.md), and not beyond.
    """
    learns = (
        {"kind": "muon", "learning_rate": 2 * size.learning_rate} if is_short else {"learning_rate": size.learning_rate}
    )
    return learns | {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


def changed_settings(choice: Choice) -> dict[str, Any]:
    """The `parallel` section without settings at their defaults, ZeRO stage always named."""
    settings = choice.estimate.layout.settings()
    # True equals 1, so sequence parallelism is told from an axis of one rank by its type.
    return {
        name: value
        for name, value in settings.items()
        if name == "zero_stage" or value is True or value not in (1, False, "1f1b")
    }


# Said next to a key of the file: why it has this value, and when to change it.
REMARKS = {
    "run.dir": "checkpoints, metrics and the report; the same directory resumes",
    "model.pattern": "M Mamba2, G Gated DeltaNet, * or A attention, E or F experts, - a dense feed-forward",
    "model.vocab_size": "of the tokenizer below",
    "data.store": "where amfm prepare writes tokens",
    "data.sources": "more of them may follow, each with a weight",
    "data.validation_fraction": "part of the documents that are kept for validation; a single document leaves nothing to keep",
    "data.tokenizer": "trained on the text; or name yours: {model: tokenizer.json}",
    "train.steps": "optimizer steps",
    "train.global_batch_size": "sequences per step, over all ranks",
    "train.micro_batch_size": "sequences per pass: the largest that fits, by the plan",
    "train.checkpoint_every_steps": "what a crash may cost",
    "train.recompute": "without it nothing fits",
    "optimizer.kind": "for matrices, AdamW for the rest: the lowest loss per second in short runs of small models",
    "optimizer.learning_rate": "lower it if the loss jumps",
    "parallel.zero_stage": "the layout is the plan's fastest that fits",
    "export.target": "what amfm export writes: the class of transformers that holds this model exactly, else our own",
}


def explain(answers: Answers, choice: Choice, tree: dict[str, Any], recipe: Recipe | None) -> str:
    """Text of the file: a head that says what it is and what to run next, then sections with warnings."""
    memory, hardware = choice.estimate.memory.total() / 2**30, answers.machine.hardware
    counts = count_parameters(choice.config.model)
    head = [
        f"A model of {counts.total / 1e6:,.1f}M parameters ({counts.active / 1e6:,.1f}M active per token), "
        f"{answers.option.removeprefix('--')} in the style of {answers.style}: {STYLES[answers.style]}.",
        *describe_laws(recipe),
        f"Planned for {answers.machine.name}: {memory:.1f} of {hardware.memory_gib:.1f} GiB on the most loaded rank.",
        *describe_time(answers, choice),
        "Paths are relative to where amfm is called. Next:",
        *(f"  {command}" for command in next_commands(answers)),
        "Every setting: docs/configuration.md, or amfm config --fields.",
    ]
    return "\n".join(f"# {line}" for line in head) + "\n\n" + to_yaml(tree, REMARKS)


def describe_laws(recipe: Recipe | None) -> list[str]:
    """What the run follows from, with sources, and what is outside of their ranges."""
    if recipe is None:
        return []
    given = f"N = {recipe.active:.3g} active parameters, {recipe.body:.3g} without embedding and head, D = {recipe.tokens:.3g} tokens."
    laws = [f"  {law.name}: {law.text} ({law.source})" for law in LAWS]
    return [
        "Tokens, batch and rate follow from the depth:",
        *laws,
        given,
        *(f"Warning: {text}." for text in recipe.warnings),
    ]


def describe_time(answers: Answers, choice: Choice) -> list[str]:
    """How long the run takes on this machine's CPU, where it is trained on that, by passes of the model timed now."""
    if not answers.machine.is_cpu:
        return []
    train = choice.config.train
    assert train.steps is not None and train.global_batch_size is not None, "compose sets them"
    smaller = ModelConfig.model_validate(model_section("3m", answers.style, with_experts(SIZES["3m"])))
    tokens = train.steps * train.global_batch_size * train.sequence_length
    hours = tokens * cpu_seconds_per_token(choice.config.model, train.sequence_length, smaller) / 3600
    cores = train.num_threads or count_cores()
    return [
        f"{train.steps} steps take about {format_hours(hours / cores)} on {cores} cores that do nothing else "
        f"({format_hours(hours)} of one), by passes of the model timed here;",
        "train.stop_after_steps=20 shows the pace first.",
    ]


def format_hours(hours: float) -> str:
    """A duration in the unit that suits it."""
    return (
        f"{hours * 60:.0f} minutes" if hours < 1.5 else f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
    )


def next_commands(answers: Answers) -> list[str]:
    """Commands to run after the file was written, in order."""
    ranks = answers.machine.ranks
    path = shlex.quote(str(answers.folder / FILE_NAME))
    run_dir = shlex.quote(str(answers.folder / "runs" / f"{answers.style}_{answers.size}"))
    per_node = answers.machine.hardware.gpus_per_node
    if ranks <= per_node:
        train = f"amfm train {path}" + (f" --nproc {ranks}" if ranks > 1 else "")
    else:
        train = f"amfm launch {path} --on slurm --nodes {ranks // per_node} --nproc-per-node {per_node} --dry-run"
    return [
        f"amfm prepare {path}",
        train,
        f"amfm generate {run_dir} --prompt 'Once upon a time'",
        f"amfm report {run_dir}",
    ]


def to_yaml(tree: dict[str, Any], remarks: dict[str, str]) -> str:
    """Sections as blocks with one key a line, deeper mappings in braces, warnings behind their keys."""
    lines = []
    for section, keys in tree.items():
        lines.append(f"{section}:")
        for key, value in keys.items():
            text = f"  {key}: {flow(value)}"
            remark = remarks.get(f"{section}.{key}")
            lines.append(f"{text:<40}  # {remark}" if remark else text)
        lines.append("")
    return "\n".join(lines)


def flow(value: object) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
