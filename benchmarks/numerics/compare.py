"""What a recipe of low precision costs a model: the same weights and data by each recipe, next to the run's own
precision.

How: for each seed the configuration is trained a number of steps without a recipe and then by each, as `amfm train` would on
one rank, so first values, order of data and schedule are the same and losses differ only by the products. Losses at one seed are
pairs: their quotient is far less noisy than either, and its spread over seeds says what it is worth. At the weights that the
run without a recipe ends with, gradients of one micro-batch are compared too. Recipes that this machine's device lacks are
emulated.
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from amfm.data_pipeline.durable.json_files import read_lines
from amfm.model.config.low_precision import LowPrecisionConfig, RecipeName
from amfm.model.low_precision import attach_recipes
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.checks.low_precision import device_problems
from amfm.pretrain.config.schema import ParallelConfig, RunConfig
from amfm.pretrain.hooks.state_watch import run_apart
from amfm.pretrain.micro_batch import LossShare, MicroBatches
from amfm.pretrain.monitor.environment import read_processor_name
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.run import Run
from amfm.pretrain.stages import resolve_stages
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import count_valid_tokens
from amfm.pretrain.train import run_steps

RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
WIDE = "none"
COMPARED_SHARE = 0.25  # of the steps, at the end, whose mean loss is compared

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def compare_recipes(
    config: RunConfig,
    recipes: Sequence[RecipeName],
    *,
    steps: int,
    seeds: int,
    folder: Path,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Train by each recipe and without, `steps` steps for each of this many seeds, in `folder`, which must hold no such runs.

    Returns JSON values: of each recipe `losses` (a list a seed), the mean `gap` of its last losses to those without and its
    `spread` over seeds, `gradient_error` by kind of block, and what quantising `zeroed`, `clamped` and missed (`error`) in the last
    step of the first seed. Raises ConfigError for settings that do not suit, RuntimeError for a run that does not end.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sections: dict[str, LowPrecisionConfig] = {name: section_of(config, name, device, steps) for name in recipes}
    runs = {
        (name, seed): configured(
            config, sections.get(name, LowPrecisionConfig()), seed, steps, folder / f"{name}_{seed}"
        )
        for seed in range(seeds)
        for name in (WIDE, *recipes)
    }
    for each in runs.values():
        check_run(each, 1)
    losses: dict[str, list[list[float]]] = {name: [] for name in (WIDE, *recipes)}
    measured: dict[str, dict[str, Any]] = {}
    errors: dict[str, dict[str, float]] = {}
    for (name, seed), each in runs.items():
        compared = sections if name == WIDE and seed == 0 else {}
        lines, found = train_once(each, compared)
        errors |= found
        if seed == 0 and name != WIDE:
            measured[name] = lines[-1]["low_precision"]
        losses[name].append([line["loss"] for line in lines])
        report(f"{name}, seed {each.train.seed}: loss {last_loss(losses[name][-1]):.4f}")
        shutil.rmtree(each.run.dir)
    result: dict[str, Any] = {WIDE: {"losses": losses[WIDE]}}
    for name in recipes:
        gaps = [last_loss(own) / last_loss(wide) - 1 for own, wide in zip(losses[name], losses[WIDE], strict=True)]
        result[name] = {
            "losses": losses[name],
            "gap": statistics.mean(gaps),
            "spread": statistics.stdev(gaps) if len(gaps) > 1 else None,
            "emulated": sections[name].emulate,
            "gradient_error": errors[name],
            **measured[name],
        }
    return {
        "recipes": result,
        "precision": config.train.precision,
        "steps": steps,
        "hardware": describe_machine(device),
    }


def section_of(config: RunConfig, recipe: RecipeName, device: torch.device, steps: int) -> LowPrecisionConfig:
    """The run's own section with another recipe, emulated where the device lacks it, and measured in the last step."""
    section = config.low_precision.model_copy(
        update={"recipe": recipe, "measure_every_steps": steps, "dispatch": "bf16"}
    )
    tried = config.model_copy(update={"low_precision": section})
    lacks = any(device_problems(tried, device)) or config.train.precision == "float32"
    return section.model_copy(update={"emulate": section.emulate or lacks})


