"""`amfm report`: one self-contained HTML page of a run, finished or not.

Everything is read from the run directory (data.py), so a report can be made while the run goes on, on another machine,
or years later. Parameters and FLOPs are computed from the configuration, not read from logs. Here the numbers are chosen
and put into words; plots.py draws, page.py makes the HTML.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from data_pipeline.naming import named
from model.config.mixer_registry import describe_symbol
from model.flops import count_parameters, flops_per_token
from pretrain.report.data import RunRecord, read_run
from pretrain.report.page import Card, Table, render_page
from pretrain.report.plots import make_plots


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the run directory and return its path; call it on one rank.

    Raises FileNotFoundError for something that is no run directory, ValueError before the first step.
    """
    record = read_run(run_dir)
    tables = {"Model": describe_model(record), "Data": describe_data(record)}
    page = render_page(record, make_cards(record), make_plots(record), tables)
    path = record.directory / "report.html"
    # Renamed into place: a browser that reloads meanwhile sees the old page or the new one.
    temporary = path.with_suffix(".html.part")
    with named(temporary):
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    return path


def make_cards(record: RunRecord) -> list[Card]:
    """Make the cards of the summary: what the model is, how far it came, how good and how fast it is.

    Losses are in nats a token, speed and MFU medians of the newer half of the steps. Cards without a measurement are left
    out, or show a dash.
    """
    config = record.config
    counts = count_parameters(config.model)
    pattern = config.model.parsed_pattern
    blocks = ", ".join(f"{number} {describe_symbol(letter)}" for letter, number in pattern.counts().items())
    loss, validation = record.last("loss"), record.last("validation_loss")
    speed, mfu = record.typical("tokens_per_second"), record.typical("mfu")
    tokens = record.last("tokens")
    lengths = ", ".join(dict.fromkeys(f"{stage.sequence_length:,}" for stage in record.stages))
    cards = [
        Card("Steps", f"{record.last_step():,}", f"of {record.num_steps:,}"),
        Card("Parameters", count(counts.total), f"{count(counts.active)} active a token"),
        Card("Model", f"{len(pattern.letters)} blocks", blocks),
        Card("Tokens", count(tokens) if tokens is not None else "-", f"rows of {lengths}"),
        Card("Training loss", f"{loss:.4f}" if loss is not None else "-", "newest step, nats a token"),
    ]
    if validation is not None:
        bits = record.last("validation_bits_per_byte")
        beside = "" if bits is None else f", {bits:.4f} bits a byte"
        cards.append(Card("Validation loss", f"{validation:.4f}", f"perplexity {perplexity(validation)}{beside}"))
    tokens, rows = record.last("validation_accuracy"), record.last("validation_row_accuracy")
    if tokens is not None and rows is not None:
        cards.append(
            Card("Validation accuracy", f"{tokens:.1%}", f"of labelled tokens; {rows:.1%} of rows without a wrong one")
        )
    cards.append(
        Card("Throughput", f"{count(speed)} tokens/s" if speed is not None else "-", "median of the newer half")
    )
    if mfu is not None:
        source = record.environment.get("peak", {}).get("source", "of the device's peak")
        cards.append(Card("MFU", f"{100 * mfu:.1f} %", source))
    cards.append(Card("Time", duration(record.seconds()), "inside training steps"))
    return cards


def describe_model(record: RunRecord) -> Table:
    """Tabulate parameters and arithmetic by kind of block, with a column of FLOPs for each row length of the run.

    Row lengths are those of its stages and data phases: attention's share grows with them.
    """
    config = record.config
    counts = count_parameters(config.model)
    phases = [phase.sequence_length for phase in config.data.phases if phase.sequence_length is not None]
    lengths = dict.fromkeys([*(stage.sequence_length for stage in record.stages), *phases])
    flops = [flops_per_token(config.model, length) for length in lengths]
    kinds = dict.fromkeys([*counts.total_by_kind, *flops[0]])
    rows = [
        (
            kind.replace("_", " "),
            f"{counts.total_by_kind.get(kind, 0):,}",
            f"{counts.active_by_kind.get(kind, 0):,}",
            *(count(column.get(kind, 0.0)) for column in flops),
        )
        for kind in kinds
    ]
    total = ("all", f"{counts.total:,}", f"{counts.active:,}", *(count(sum(column.values())) for column in flops))
    header = ("part", "parameters", "active", *(f"training FLOPs a token, rows of {length:,}" for length in lengths))
    return Table(f"Pattern {config.model.parsed_pattern.canonical()}", header, (*rows, total))


def describe_data(record: RunRecord) -> Table:
    """Tabulate the tokens and epochs that each source gave in each phase.

    A phase's counters only grow, so its newest line of metrics holds its total.
    """
    newest = {line["data"]["phase"]: line["data"] for line in record.metrics if "data" in line}
    rows = [
        (str(phase), source, f"{tokens:,}", f"{data['epochs'][source]:.3f}")
        for phase, data in sorted(newest.items())
        for source, tokens in data["tokens"].items()
    ]
    total = sum(sum(data["tokens"].values()) for data in newest.values())
    header = ("phase", "source", "tokens", "epochs since the start of the run")
    task = record.config.data.probe
    title = f"Store {record.config.data.store}" if task is None else f"Synthetic task {task.task}"
    return Table(title, header, (*rows, ("all", "", f"{total:,}", "")))


def count(value: float) -> str:
    """Format a number in three digits and a unit: 1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def perplexity(loss: float) -> str:
    """Format exp(loss); a loss beyond that of any vocabulary (30 nats) is not exponentiated."""
    return f"{math.exp(loss):,.1f}" if loss < 30 else "very large"


def duration(seconds: float) -> str:
    """Format seconds in the two largest units: 3725 -> 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
