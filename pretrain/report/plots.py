"""The plots of a report, as data: curves over steps, or a map of blocks by steps, with what a reader must know.

Each function returns None when the run has no such measurement, and no empty figure is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from amfm.pretrain.report.curves import (
    MIN_SMOOTHED,
    MIN_USUAL,
    Curve,
    HeatMap,
    Plot,
    cap_outliers,
    curve_style,
    make_marks,
    make_stages,
    most_columns,
    noisy_curve,
    usual_range,
)
from amfm.pretrain.report.data import RunRecord
from amfm.pretrain.report.numbers import mean_of_spans


def make_plots(record: RunRecord) -> list[Plot]:
    """Make every plot for which the run has measurements, in the order of the page, with the run's events on each.

    What no plot draws, of amfm or of a package's hook, comes last, folded.
    """
    # With the keys of metrics.jsonl that each draws.
    makers: dict[Callable[[RunRecord], Plot | None], tuple[str, ...]] = {
        loss_plot: ("loss", "validation_loss"),
        validation_sets_plot: ("validation_sets", "validation_sets_at_start"),
        sources_plot: ("validation_by_source",),
        accuracy_plot: ("validation_accuracy", "validation_row_accuracy"),
        learning_rate_plot: ("lr",),
        gradient_norm_plot: ("grad_norm",),
        throughput_plot: ("tokens_per_second",),
        mfu_plot: ("mfu",),
        memory_plot: ("memory_bytes",),
        mixture_plot: ("data",),
        expert_load_plot: ("expert_load",),
        auxiliary_plot: ("auxiliary",),
        quantization_plot: ("low_precision",),
    }
    drawn = {*NOT_DRAWN, *(key for keys in makers.values() for key in keys)}
    marks, stages = make_marks(record), make_stages(record)
    found = [*(make(record) for make in makers), *inspection_plots(record), *other_plots(record, drawn)]
    return [replace(plot, marks=marks, stages=stages) for plot in found if plot is not None]


# Of the keys of metrics.jsonl: axes, and what inspection_plots and page_data.py draw.
NOT_DRAWN = ("step", "time", "tokens", "inspect", "tasks")


def loss_plot(record: RunRecord) -> Plot | None:
    """Plot training loss, faint for each step and strong smoothed, and validation loss, in nats per token."""
    steps, losses = record.series("loss")
    if not losses:
        return None
    curves = [noisy_curve(steps, losses, "training", series=0)]
    validated, validation = record.series("validation_loss")
    if validation:
        curves.append(Curve("validation", validated, validation, series=1, dash=1, dots=True))
    caption = "Negative log-likelihood of a token; perplexity is its exponential."
    return Plot("loss", "Loss", caption, "nats per token", tuple(curves), usual=usual_range(curves))


def validation_sets_plot(record: RunRecord) -> Plot | None:
    """Plot the loss of each validation set, from before the first step."""
    series = record.named_series("validation_sets")
    for name, (_, values) in record.named_series("validation_sets_at_start").items():
        steps, losses = series.get(name, ([], []))
        series[name] = ([0, *steps], [*values[:1], *losses])
    if not series:
        return None
    curves = tuple(
        Curve(name, *pair, *curve_style(number), dots=True) for number, (name, pair) in enumerate(series.items())
    )
    return Plot("sets", "Validation sets", "Loss of each set of `validation`.", "nats per token", curves)


def sources_plot(record: RunRecord) -> Plot | None:
    """Plot the validation loss of each source."""
    series = record.named_series("validation_by_source")
    if len(series) < 2:
        return None
    curves = [Curve(name, *pair, *curve_style(number), dots=True) for number, (name, pair) in enumerate(series.items())]
    caption = "Validation loss of the text of each source."
    return Plot("sources", "Loss by source", caption, "nats per token", tuple(curves), usual=usual_range(curves))


def mixture_plot(record: RunRecord) -> Plot | None:
    """Plot how often each source was read so far: a loss that falls below its validation is one that was read often."""
    series = record.named_series("data.epochs")
    if not any(values[-1] for _, values in series.values()):
        return None
    curves = tuple(Curve(name, *pair, *curve_style(number)) for number, (name, pair) in enumerate(series.items()))
    return Plot(
        "epochs", "Epochs by source", "How often each source was read since the start.", "epochs", curves, lowest=0
    )


def memory_plot(record: RunRecord) -> Plot | None:
    """Plot the peak memory of the main rank."""
    steps, held = record.series("memory_bytes")
    if not held:
        return None
    curves = (Curve("", steps, [size / 2**30 for size in held], series=4),)
    return Plot("memory", "Memory", "Peak of the main rank so far.", "GiB", curves, lowest=0)


def accuracy_plot(record: RunRecord) -> Plot | None:
    """Plot the accuracy on a synthetic task, of tokens and of whole rows."""
    steps, tokens = record.series("validation_accuracy")
    if not tokens:
        return None
    row_steps, rows = record.series("validation_row_accuracy")
    curves = (Curve("tokens", steps, tokens, dots=True), Curve("rows", row_steps, rows, series=1, dash=1, dots=True))
    caption = "Validation: share of labeled tokens that are right, and of sequences without a wrong one."
    return Plot("accuracy", "Accuracy", caption, "share right", curves, lowest=0, highest=1.02)


def learning_rate_plot(record: RunRecord) -> Plot | None:
    """Plot the learning rate as it was applied, over all stages."""
    steps, rates = record.series("lr")
    if not rates:
        return None
    kinds = ", ".join(f"{stage.name} {stage.config.schedule.kind}" for stage in record.stages)
    caption = f"By stage: {kinds}." if record.config.stages else f"Schedule {record.config.schedule.kind}."
    return Plot("rate", "Learning rate", caption, "", (Curve("", steps, rates, series=2),), lowest=0)


def gradient_norm_plot(record: RunRecord) -> Plot | None:
    """Plot the global gradient norm before clipping, on a logarithmic axis if no norm is zero; the clip limit dashed."""
    steps, norms = record.series("grad_norm")
    if not norms:
        return None
    limit = record.config.optimizer.clip_grad_norm
    caption = "Before clipping." if limit is None else f"Before clipping; clipped above {limit:g} (dashed)."
    curves = (noisy_curve(steps, norms, series=3),)
    return Plot("gradient", "Gradient norm", caption, "", curves, is_log=min(norms) > 0, limit=limit)


def throughput_plot(record: RunRecord) -> Plot | None:
    """Plot tokens per second of all ranks."""
    steps, speeds = record.series("tokens_per_second")
    if not speeds:
        return None
    curves = (noisy_curve(steps, speeds, series=4),)
    highest, remark = cap_outliers(speeds)
    caption = f"All ranks together.{remark}"
    return Plot("throughput", "Throughput", caption, "tokens per second", curves, lowest=0, highest=highest)


def mfu_plot(record: RunRecord) -> Plot | None:
    """Plot model FLOPs utilisation in per cent of the peak, which a CPU measures again at each start; not above the peak."""
    steps, shares = record.series("mfu")
    if not shares or (record.typical("mfu") or 0.0) > 1:
        return None
    starts = [event for event in record.events if event.get("event") == "start"]
    is_measured = str(record.environment.get("peak", {}).get("source", "")).startswith("measured")
    caption = "Model FLOPs utilisation: the model's arithmetic over the device's peak."
    if is_measured and len(starts) > 1:
        caption += f" The peak was measured at each of {len(starts)} starts, so levels may jump there."
    highest, remark = cap_outliers([100 * share for share in shares])
    curves = (noisy_curve(steps, [100 * share for share in shares], series=5),)
    return Plot("mfu", "MFU", caption + remark, "%", curves, lowest=0, highest=highest)


def expert_load_plot(record: RunRecord) -> Plot | None:
    """Map the tokens of the most loaded expert over the mean: a row for each MoE block, a column for each span of steps.

    1 is even load. The largest value possible is experts / choices per token: every token takes the same ones.
    """
    loads = record.named_series("expert_load")
    if not loads:
        return None
    blocks = sorted(loads, key=lambda name: (len(name), name))
    first = min(steps[0] for steps, _ in loads.values())
    last = max(steps[-1] for steps, _ in loads.values())
    # Half a step on either side, so that a single step still has a width.
    edges = np.linspace(first - 0.5, last + 0.5, min(most_columns(len(blocks)), last - first + 1) + 1).tolist()
    rows = tuple(tuple(mean_of_spans(*loads[block], edges)) for block in blocks)
    highest_loads = [moe.num_experts / moe.top_k for _, moe in record.config.model.expert_sections()]
    most = f"; {max(highest_loads):g}, the most possible, is collapse" if highest_loads else ""
    caption = f"By MoE block: 1 is even{most}."
    # A fixed scale, so that a colour means the same in every run; by ratios, or all that is usual would be the darkest.
    highest = max(
        1.2, max(highest_loads, default=0.0) or max(value for row in rows for value in row if value is not None)
    )
    heat = HeatMap(tuple(f"block {block}" for block in blocks), tuple(edges), rows, 1.0, highest, is_log=True)
    return Plot("experts", "Expert load", caption, "most loaded / mean", heat=heat)


def auxiliary_plot(record: RunRecord) -> Plot | None:
    """Plot the auxiliary losses, weighted as they enter the loss; those that are zero throughout are left out."""
    found = {name: pair for name, pair in record.named_series("auxiliary").items() if any(pair[1])}
    if not found:
        return None
    curves = tuple(
        Curve(
            name.replace("_", " "),
            *pair,
            *curve_style(number),
            noisy=len(pair[0]) > MIN_SMOOTHED,
            has_envelope=len(found) == 1,
        )
        for number, (name, pair) in enumerate(found.items())
    )
    alone = f" Only {curves[0].name} is not zero." if len(curves) == 1 else ""
    return Plot("auxiliary", "Auxiliary losses", f"Weighted, as they are added to the loss.{alone}", "", curves)


def quantization_plot(record: RunRecord) -> Plot | None:
    """Map the numbers that quantising makes zero, in per cent: a row for each kind of operand, a column a measurement."""
    zeroed = record.named_series("low_precision.zeroed")
    if not zeroed:
        return None
    names = sorted(zeroed)
    steps = sorted({step for own, _ in zeroed.values() for step in own})
    edges = np.linspace(steps[0] - 0.5, steps[-1] + 0.5, min(most_columns(len(names)), len(steps)) + 1).tolist()
    rows = tuple(
        tuple(mean_of_spans(zeroed[name][0], [100 * part for part in zeroed[name][1]], edges)) for name in names
    )
    recipe = record.config.low_precision.recipe
    caption = f"Numbers of operands that {recipe} makes zero: larger ones of their block leave no code for them."
    highest = max(value for row in rows for value in row if value is not None) or 1.0
    heat = HeatMap(tuple(names), tuple(edges), rows, 0.0, highest)
    return Plot("quantization", "Zeroed by quantizing", caption, "%", heat=heat)


# Measures of `inspect` that are maps: key, title, unit, caption, and whether colours follow ratios.
INSPECTED = (
    ("weight", "Weights by block", "norm", "L2 norm of the weights of each block.", True),
    ("gradient", "Gradients by block", "norm", "L2 norm of the gradients of each block, before clipping.", True),
    ("update", "Updates by block", "norm", "L2 norm of the update of each block.", True),
    ("activation", "Activations by block", "root mean square", "What each block adds to the residual stream.", True),
    ("max_logit", "Largest attention logit", "nats", "Largest log-sum-exp of scores, by block with attention.", False),
    ("router_entropy", "Router entropy", "nats", "Mean entropy of a token's scores; 0 is one expert.", False),
    ("bias_range", "Range of balancing biases", "", "Highest minus lowest bias of each MoE block.", False),
    ("bias_mean", "Mean of balancing biases", "", "It is taken out after each step, and should be 0.", False),
)
# Below this a mean is rounding, and is not drawn.
LEAST_MEAN = 1e-6


def inspection_plots(record: RunRecord) -> Iterator[Plot]:
    """Map what `train.inspect_every_steps` logged: a row for each block that has the measure, a column for each step."""
    lines = [(int(line["step"]), inspected_blocks(line)) for line in record.metrics if line.get("inspect")]
    letters = record.config.model.built_letters
    for key, title, unit, caption, is_log in INSPECTED:
        series: dict[int, tuple[list[int], list[float]]] = {}
        for step, blocks in lines:
            for block, value in enumerate(blocks.get(key) or []):
                if value is not None and (value > 0 or not is_log):
                    steps, values = series.setdefault(block, ([], []))
                    steps.append(step)
                    values.append(value)
        if not series or (key == "bias_mean" and all(abs(v) < LEAST_MEAN for _, own in series.values() for v in own)):
            continue
        steps = sorted({step for own, _ in series.values() for step in own})
        half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
        edges = np.linspace(steps[0] - half, steps[-1] + half, min(most_columns(len(series)), len(steps)) + 1).tolist()
        rows = tuple(tuple(mean_of_spans(*series[block], edges)) for block in sorted(series))
        found = [value for row in rows for value in row if value is not None]
        lowest, highest = min(found), max(found)
        highest = highest if highest > lowest else lowest + (abs(lowest) or 1.0)
        names = tuple(f"{block} {letters[block]}" for block in sorted(series))
        yield Plot(
            f"inspect-{key}", title, caption, unit, heat=HeatMap(names, tuple(edges), rows, lowest, highest, is_log)
        )


def other_plots(record: RunRecord, drawn: Collection[str]) -> Iterator[Plot]:
    """Plot each number, and each section of numbers by name, that no other plot draws, folded."""
    for key in dict.fromkeys(key for line in record.metrics for key in line if key not in drawn):
        alone = record.series(key)
        series = record.named_series(key) | ({"": alone} if alone[0] else {})
        curves = tuple(
            Curve(name, *pair, *curve_style(number), noisy=len(pair[0]) >= MIN_USUAL, has_envelope=len(series) == 1)
            for number, (name, pair) in enumerate(series.items())
        )
        if curves:
            title = key.replace("_", " ").capitalize()
            yield Plot(
                re.sub(r"\W", "-", f"other-{key}"), title, f"{key} in metrics.jsonl.", "", curves, is_folded=True
            )


def inspected_blocks(line: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """What a line has of each block, and the range of its biases."""
    blocks: dict[str, list[float | None]] = dict(line["inspect"].get("blocks") or {})
    ends = zip(blocks.get("bias_low", ()), blocks.get("bias_high", ()))
    blocks["bias_range"] = [None if low is None or high is None else high - low for low, high in ends]
    return blocks
