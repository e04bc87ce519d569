"""What a conversion gave: every model of it measured on the same held-out tokens, and what its linear branch is worth.

A converted model that is as good without its linear branch has learned to do without what is before the window (arXiv
2510.05901 found it in published conversions). Perplexity on its own does not show that, so the controls are always measured:
only window attention after the same tuning, the tuned model without either branch, the teacher after the same tuning.

What a conversion leaves in run.dir/result besides weights is written here too: conversion.json and a picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from amfm.data_pipeline.durable.files import replacing, write_file_atomically
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.terminal import Report, silent
from amfm.model.hybrid import HybridModel
from amfm.pretrain.config.convert import StageName
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.evaluate import measure_store
from amfm.pretrain.inference.over_ranks import RowPasses
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.draw import style
from amfm.pretrain.report.numbers import LIGHT
from amfm_convert.stages import WINDOW_LINEAR, ConversionStage, conversion_of, converted_blocks, folder_of
from amfm_convert.weights import StartReport, stage_weights, write_folder
from amfm_convert.window_linear import WindowLinearMixer

# A difference below this is not a difference, in nats per token.
UNUSED_NATS = 0.005


@dataclass(frozen=True)
class RoutedSource:
    """What the tuned model does with one source of text: its loss, and each update's share of the choices by block."""

    loss: float
    shares: dict[int, list[float]]


@dataclass(frozen=True)
class ConversionReport:
    """Losses in nats per token by model, in the order of a table; shares of the linear branch by block; a verdict in
    words.

    `result`: the folder with the merged weights. `tokens`: that each model was measured on. `routed`: by source of the text;
    empty without updates that a router chooses among.
    """

    result: Path
    pattern: str
    blocks: tuple[int, ...]
    losses: dict[str, float]
    linear_share: dict[int, float]
    verdict: str
    tokens: int
    start: StartReport
    routed: dict[str, RoutedSource]

    def to_json(self) -> dict[str, Any]:
        """Encode for conversion.json."""
        routed = {
            name: {
                "loss_nats_a_token": source.loss,
                "share_of_updates_by_block": {str(block): shares for block, shares in source.shares.items()},
            }
            for name, source in self.routed.items()
        }
        return {
            "pattern": self.pattern,
            "converted_blocks": list(self.blocks),
            "loss_nats_a_token": self.losses,
            "linear_share_by_block": {str(block): share for block, share in self.linear_share.items()},
            "verdict": self.verdict,
            "measured_tokens": self.tokens,
            **({"routed_updates_by_source": routed} if routed else {}),
            "weights_of_converted_blocks": {
                "taken": list(self.start.taken),
                "new": list(self.start.new),
                "left": list(self.start.left),
            },
        }


TEACHER, TUNED_TEACHER = "teacher", "teacher, tuned alike"
AT_ONCE, TRANSFERRED, TUNED = "converted at once", "transferred", "tuned"
WINDOW_ALONE = "window alone, tuned alike"
WITHOUT_LINEAR, WITHOUT_WINDOW = "tuned, without linear branch", "tuned, without window"


class UpdateCounts:
    """Counts, source by source, which updates a model's routers choose."""

    def __init__(self, model: HybridModel) -> None:
        blocks = ((index, model.blocks[index].updates) for index in model.blocks.indices())
        self.blocks = {index: updates for index, updates in blocks if updates is not None}
        self.taken: dict[str, dict[int, list[float]]] = {}
        self._begin()

    def take(self, source: str) -> None:
        """Note the shares of what was computed since the last call, as of this source."""
        measured = {index: updates.measured for index, updates in self.blocks.items()}
        self.taken[source] = {
            index: (counts / counts.sum()).tolist() for index, counts in measured.items() if counts is not None
        }
        self._begin()

    def _begin(self) -> None:
        for updates in self.blocks.values():
            weight = updates.router.weight
            updates.measured = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)


