"""`amfm report`: one self-contained HTML page of a run, finished or not, or of several over each other.

Everything is read from the run directory (data.py), so a report can be made while the run continues, on another
machine, or years later. Parameters and FLOPs are computed from the configuration, not read from logs. Here the numbers
are chosen and put into words; plots.py and overlay.py choose the curves, page.py makes the HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.model.config.kinds import describe_symbol
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.monitor.follow import FollowedRun
from amfm.pretrain.monitor.panel import plural
from amfm.pretrain.report.curves import make_stages
from amfm.pretrain.report.data import HEADER, RunRecord, list_attempts, read_run
from amfm.pretrain.report.goodput import USES, make_timeline, measure_goodput
from amfm.pretrain.report.numbers import count, duration, perplexity
from amfm.pretrain.report.overlay import MAX_RUNS, compare_configs, compare_numbers, overlay_plots, render_runs
from amfm.pretrain.report.page import (
    Card,
    Share,
    Table,
    flatten,
    render_cards,
    render_details,
    render_document,
    render_events,
    render_heading,
    render_note,
    render_pairs,
    render_plots,
    render_samples,
    render_shares,
    render_table,
    render_text,
    render_timeline,
    render_verdict,
    show_time,
)
from amfm.pretrain.report.page_data import describe_page, describe_tasks, tasks_plot
from amfm.pretrain.report.plots import make_plots
from amfm.pretrain.report.verdict import describe_state, judge_run

MAX_STARTS = 100
MAX_SAMPLES = 8  # of each prompt
ABOVE_PEAK = "not known: the peak was measured too low, while other programs ran"
# Classes of the style sheet.
KINDS = dict(zip(USES, ("useful", "useful-2", "saved", "lost", "lost-2", "lost-3", "lost-4"), strict=True))


def write_report(run_dirs: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several over each other, and return its path; call it on one rank.

    `out`: default `report.html` in the directory of the one run, or in the folder that holds all of several. Raises
    FileNotFoundError for something that is not a run directory, ValueError before the first step, for a run that is
    given twice, for too many, and where several are in different folders and `out` is not given.
    """
    place = out or choose_place([Path(folder) for folder in run_dirs])
    records = [read_run(folder) for folder in run_dirs]
    page = render_run(records[0]) if len(records) == 1 else render_overlay(records)
    # Renamed into place: a browser that reloads meanwhile sees the old page or the new one.
    write_file_atomically(place, page.encode())
    return place


def choose_place(folders: Sequence[Path]) -> Path:
    """Choose where the page goes. Raises ValueError for runs that cannot be on one page, or have no folder in common."""
    if len(folders) == 1:
        return folders[0] / "report.html"
    resolved = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, path in zip(folders, resolved) if resolved.count(path) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; name each run once")
    if len(folders) > MAX_RUNS:
        raise ValueError(
            f"{len(folders)} runs are more than the {MAX_RUNS} that a page can show in different colors; leave some out"
        )
    parents = {path.parent for path in resolved}
    if len(parents) > 1:
        raise ValueError("the runs are in different folders, so their page has no default path; name one by --out")
    return folders[0].parent / "report.html"


