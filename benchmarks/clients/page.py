"""The page of results: written from reports, and read again where some of its rows are measured and the others stay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from amfm_clients.check import CLIENTS, ClientReport

from amfm.model.huggingface.refusals import ClientName

TITLE = "# Other programs on our exports"
TASKS_TITLE = "## One task, three ways"
PROGRAMS_HEAD = ("class", "pattern", *CLIENTS)
ADAPTERS_HEAD = ("class", "modules with adapters", "losses of 4 steps", "merged and loaded again")
EXPLANATION = (
    "Each program scores 64 token ids, each given those before it, continues 16 tokens greedily, and tokenizes two texts. "
    "The number is the largest difference from transformers in float32, in nats; *equal* is at most 1e-3 (2e-2 in bf16), the "
    "same continuation, and texts of as many tokens. peft is a fresh LoRA by trl, then trained, merged, saved and loaded."
)
NOT_TRIED = "not tried"
NOTED = ("refused", "misread", "failed")
SHOWN = {"refused": "rejected"}


@dataclass(frozen=True)
class Row:
    """A model on the page: its pattern, and by program a few words, and a note where it rejects or misreads.

    adapters: the cells of the table of fine-tuning; empty if that failed.
    """

    pattern: str
    words: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """The page. runs: a paragraph per run that it has rows of; rows by name; tasks: the lines of their table."""

    runs: tuple[str, ...]
    rows: dict[str, Row]
    versions: tuple[str, ...]
    tasks: tuple[str, ...]


def describe(report: ClientReport) -> str:
    """Report in a few words what a program made of an export."""
    if report.max_difference is None:
        return f"{report.outcome}: {report.expected or report.error}"
    rounding = ", bf16" if report.tolerance > 1e-2 else ""
    text = f"{report.outcome}, {report.max_difference:.1e}{rounding}"
    return text if report.outcome == "equal" else f"{text}: {'; '.join(report.problems)}"


def to_row(pattern: str, reports: Mapping[ClientName, ClientReport]) -> Row:
    """What the page shows of a model."""
    words: dict[str, str] = {}
    notes: dict[str, str] = {}
    for client in CLIENTS:
        report = reports.get(client)
        if report is None:
            words[client] = NOT_TRIED
            continue
        words[client] = SHOWN.get(report.outcome, report.outcome) if report.outcome in NOTED else describe(report)
        if report.outcome in NOTED:
            known = f"{report.expected}. " if report.expected else ""
            notes[client] = known + (describe(report) if report.error is None else f"Its words: `{report.error}`")
    details = reports["peft"].details if "peft" in reports else None
    if not details:
        return Row(pattern, words, notes)
    losses = ", ".join(f"{loss:.2f}" for loss in details["losses"])
    return Row(pattern, words, notes, (", ".join(details["modules"]), losses, f"{details['merged_difference']:.1e}"))


def to_markdown(page: Page) -> str:
    """The page as text."""
    notes: list[str] = []
    programs = [[name, f"`{row.pattern}`", *_cells(name, row, notes)] for name, row in page.rows.items()]
    adapters = [[name, *row.adapters] for name, row in page.rows.items() if row.adapters]
    versions = f"Versions: {', '.join(page.versions)}."
    blocks = [TITLE, *page.runs, _table(PROGRAMS_HEAD, programs), "\n".join(notes), versions]
    blocks += [_table(ADAPTERS_HEAD, adapters)] if adapters else []
    blocks += [TASKS_TITLE, "\n".join(page.tasks)] if page.tasks else []
    return "\n\n".join(block for block in blocks if block) + "\n"


def _cells(name: str, row: Row, notes: list[str]) -> Iterator[str]:
    for client, words in row.words.items():
        if client in row.notes:
            notes.append(f"{len(notes) + 1}. {name}, {client}, {words}: {row.notes[client]}")
            yield f"{words} [{len(notes)}]"
        else:
            yield words


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def read_page(text: str) -> Page:
    """Read a page that `to_markdown` wrote. Raises ValueError for another text."""
    first, *blocks = text.rstrip("\n").split("\n\n")
    places = [place for place, block in enumerate(blocks) if block.startswith("| class | pattern |")]
    if first != TITLE or not places:
        raise ValueError(
            f"the page does not begin with {TITLE!r} and a table of classes; write a whole one, without --only"
        )
    runs, (table, *rest) = blocks[: places[0]], blocks[places[0] :]
    notes = dict(re.findall(r"^(\d+)\. [^:]*: (.*)$", "\n\n".join(rest), re.MULTILINE))
    adapters = {name: cells for block in rest if block.startswith("| class |") for name, *cells in _read_table(block)}
    rows = {}
    for name, pattern, *cells in _read_table(table):
        words = dict(zip(PROGRAMS_HEAD[2:], (cell.split(" [")[0] for cell in cells), strict=True))
        numbers = {client: cell.rstrip("]").split(" [")[1] for client, cell in zip(words, cells) if " [" in cell}
        own = {client: notes[number] for client, number in numbers.items()}
        rows[name] = Row(pattern.strip("`"), words, own, tuple(adapters.get(name, ())))
    named = next(block for block in rest if block.startswith("Versions: "))
    tasks = rest[rest.index(TASKS_TITLE) + 1].split("\n") if TASKS_TITLE in rest else ()
    versions = named.removeprefix("Versions: ").removesuffix(".").split(", ")
    return Page(tuple(runs), rows, tuple(versions), tuple(tasks))


def _read_table(block: str) -> Iterator[list[str]]:
    for line in block.split("\n")[2:]:
        yield line.removeprefix("| ").removesuffix(" |").split(" | ")


def merge(old: Page, new: Page, names: Sequence[str]) -> Page:
    """The old page with rows, runs and versions of a new one, rows in the order of `names`; tasks where it measured them."""
    found = old.rows | new.rows
    runs = tuple(run for run in old.runs if run.split(" on ")[0] != new.runs[0].split(" on ")[0])
    return replace(
        old,
        runs=runs + new.runs,
        rows={name: found[name] for name in names if name in found},
        versions=tuple(dict.fromkeys([*old.versions, *new.versions])),
        tasks=new.tasks or old.tasks,
    )
