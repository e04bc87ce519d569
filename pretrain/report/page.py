"""The HTML of a report: one file without links to anything outside it, light and dark, wide and narrow.

A report is mailed, archived and opened offline, so style sheet and plots are inline and there is no script. Colours are
CSS variables, set twice: `prefers-color-scheme` chooses, and the plots' SVG uses the same variables. Whatever comes from
the run (names, events, settings) is escaped before it enters the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from pretrain.config.file import resolved_yaml
from pretrain.report.colours import DARK, LIGHT
from pretrain.report.data import RunRecord
from pretrain.report.plots import Plot

# A long run logs thousands of checkpoints; older events stay in events.jsonl.
MAX_EVENTS = 200

VARIABLES = f"""
:root {{ color-scheme: light dark; {LIGHT.css()}
  --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --accent: #2f6fde;
  --good: #1a7f4b; --wait: #9a6200; --bad: #c0362c; }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK.css()}
  --page: #0f1216; --card: #181c22; --ink: #e8eaed; --accent: #7aa7ff;
  --good: #5ed39a; --wait: #e6b455; --bad: #ff8a80; }} }}
"""

STYLE = (
    VARIABLES
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 48px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px; margin-bottom: 18px; }
h1 { font-size: 1.65rem; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 32px 0 12px; }
.state { font-size: .82rem; font-weight: 600; }
.state::before { content: ""; display: inline-block; width: .6em; height: .6em; border-radius: 50%; background: currentColor; margin-right: .45em; }
.done { color: var(--good); } .going { color: var(--wait); }
.where { width: 100%; color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
.bar { height: 5px; border-radius: 3px; background: var(--line); overflow: hidden; margin-bottom: 18px; }
.bar div { height: 100%; background: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px; }
.card, figure, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 12px 14px; min-width: 0; }
.card .label { color: var(--muted); font-size: .8rem; }
.card .value { font-size: 1.4rem; font-weight: 600; letter-spacing: -.01em; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card .detail { color: var(--muted); font-size: .8rem; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; padding: 14px 14px 8px; min-width: 0; }
figcaption b { display: block; font-size: .98rem; }
figcaption { color: var(--muted); font-size: .8rem; margin-bottom: 6px; }
figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; }
.panel { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
td:first-child { white-space: nowrap; }
th, td { text-align: left; padding: 7px 14px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td { overflow-wrap: break-word; font-variant-numeric: tabular-nums; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
.numbers tr:last-child td { font-weight: 600; } .numbers code { overflow-wrap: anywhere; }
.none { color: var(--muted); padding: 12px 14px; margin: 0; font-size: .85rem; }
details.panel { margin-top: 12px; } summary { cursor: pointer; padding: 11px 14px; font-weight: 600; font-size: .92rem; }
details[open] > summary { border-bottom: 1px solid var(--line); }
pre { margin: 0; padding: 12px 14px; font-size: .8rem; overflow-x: auto; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .92em; }
.note { color: var(--wait); font-size: .85rem; margin: 10px 0 0; }
@media (max-width: 560px) { main { padding: 18px 12px 32px; } .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 9px; }
  .card { padding: 10px 11px; } .card .value { font-size: 1.15rem; } figure { padding: 11px 8px 6px; }
  table { font-size: .8rem; } th, td { padding: 6px 7px; } th, td:first-child { white-space: normal; } td:last-child { min-width: 6.5em; } }
@media print { details { display: block; } body { background: none; } .card, figure, .panel { break-inside: avoid; } }
"""
)


@dataclass(frozen=True)
class Card:
    """One figure of the summary: what it is, the value as text with its unit, and a remark below it."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Table:
    """Rows of texts below a header, the last row a sum."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def render_page(record: RunRecord, cards: Sequence[Card], plots: Sequence[Plot], tables: Mapping[str, Table]) -> str:
    """Render the whole page; `tables` by their headings, cards and plots in the order given."""
    finished = record.is_finished()
    state = "finished" if finished else f"unfinished: step {record.last_step():,} of {record.num_steps:,}"
    progress = min(100.0, 100 * record.last_step() / record.num_steps)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    name = escape(record.name())
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name} - amfm report</title><style>{STYLE}</style></head><body><main>",
        f'<header><h1>{name}</h1><span class="state {"done" if finished else "going"}">{state}</span>',
        f'<span class="where">{escape(str(record.directory))}, written {written}</span></header>',
        f'<div class="bar"><div style="width:{progress:.2f}%"></div></div>',
        f'<section class="cards">{"".join(map(render_card, cards))}</section>',
        *(f'<p class="note">{escape(note)}</p>' for note in record.notes),
        f'<h2>Curves</h2><section class="plots">{"".join(map(render_plot, plots))}</section>',
        *(f"<h2>{escape(heading)}</h2>{render_table(table)}" for heading, table in tables.items()),
        "<h2>Events</h2>",
        render_events(record.events),
        "<h2>Environment and configuration</h2>",
        render_details("Environment", render_pairs(flatten(record.environment))),
        render_details("Resolved configuration", f"<pre>{escape(resolved_yaml(record.config))}</pre>"),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def render_card(card: Card) -> str:
    """Render one card of the summary."""
    return (
        f'<div class="card"><div class="label">{escape(card.label)}</div><div class="value">{escape(card.value)}</div>'
        f'<div class="detail">{escape(card.detail)}</div></div>'
    )