def configured(config: RunConfig, section: LowPrecisionConfig, seed: int, steps: int, folder: Path) -> RunConfig:
    """The first training stage of a run on one rank, stopped after `steps` steps, with nothing saved or measured on the way."""
    first = resolve_stages(config)[0].config
    train = first.train.model_copy(
        update={
            "seed": config.train.seed + seed,
            "stop_after_steps": steps,
            "checkpoint_every_steps": None,
            "keep_every_steps": None,
            "checkpoint_store": None,
            "replica_every_steps": None,
            "validate_every_steps": None,
            "log_every_steps": max(1, steps),
            "profile": None,
        }
    )
    run = first.run.model_copy(update={"dir": str(folder), "tensorboard": False, "wandb_project": None})
    parallel = ParallelConfig(zero_stage=min(2, first.parallel.zero_stage))
    evaluate = type(first.evaluate)()
    return first.model_copy(
        update={"run": run, "train": train, "parallel": parallel, "evaluate": evaluate, "low_precision": section}
    )


def train_once(
    config: RunConfig, compared: Mapping[str, LowPrecisionConfig]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Train a run to its end: lines of its metrics, and errors of gradients by each of the sections at its last weights."""
    with SignalWatch() as signals:
        run = start_run(config, signals)
        try:
            code = run_steps(run)
            if code or signals.received:
                raise RuntimeError(f"the run in {config.run.dir} ended with code {code} and is not compared")
            errors = gradient_errors(run, compared)
        finally:
            close_run(run)
    lines = read_lines(Path(config.run.dir) / "metrics.jsonl")
    return [line for _, line in lines if line is not None], errors


def gradient_errors(run: Run, sections: Mapping[str, LowPrecisionConfig]) -> dict[str, dict[str, float]]:
    """Relative errors of gradients of the next micro-batch by each section, of all weights of each kind of block together."""
    if not sections:
        return {}
    rows, model = run.stage.train.micro_batch_size, run.config.model
    batches = run.loader.take(rows, rows)
    share = LossShare.of_counts(count_valid_tokens(batches, run.parallel, model), 1, model)
    micro_batches = MicroBatches(batches, run.parallel, model)
    run.engine.wait_for_weights()
    run.engine.module.train()
    wide, found = run_apart(run, micro_batches, share), {}
    for name, section in sections.items():
        attach_recipes(run.model, section)
        found[name] = errors_by_kind(run_apart(run, micro_batches, share), wide, model.built_letters)
    attach_recipes(run.model, LowPrecisionConfig())
    return found


def errors_by_kind(
    narrow: Mapping[str, Tensor], wide: Mapping[str, Tensor], letters: Sequence[str]
) -> dict[str, float]:
    """Norm of the difference over the norm, of the gradients of each kind of block."""
    sums: dict[str, list[float]] = {}
    for name, gradient in wide.items():
        place = _BLOCK.search(name)
        if place is None:
            continue
        own = sums.setdefault(letters[int(place.group(1))], [0.0, 0.0])
        own[0] += float((narrow[name].double() - gradient.double()).square().sum())
        own[1] += float(gradient.double().square().sum())
    return {letter: math.sqrt(error / norm) for letter, (error, norm) in sums.items() if norm}


def last_loss(losses: Sequence[float]) -> float:
    """Mean of the last losses of a run."""
    return statistics.mean(losses[-max(1, round(COMPARED_SHARE * len(losses))) :])


def find_excess(result: Mapping[str, Any], limit: float) -> list[str]:
    """Recipes whose mean gap is above a limit, in words."""
    return [
        f"{name} is {found['gap']:+.2%} from the losses without a recipe, above --limit {limit:.2%}"
        for name, found in result["recipes"].items()
        if name != WIDE and found["gap"] > limit
    ]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the comparison ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else read_processor_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