def render_run(record: RunRecord) -> str:
    """Render the page of one run."""
    followed = FollowedRun(record.directory)
    seen = followed.poll()
    progress = min(100.0, 100 * record.last_step() / record.num_steps)
    curves, tasks, time = tasks_plot(record), describe_tasks(record), describe_time(record)
    timeline, samples = make_timeline(record), choose_samples(record)
    plots = [*make_plots(record), *([] if curves is None else [curves])]
    parts = [
        render_heading(record.name(), *describe_state(record, seen), f"{describe_size(record)}; {record.directory}"),
        f'<div class="bar"><div style="width:{progress:.2f}%"></div></div>',
        render_verdict(judge_run(followed, seen, record)),
        render_cards(make_cards(record)),
        *map(render_note, record.notes),
        *([] if time is None else [f"<h2>Time</h2>{render_shares(*time)}"]),
        *([] if timeline is None else [render_timeline(timeline, KINDS)]),
        f"<h2>Curves</h2>{render_plots(plots)}",
        '<div class="screen">',
        *([f"<h2>Samples</h2>{render_samples(samples)}"] if samples else []),
        f"<h2>Model</h2>{render_table(describe_model(record))}",
        f"<h2>Data</h2>{render_table(describe_data(record))}",
        *([] if tasks is None else [f"<h2>Tasks</h2>{render_table(tasks)}"]),
        f"<h2>Starts</h2>{render_table(describe_starts(record))}",
        f"<h2>Events</h2>{render_events(record.events)}",
        "<h2>Environment and configuration</h2>",
        render_details("Environment", render_pairs(flatten(record.environment))),
        render_details("Resolved configuration", render_text(resolved_yaml(record.config))),
        "</div>",
    ]
    return render_document(record.name(), parts, describe_page([record], plots))


def render_overlay(records: Sequence[RunRecord]) -> str:
    """Render the page of several runs."""
    finished = sum(record.is_finished() for record in records)
    title = f"{len(records)} runs"
    state = f"{finished} of {len(records)} finished" if finished < len(records) else "all finished"
    where = ", ".join(str(record.directory) for record in records)
    plots = overlay_plots(records)
    parts = [
        render_heading(title, state, "done" if finished == len(records) else "going", where),
        render_runs(records),
        *(render_note(f"{record.directory}: {note}") for record in records for note in record.notes),
        f"<h2>Settings that differ</h2>{render_table(compare_configs(records))}",
        f"<h2>Numbers</h2>{render_table(compare_numbers(records))}",
        f"<h2>Curves</h2>{render_plots(plots)}",
    ]
    return render_document(title, parts, describe_page(records, plots))


def describe_size(record: RunRecord) -> str:
    """What never changes of a run: its parameters and blocks, in words."""
    counts, pattern = record.counts, record.config.model.parsed_pattern
    blocks = ", ".join(f"{number} {describe_symbol(letter)}" for letter, number in pattern.counts().items())
    return f"{count(counts.total)} parameters, {count(counts.active)} active per token; {len(pattern.letters)} blocks: {blocks}"


def make_cards(record: RunRecord) -> list[Card]:
    """Make the boxes of the summary: how far a run came, how good and how fast it is.

    Losses are in nats per token, speed and MFU medians of the newer half of the steps since the newest start. Boxes without a measurement are left
    out, or show a dash.
    """
    loss, validation = record.last("loss"), record.last("validation_loss")
    speed, mfu = record.typical("tokens_per_second"), record.typical("mfu")
    tokens = record.last("tokens")
    start = record.newest_start()
    speed_source = f"median since the start at step {start:,}" if start else "median of the newer half"
    lengths = ", ".join(dict.fromkeys(f"{stage.train.sequence_length:,}" for stage in record.stages))
    cards = [
        Card("Steps", f"{record.last_step():,}", f"of {record.num_steps:,}"),
        Card("Tokens", count(tokens) if tokens is not None else "-", f"rows of {lengths}"),
        Card("Training loss", f"{loss:.4f}" if loss is not None else "-", "newest step, nats per token"),
    ]
    spiked = sum("spike" in line for line in record.metrics)
    if spiked:
        share = 100 * spiked / len(record.metrics)
        cards.append(Card("Spike score", f"{share:.2g} %", f"{plural(spiked, 'step')} far above those before"))
    stages = make_stages(record)
    if stages:
        planned = record.stages[len(stages) - 1]
        cards.insert(
            1, Card("Stage", planned.name, f"{len(stages)} of {len(record.stages)}, ends at step {planned.last_step:,}")
        )
    if validation is not None:
        bits = record.last("validation_bits_per_byte")
        beside = "" if bits is None else f", {bits:.4f} bits per byte"
        cards.append(Card("Validation loss", f"{validation:.4f}", f"perplexity {perplexity(validation)}{beside}"))
    tokens, rows = record.last("validation_accuracy"), record.last("validation_row_accuracy")
    if tokens is not None and rows is not None:
        cards.append(
            Card(
                "Validation accuracy",
                f"{tokens:.1%}",
                f"of labeled tokens; {rows:.1%} of sequences without a wrong one",
            )
        )
    cards.append(Card("Throughput", f"{count(speed)} tokens/s" if speed is not None else "-", speed_source))
    if mfu is not None:
        source = record.environment.get("peak", {}).get("source", "of the device's peak")
        cards.append(Card("MFU", f"{100 * mfu:.1f} %", source) if mfu <= 1 else Card("MFU", "-", ABOVE_PEAK))
    cards.append(Card("Time", duration(record.seconds()), "inside training steps"))
    use = measure_goodput(record)
    if use is not None:
        again = f", {plural(use.restarts, 'restart')}" if use.restarts else ""
        cards.append(
            Card("Goodput", f"{100 * use.share():.1f} %", f"in steps that count, of {duration(use.held())}{again}")
        )
    return cards