def render_plot(plot: Plot) -> str:
    """Render one figure with title and caption; screen readers get its title."""
    caption = f"<figcaption><b>{escape(plot.title)}</b>{escape(plot.caption)}</figcaption>"
    return f'<figure role="img" aria-label="{escape(plot.title)}">{caption}{plot.svg()}</figure>'


def render_table(table: Table) -> str:
    """Render a table of numbers, aligned on the right, with its title as a first line."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    title = f'<p class="none"><code>{escape(table.title)}</code></p>'
    return f'<div class="panel numbers">{title}<table><tr>{head}</tr>{"".join(rows)}</table></div>'


def render_events(events: Sequence[Mapping[str, object]]) -> str:
    """Render the events (starts, checkpoints, signals, skipped steps, ...), newest first, MAX_EVENTS at most."""
    if not events:
        return '<div class="panel"><p class="none">No events were logged.</p></div>'
    rows = []
    for event in list(reversed(events))[:MAX_EVENTS]:
        rest = {key: value for key, value in event.items() if key not in {"time", "event", "step"}}
        cells = (show_time(event.get("time")), event.get("step", ""), event.get("event", ""), show_rest(rest))
        rows.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    hidden = len(events) - len(rows)
    more = f'<p class="none">{hidden:,} older events are in events.jsonl.</p>' if hidden > 0 else ""
    head = "<tr><th>time</th><th>step</th><th>event</th><th>details</th></tr>"
    return f'<div class="panel"><table>{head}{"".join(rows)}</table>{more}</div>'


def show_time(value: object) -> str:
    """Format seconds since 1970 or ISO 8601 in one form, in UTC; any other text stays as it is."""
    if isinstance(value, (int, float)):
        moment = datetime.fromtimestamp(value, UTC)
    elif isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", value):
        moment = datetime.fromisoformat(value).astimezone(UTC)
    else:
        return "" if value is None else str(value)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def show_rest(values: Mapping[str, object]) -> str:
    """Format the other fields of an event on one line; what is no text as JSON."""
    return ", ".join(
        f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()
    )


def flatten(value: object, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Yield (dotted name, value) of nested mappings; lists stay on one line, as JSON."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def render_pairs(pairs: Iterable[tuple[str, object]]) -> str:
    """Render a table of names and values; a remark when there are none."""
    rows = [f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in pairs if name]
    return f"<table>{''.join(rows)}</table>" if rows else '<p class="none">Nothing was recorded.</p>'


def render_details(title: str, body: str) -> str:
    """Render a part that is folded until a click opens it, by the browser alone."""
    return f'<details class="panel"><summary>{escape(title)}</summary>{body}</details>'
