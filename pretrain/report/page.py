"""The HTML of a report: one file without links to anything outside it, light and dark, wide and narrow.

A report is mailed, archived and opened offline, so style sheet (page.css), script (page.js) and the curves are inline,
and the page itself forbids the browser to fetch anything. The script draws the plots; if none runs, the reader sees
them as SVG. Colours are CSS variables, set twice: `prefers-color-scheme` chooses. Whatever comes from the run (names,
events, settings) is escaped before it enters the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from amfm.pretrain.report.curves import Plot, kind_of
from amfm.pretrain.report.draw import draw_svg
from amfm.pretrain.report.goodput import COLUMNS, USES, Timeline
from amfm.pretrain.report.numbers import DARK, LIGHT, plain
from amfm.pretrain.report.verdict import Verdict

# A long run logs thousands of checkpoints; older events stay in events.jsonl.
MAX_EVENTS = 200
# Of events: what has its own column, and what the table of starts and the time over the clock have.
OWN_COLUMNS = {"time", "event", "step", "hosts", "job", "code", "versions", "config_sha256", "config", "world_size", "began_at", "last_line_at"}  # fmt: skip

VARIABLES = f"""
:root {{ color-scheme: light dark; {LIGHT.css()}
  --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --accent: #2f6fde;
  --good: #1a7f4b; --wait: #9a6200; --bad: #c0362c; }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK.css()}
  --page: #0f1216; --card: #181c22; --ink: #e8eaed; --accent: #7aa7ff;
  --good: #5ed39a; --wait: #e6b455; --bad: #ff8a80; }} }}
"""
# The hatches that the style sheet gives two classes, for shapes of an SVG.
HATCHED = {"lost-2": "M0 8L8 0", "lost-3": "M4 0V8"}
HATCHES = "".join(
    f'<pattern id="hatch-{name}" width="8" height="8" patternUnits="userSpaceOnUse"><rect width="8" height="8" fill="var(--bad)"/>'
    f'<path d="{path}" stroke="var(--card)" stroke-width="2"/></pattern>'
    for name, path in HATCHED.items()
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Card:
    """One figure of the summary: what it is, the value as text with its unit, and a warning below it."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Table:
    """Rows of texts below a header; `is_summed`: the last row is a sum."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_summed: bool = True


@dataclass(frozen=True)
class Share:
    """A part of a whole: its class in the style sheet, what it is, which part, and how much in words."""

    kind: str
    label: str
    part: float
    text: str


def render_document(title: str, parts: Iterable[str], data: Mapping[str, Any]) -> str:
    """Render a whole page from the parts of its body, in order; `data` is what its script draws."""
    folder = Path(__file__).parent
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # Escaped, because `</script>` in a name would end the data.
    values = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)} - amfm report</title><style>{VARIABLES}{style}</style></head><body><main>",
        *parts,
        "</main>",
        f'<script type="application/json" id="plots-data">{values}</script>',
        f"<script>{script}</script></body></html>",
    ]
    return "\n".join(lines) + "\n"


def render_heading(name: str, state: str, kind: str, where: str) -> str:
    """Render the page's first lines: what it is about, its state (kind: done, going or bad), and where it is."""
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<header><h1>{escape(name)}</h1><span class="state {kind}">{escape(state)}</span>'
        f'<span class="where">{escape(where)}, written {written}</span></header>'
    )


def render_verdict(verdict: Verdict) -> str:
    """Render whether the run is well: a sign and a word, and each finding with what to do."""
    found = [
        f"<li><b>{escape(finding.text)}</b>: {escape(finding.remedy)} ({escape(finding.page)})</li>"
        for finding in verdict.findings
    ]
    kind, sign = ("look", "&#9650;") if found else ("well", "&#9679;")
    return f'<div class="verdict {kind}"><p>{sign} {escape(verdict.level)}</p><ul>{"".join(found)}</ul></div>'


def render_cards(cards: Sequence[Card]) -> str:
    """Render the boxes of the summary."""
    boxes = [
        f'<div class="card"><div class="label">{escape(card.label)}</div><div class="value">{escape(card.value)}</div>'
        f'<div class="detail">{escape(card.detail)}</div></div>'
        for card in cards
    ]
    return f'<section class="cards">{"".join(boxes)}</section>'


def render_shares(shares: Sequence[Share], text: str) -> str:
    """Render parts of a whole as one bar, with a legend of those that are not empty, and a line of text."""
    seen = [share for share in shares if share.part > 0.0005]
    bars = [
        f'<div class="use {share.kind}" style="width:{100 * share.part:.2f}%" title="{escape(share.label)}: {escape(share.text)}"></div>'
        for share in seen
    ]
    keys = [
        f'<li><span class="use {share.kind}"></span>{escape(share.label)} <b>{escape(share.text)}</b></li>'
        for share in seen
    ]
    return (
        f'<div class="panel"><div class="shares" role="img" aria-label="{escape(text)}">{"".join(bars)}</div>'
        f'<ul class="shares-key">{"".join(keys)}</ul><p class="none">{escape(text)}.</p></div>'
    )


def render_timeline(timeline: Timeline, kinds: Mapping[str, str]) -> str:
    """Render the uses of the time over the clock, in the classes of `kinds`, with marks above and times below."""
    width, reach = 1000 / COLUMNS, 1000 / COLUMNS + 0.4  # a little over the next one: no gap shows between them
    floors, paths = [100.0] * COLUMNS, []
    for use, shares in timeline.columns.items():
        path = ""
        for number, share in enumerate(shares):
            if share > 0.002:
                floors[number] -= 100 * share
                path += f"M{number * width:.1f} {floors[number]:.1f}h{reach:.1f}v{100 * share:.1f}h-{reach:.1f}z"
        fill = f' fill="url(#hatch-{kinds[use]})"' if kinds[use] in HATCHED else ""
        paths.append(f'<path class="{kinds[use]}"{fill} d="{path}"><title>{escape(USES[use])}</title></path>')
    signs = {"failure": "&#9650;", "trouble": "&#9670;", "other": "|"}
    marks = [
        f'<i class="{kind}" style="left:{100 * place:.1f}%" title="{escape(text)}">{signs[kind]}</i>'
        for place, kind, text in timeline.marks
    ]
    quarters = (timeline.begin + quarter * (timeline.end - timeline.begin) / 4 for quarter in range(5))
    times = "".join(f"<span>{show_time(time)[:16]}</span>" for time in quarters)
    return (
        f'<div class="panel clock" role="img" aria-label="use of the time over the clock"><div class="when">{"".join(marks)}</div>'
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none">{HATCHES}{"".join(paths)}</svg><div class="times">{times}</div></div>'
    )


def render_plots(plots: Sequence[Plot]) -> str:
    """Render the section of plots: a place for each that the script fills, and its SVG if no script runs.

    Folded ones come after, closed; without a script they are only named.
    """
    figures = {False: "", True: ""}
    for plot in plots:
        caption = f"<figcaption><b>{escape(plot.title)}</b>{escape(plot.caption)}</figcaption>"
        place = f'<div class="plot" id="plot-{plot.name}" aria-label="{escape(plot.title)}" hidden></div>'
        still = "drawn where scripts run" if plot.is_folded else draw_svg(plot)
        figures[plot.is_folded] += f"<figure>{caption}{place}<noscript>{still}</noscript></figure>"
    others = f'<section class="plots">{figures[True]}</section>'
    return f'<div id="plots-bar" hidden></div><section class="plots">{figures[False]}</section>' + (
        render_details("Other numbers", others, "others") if figures[True] else ""
    )


def render_table(table: Table) -> str:
    """Render a table of numbers, aligned on the right, with its title as a first line."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    title = f'<p class="none"><code>{escape(table.title)}</code></p>' if table.title else ""
    kind = "numbers summed" if table.is_summed else "numbers"
    return f'<div class="panel {kind}">{title}<table><tr>{head}</tr>{"".join(rows)}</table></div>'


def render_samples(samples: Mapping[str, Sequence[tuple[int, str]]]) -> str:
    """Render how the continuations of each prompt changed: a row for each step of them."""
    parts = []
    for prompt, texts in samples.items():
        rows = "".join(f"<tr><th>step {step:,}</th><td>{escape(text)}</td></tr>" for step, text in texts)
        parts.append(f'<div class="panel samples"><p>{escape(prompt)} &hellip;</p><table>{rows}</table></div>')
    return "".join(parts)


def render_events(events: Sequence[Mapping[str, object]]) -> str:
    """Render what happened, newest first, and folded what every run does: checkpoints, validation; MAX_EVENTS of each."""
    if not events:
        return '<div class="panel"><p class="none">No events were logged.</p></div>'
    of_any = [event for event in events if kind_of(event) is None]
    names = ", ".join(sorted({str(event.get("event")).replace("_", " ") for event in of_any}))
    others = [event for event in events if kind_of(event) is not None]
    shown = render_rows(others) if others else '<p class="none">Nothing but what every run does.</p>'
    folded = render_details(f"{len(of_any):,} of every run: {names}", render_rows(of_any), "") if of_any else ""
    return f'<div class="panel events">{shown}{folded}</div>'


def render_rows(events: Sequence[Mapping[str, object]]) -> str:
    """Render events as a table, newest first."""
    rows = []
    for event in list(reversed(events))[:MAX_EVENTS]:
        rest = {key: value for key, value in event.items() if key not in OWN_COLUMNS and value is not None}
        words = ", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in rest.items())
        step, kind = event.get("step"), kind_of(event) or ""
        name = str(event.get("event", "")).replace("_", " ")
        texts = ("" if step is None else plain(step), name, words)
        cells = [render_time(event.get("time")), *map(escape, texts)]
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    hidden = len(events) - len(rows)
    more = f'<p class="none">{hidden:,} older events are in events.jsonl.</p>' if hidden > 0 else ""
    head = "<thead><tr><th>time (UTC)</th><th>step</th><th>event</th><th>details</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>{more}"


def render_time(value: object) -> str:
    """Render a time so that it breaks between day and clock only."""
    return f"<time>{' '.join(f'<span>{escape(word)}</span>' for word in show_time(value).split(' '))}</time>"


def show_time(value: object) -> str:
    """Format seconds since 1970 or ISO 8601 in one form, in UTC; any other text stays as it is."""
    try:
        if isinstance(value, (int, float)):
            moment = datetime.fromtimestamp(value, UTC)
        elif isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", value):
            moment = datetime.fromisoformat(value).astimezone(UTC)
        else:
            return "" if value is None else str(value)
    except (ValueError, OverflowError, OSError):  # of a damaged line
        return str(value)
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def flatten(value: object, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Yield (dotted name, value) of nested mappings; lists stay on one line, as JSON."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def render_pairs(pairs: Iterable[tuple[str, object]]) -> str:
    """Render a table of names and values; a warning when there are none."""
    rows = [f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in pairs if name]
    return f"<table>{''.join(rows)}</table>" if rows else '<p class="none">Nothing was recorded.</p>'


def render_note(text: str) -> str:
    """Render a warning about what could not be read."""
    return f'<p class="note">{escape(text)}</p>'


def render_text(text: str) -> str:
    """Render a text with its lines as they are."""
    return f"<pre>{escape(text)}</pre>"


def render_details(title: str, body: str, kind: str = "panel") -> str:
    """Render a part that is folded until a click opens it, only by the browser."""
    return f'<details class="{kind}"><summary>{escape(title)}</summary>{body}</details>'