def describe_time(record: RunRecord) -> tuple[list[Share], str] | None:
    """Shares of the time for which the run held its machines, useful ones first, and a line below; None without times."""
    use = measure_goodput(record)
    if use is None:
        return None
    shares = [
        Share(KINDS[name], USES[name], seconds / use.held(), f"{duration(seconds)}, {100 * seconds / use.held():.1f} %")
        for name, seconds in use.parts().items()
    ]
    lost = use.held() - use.steps - use.measuring - use.saving
    away = f"; {duration(use.away)} between commands, when it did not run, is not counted" if use.away >= 1 else ""
    text = f"{duration(use.held())} on its machines, of which {duration(lost)} ({100 * lost / use.held():.1f} %) were lost{away}"
    return shares, text


def choose_samples(record: RunRecord) -> dict[str, list[tuple[int, str]]]:
    """What each prompt of `evaluate.prompts` was continued with, by step: the first, the newest, and MAX_SAMPLES in all."""
    found: dict[str, list[tuple[int, str]]] = {}
    for line in record.metrics:
        texts = line.get("samples")
        for prompt, text in texts.items() if isinstance(texts, dict) else ():
            found.setdefault(prompt, []).append((int(line["step"]), str(text)))
    chosen = {}
    for prompt, own in found.items():
        places = {(len(own) - 1) * part // (MAX_SAMPLES - 1) for part in range(MAX_SAMPLES)}
        chosen[prompt] = [own[place] for place in sorted(places)]
    return chosen


def describe_model(record: RunRecord) -> Table:
    """Tabulate parameters and arithmetic by kind of block, with a column of FLOPs for each sequence length of the run.

    Row lengths are those of its stages and data phases: attention's share grows with them.
    """
    config = record.config
    counts = record.counts
    phases = [phase.sequence_length for phase in config.data.phases if phase.sequence_length is not None]
    lengths = dict.fromkeys([*(stage.train.sequence_length for stage in record.stages), *phases])
    flops = [record.flops_per_token(length) for length in lengths]
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
    header = (
        "part",
        "parameters",
        "active",
        *(f"training FLOPs per token, sequences of {length:,}" for length in lengths),
    )
    return Table(f"Pattern {config.model.parsed_pattern.canonical()}", header, (*rows, total))


def describe_starts(record: RunRecord) -> Table:
    """Tabulate which start did which steps, where, and with which code and settings; the newest MAX_STARTS of them."""
    attempts = list_attempts(record.events, record.last_step())
    hidden = f"the newest {MAX_STARTS} of {len(attempts):,}" if len(attempts) > MAX_STARTS else ""
    rows = [
        (number, show_time(time), *rest) for number, time, *rest in (each.words() for each in attempts[-MAX_STARTS:])
    ]
    return Table(hidden, HEADER, tuple(rows), is_summed=False)


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
    task = record.config.data.synthetic
    title = f"Store {record.config.data.store}" if task is None else f"Synthetic task {task.task}"
    return Table(title, header, (*rows, ("all", "", f"{total:,}", "")))