@dataclass
class Ruler:
    """Measures models on the same tokens of the validation part."""

    config: RunConfig
    store: TokenStore
    tokens: int = 0

    def measure(
        self,
        weights: Weights,
        *,
        used: Literal["both", "window", "linear"] = "both",
        shares: dict[int, float] | None = None,
        routed: dict[str, RoutedSource] | None = None,
    ) -> float:
        """Mean loss per token; `shares` is filled with the linear branch's share of the mass by block, `routed` by source."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, train = weights.build(backend="auto", device=device), self.config.train
        mixers = {
            index: mixer
            for index in model.blocks.indices()
            if isinstance(mixer := model.blocks[index].mixer, WindowLinearMixer)
        }
        for mixer in mixers.values():
            mixer.used = used
            mixer.measured = None if shares is None else torch.zeros(2, dtype=torch.float64, device=device)
        counts = UpdateCounts(model) if routed is not None else None
        sums = measure_store(
            RowPasses.of_model(model, train.micro_batch_size),
            self.store,
            "validation",
            sequence_length=train.sequence_length,
            isolated=self.config.data.mask_document_boundaries,
            max_tokens=train.validation_batches * train.global_batch_size * train.sequence_length,
            measured=None if counts is None else counts.take,
        )
        if routed is not None and counts is not None and counts.blocks:
            for name, (nll, tokens) in sums.items():
                routed[name] = RoutedSource(nll / tokens, counts.taken[name])
        self.tokens = sum(tokens for _, tokens in sums.values())
        for index, mixer in mixers.items():
            if shares is not None and mixer.measured is not None and mixer.measured[1] > 0:
                shares[index] = float(mixer.measured[0] / mixer.measured[1])
        return sum(nll for nll, _ in sums.values()) / self.tokens


def measure_conversion(
    config: RunConfig, stages: Mapping[StageName, ConversionStage], start: StartReport, report: Report = silent
) -> tuple[ConversionReport, Weights]:
    """Measure every model of a conversion whose stages are finished; returns the tuned model's weights too.

    Raises ValueError if the validation part has no tokens.
    """
    convert = conversion_of(config)
    ruler = Ruler(config, TokenStore.open(config.data.text_store()))
    if not sum(ruler.store.num_tokens(name, "validation") for name in ruler.store.source_names):
        raise ValueError(f"the validation part of {ruler.store.path} has no tokens; raise data.validation_fraction")
    losses: dict[str, float] = {}
    shares: dict[int, float] = {}
    report("measuring the teacher")
    losses[TEACHER] = ruler.measure(read_weights(convert.teacher))
    losses[TUNED_TEACHER] = ruler.measure(stage_weights(stages["tune-teacher"]))
    report("measuring the converted model")
    losses[AT_ONCE] = ruler.measure(read_weights(folder_of(config, "start")))
    if "transfer" in stages:
        losses[TRANSFERRED] = ruler.measure(stage_weights(stages["transfer"]))
    tuned = stage_weights(stages["tune"])
    routed: dict[str, RoutedSource] = {}
    losses[TUNED] = ruler.measure(tuned, shares=shares, routed=routed)
    if convert.to == WINDOW_LINEAR:
        report("measuring it without its branches")
        losses[WINDOW_ALONE] = ruler.measure(stage_weights(stages["tune-window"]), used="window")
        losses[WITHOUT_LINEAR] = ruler.measure(tuned, used="window")
        losses[WITHOUT_WINDOW] = ruler.measure(tuned, used="linear")
    ruler.store.close()
    found = ConversionReport(
        folder_of(config, "result"),
        tuned.model.pattern,
        converted_blocks(config),
        losses,
        shares,
        judge(losses),
        ruler.tokens,
        start,
        routed,
    )
    return found, tuned


def judge(losses: Mapping[str, float]) -> str:
    """Report in words how far the result is from the teacher, and whether its linear branch does anything."""
    beside = losses[TUNED] - losses[TUNED_TEACHER]
    text = f"tuned, it is {beside:+.4f} nats per token vs. the teacher after the same tuning"
    if WINDOW_ALONE not in losses:
        return text
    without, alone = losses[WITHOUT_LINEAR] - losses[TUNED], losses[WINDOW_ALONE] - losses[TUNED]
    if without < UNUSED_NATS:
        return f"linear branch unused: leaving it out costs {without:+.4f} nats; {text}"
    if alone < UNUSED_NATS:
        return (
            f"linear branch unused: a model with only window attention, tuned alike, is as good ({alone:+.4f} nats), although this model "
            f"leans on the branch ({without:+.4f} without it); {text}"
        )
    gap = losses[WINDOW_ALONE] - losses[TUNED_TEACHER]
    closed = f", which closes {alone / gap:.0%} of its gap to the teacher" if gap > UNUSED_NATS else ""
    return (
        f"linear branch used: leaving it out costs {without:+.4f} nats, and a model with only window attention, tuned alike, is "
        f"{alone:+.4f} worse{closed}; {text}"
    )


JSON_NAME, PICTURE_NAME = "conversion.json", "conversion.svg"
STAGE_NAMES = {
    "transfer": "transfer",
    "tune": "tune",
    "tune-window": "window alone",
    "tune-teacher": "teacher",
}


def write_result(found: ConversionReport, tuned: Weights, stages: Sequence[ConversionStage]) -> None:
    """Write the merged weights where they are not there yet, and next to them the report and its picture."""
    if not found.result.exists():
        write_folder(found.result, tuned)
    write_file_atomically(found.result / JSON_NAME, (json.dumps(found.to_json(), indent=2) + "\n").encode())
    draw_conversion(found, stages, found.result / PICTURE_NAME)


def draw_conversion(found: ConversionReport, stages: Sequence[ConversionStage], path: Path) -> None:
    """Draw held-out loss through the stages, with those of the controls, and the linear branch's share by block."""
    panels = 2 if found.linear_share else 1
    with matplotlib.rc_context({**style(LIGHT), "svg.hashsalt": found.pattern, "axes.titlelocation": "left"}):
        canvas = Figure(figsize=(4.9 * panels + 0.4, 3.0), layout=ConstrainedLayoutEngine(w_pad=0.12))
        canvas.suptitle(f"Conversion to {found.pattern}", x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        axes = list(canvas.subplots(1, panels, squeeze=False).flat)
        _draw_losses(found, stages, axes[0])
        if panels == 2:
            blocks = [str(block) for block in found.linear_share]
            axes[1].bar(blocks, list(found.linear_share.values()), color=LIGHT.series[4], width=0.6)
            axes[1].set_ylim(0, 1)
            axes[1].set_xlabel("block")
            axes[1].set_title("Share of the mass outside the window", fontsize=9.5)
        with replacing(path) as file:
            canvas.savefig(file, format="svg", metadata={"Date": None})


def _draw_losses(found: ConversionReport, stages: Sequence[ConversionStage], axes: Axes) -> None:
    """Held-out losses over the steps of all stages; those of tuning begin where the transfer ends."""
    begins = {"transfer": found.losses[AT_ONCE], "tune": found.losses.get(TRANSFERRED, found.losses[AT_ONCE])}
    first = 0
    for number, stage in enumerate(stages):
        steps, values = read_run(stage.run_dir).series("validation_loss")
        if stage.name in begins:
            steps, values = [0, *steps], [begins[stage.name], *values]
        offset = 0 if stage.name == "transfer" else first
        axes.plot(
            [offset + step for step in steps],
            values,
            color=LIGHT.series[number % len(LIGHT.series)],
            marker="o",
            markersize=2.5,
            linewidth=1.4,
            label=STAGE_NAMES[stage.name],
        )
        if stage.name == "transfer":
            first = stage.config.train.steps or 0
    axes.axhline(found.losses[TEACHER], color=LIGHT.ink, linewidth=0.9, linestyle="--", label="teacher as given")
    # A model converted at once may be far off: the curves that are compared are to fill the picture.
    lowest = min(found.losses.values())
    axes.set_ylim(lowest - 0.05, max(found.losses[TUNED], begins["tune"], found.losses[TEACHER]) + 0.3)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token, held out")
    axes.legend(fontsize=7.5, frameon=False)
    axes.set_title("Loss by stage", fontsize=9.5)
