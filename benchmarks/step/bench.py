"""Training-step benchmark: our model under our engine, in a bare loop, and the same model in transformers.

How it works: all variants start from the same weights, see the same batch and use fused AdamW; their first losses must
agree before anything is timed. They take turns, so that a machine that drifts slows all of them; a variant's figure is
its median. On a CPU each is timed with freed memory returned and kept, a process each, in turns: transformers' trainer
returns it, `amfm train` keeps it. The bare loop tells the engine's share of the difference from the model's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from amfm.launch.bench.kernels import describe_hardware
from amfm.launch.cluster.child import Child
from amfm.model.config.schema import ModelConfig
from benchmarks import ROOT
from benchmarks.calibration.fit import ROWS, TOKENS, granite_shape
from benchmarks.freed_memory import CARD, KEPT, RETURNED, choose_treatments

# Losses of the first step, same weights and batch, float32 against float32: sums over 2,048 tokens in another order.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """Work of a step: sequences of a micro-batch, tokens per sequence, the model, and micro-batches, of which only ours takes
    several.
    """

    rows: int
    tokens: int
    model: ModelConfig
    micro_batches: int = 1


def bench_step(
    names: list[str],
    *,
    rounds: int,
    num_threads: int | None,
    report: Callable[[str], None],
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Measure and return one object: variants with seconds, tokens per second and ratio to transformers' default.

    `as_trained` of a variant is transformers with freed memory returned and ours with it kept, `memory` has both ways of
    each. On a GPU, or where memory can be treated in only one way, there is that way only.

    Raises RuntimeError when float32 variants disagree in their first loss: they would not be the same model.
    """
    shape = shape or Shape(ROWS, TOKENS, granite_shape())
    treatments, remarks = ((CARD,), []) if torch.cuda.is_available() else choose_treatments()
    settings = {
        "names": names,
        "rows": shape.rows,
        "tokens": shape.tokens,
        "micro_batches": shape.micro_batches,
        "model": shape.model.model_dump(mode="json"),
    }
    seconds: dict[str, dict[str, list[float]]] = {each: {name: [] for name in names} for each in treatments}
    first_losses: dict[str, float] = {}
    with ExitStack() as stack:
        children = {}
        for each in treatments:
            asked = settings | {"threads": num_threads, "keep_freed_memory": each == KEPT}
            children[each] = stack.enter_context(Child("benchmarks.step.child", json.dumps(asked), root=ROOT))
            threads = children[each].receive()["threads"]
        for name in names:
            report(f"warming up {name}")
            for child in children.values():
                first_losses[name] = child.ask()["first_loss"]
        # Before any timing: variants that compute another loss are not the same work.
        _check_losses(first_losses)
        for number in range(rounds):
            report(f"round {number + 1} of {rounds}")
            for each, child in children.items():
                for name, taken in child.ask().items():
                    seconds[each][name].append(taken)
    figures = {each: _summarize(seconds[each], shape) for each in treatments}
    return {
        "shape": {
            "rows": shape.rows,
            "tokens": shape.tokens,
            "micro_batches": shape.micro_batches,
            "model": shape.model.model_dump(),
        },
        "rounds": rounds,
        "hardware": describe_hardware() | {"threads": threads},
        "remarks": remarks,
        "variants": {
            name: {
                "first_loss": first_losses[name],
                "as_trained": _as_trained(name, figures),
                "memory": {each: figures[each][name] for each in treatments},
            }
            for name in names
        },
    }


def bench_optimizers(
    *,
    rounds: int,
    num_threads: int | None,
    micro_batches: int,
    report: Callable[[str], None],
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Measure our step with AdamW and with Muon, of this many micro-batches, as `bench_step` does.

    Newton-Schulz costs the same whatever the batch, so a ratio belongs to a number of tokens per step.
    """
    shape = replace(shape or Shape(ROWS, TOKENS, granite_shape()), micro_batches=micro_batches)
    result = bench_step(
        ["ours_fp32", "ours_fp32_muon"], rounds=rounds, num_threads=num_threads, report=report, shape=shape
    )
    ratios = {
        treatment: result["variants"]["ours_fp32_muon"]["memory"][treatment]["seconds"] / figures["seconds"]
        for treatment, figures in result["variants"]["ours_fp32"]["memory"].items()
    }
    return result | {"muon_to_adamw": ratios}


def _summarize(seconds: dict[str, list[float]], shape: Shape) -> dict[str, dict[str, Any]]:
    """Figures of the variants under one treatment of memory."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians.get("transformers_default")
    return {
        name: {
            "seconds": median,
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "tokens_per_second": shape.micro_batches * shape.rows * shape.tokens / median,
            "ratio_to_transformers_default": base / median if base else None,
        }
        for name, median in medians.items()
    }


def _as_trained(name: str, figures: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any] | None:
    """Figures of a variant with memory as its own trainer treats it; None with a single treatment.

    The ratio is to transformers' default with memory returned.
    """
    if set(figures) != {RETURNED, KEPT}:
        return None
    own = figures[RETURNED if name.startswith("transformers") else KEPT][name]
    base = figures[RETURNED].get("transformers_default")
    return {
        "seconds": own["seconds"],
        "tokens_per_second": own["tokens_per_second"],
        "ratio_to_transformers_default": base["seconds"] / own["seconds"] if base else None,
    }


def _check_losses(first_losses: dict[str, float]) -> None:
    """Raise RuntimeError if float32 variants disagree."""
    exact = {name: loss for name, loss in first_losses.items() if "bf16" not in name and name != "transformers_tuned"}
    if exact and max(exact.values()) - min(exact.values()) > LOSS_TOLERANCE:
        raise RuntimeError(
            f"the float32 variants differ in their first loss by more than {LOSS_TOLERANCE}: {exact}; "
            "they are not the same model, so their speeds cannot be compared"
        )
