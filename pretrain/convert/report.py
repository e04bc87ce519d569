"""What a conversion leaves in run.dir/result besides weights: conversion.json and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from amfm.data_pipeline.durable.files import replacing, write_file_atomically
from amfm.pretrain.convert.measure import AT_ONCE, TEACHER, TRANSFERRED, TUNED, ConversionReport
from amfm.pretrain.convert.stages import ConversionStage
from amfm.pretrain.convert.weights import write_folder
from amfm.pretrain.inference.weights import Weights
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.draw import style
from amfm.pretrain.report.numbers import LIGHT

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
