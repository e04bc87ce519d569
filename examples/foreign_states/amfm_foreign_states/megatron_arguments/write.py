"""Writes a configuration of arguments of Megatron-LM, with a comment for each: given, a default there, or only the nearest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from amfm_foreign_states.megatron_arguments.compare import default_of
from amfm_foreign_states.megatron_arguments.table import Line, approximated, read_table, same
from amfm_foreign_states.megatron_arguments.translation import Missing, Translation

SECTIONS = ("run", "model", "data", "train", "optimizer", "schedule", "parallel", "low_precision")
# What a configuration must have, if nothing was given.
REQUIRED: dict[str, Any] = {
    "run.dir": "runs/megatron",
    "data.store": "data/megatron",
    "data.sources": [{"name": "tokens", "paths": ["data/tokens.idx"]}],
    "train.steps": 1000,
    "train.sequence_length": 4096,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 1,
    "optimizer.learning_rate": 3e-4,
}
# Differences that no setting has, or that a default hides.
ALWAYS = (
    "the loss is the mean over the tokens of the global batch (there of micro-batch means without --calculate-per-token-loss)",
    "the first update has the rate peak / warmup_steps, there 0: step k here is iteration k + 1 there",
    "samples come in another order",
    "`D` in a pattern is a dense feed-forward here, there DeepSeek sparse attention: it was translated",
    "balance losses are logged as a sum over blocks times the weight, there as a mean over layers without it",
)


def settings_of(translated: Translation) -> list[Line]:
    """The lines that are written: what was given, and defaults that differ from ours; then what must be there."""
    chosen = [found for found in translated.lines.values() if is_written(found, translated)]
    present = {found.setting for found in chosen}
    for setting, value in REQUIRED.items():
        if setting not in present:
            chosen.append(approximated(setting, value, "not given"))
    order = {name: number for number, name in enumerate(SECTIONS)}
    return sorted(chosen, key=lambda found: order.get(found.setting.partition(".")[0], len(order)))


# Settings whose null turns something off that is on by default.
WRITTEN_NULL = ("optimizer.clip_grad_norm", "train.validate_every_steps")


def is_written(found: Line, translated: Translation) -> bool:
    """Whether a line was given, or differs from the default here."""
    if found.is_unset:
        return False
    if found.is_approximate or any(name in translated.given.given for name in found.names):
        return found.value is not None or found.setting in WRITTEN_NULL
    return not same(found.value, default_of(found.setting))


def as_tree(lines: list[Line]) -> dict[str, Any]:
    """The settings as nested mappings."""
    tree: dict[str, Any] = {}
    for found in lines:
        *sections, key = found.setting.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = found.value
    return tree


def summarize(translated: Translation) -> dict[str, int]:
    """How many of the arguments that were given are equal here, in another form, missing (by users: H, M, L) or not known."""
    table = read_table()
    missing = {found.name: found for found in translated.missing if not found.is_default}
    unequal = {name for found in translated.lines.values() if found.is_approximate for name in found.names}
    counts: Counter[str] = Counter(equal=0, differs=0, missing=0, H=0, M=0, L=0, unknown=0)
    for name in translated.given.given:
        if name in missing:
            row = missing[name].row
            counts.update(["unknown"] if row is None else ["missing", row.users or "L"])
        else:
            is_equal = table.by_name[name].kind in ("=", "always") and name not in unequal
            counts["equal" if is_equal else "differs"] += 1
    return dict(counts)


def write_yaml(translated: Translation) -> str:
    """The configuration as YAML, after a summary and the list of what is missing."""
    lines = settings_of(translated)
    comments = {found.setting: comment_of(found, translated) for found in lines}
    return "\n".join([*head_lines(translated), "", *body_lines(as_tree(lines), comments), ""])


def head_lines(translated: Translation) -> Iterator[str]:
    """Comments: where it is from, counts, missing arguments, and what differs whatever was given."""
    counts = summarize(translated)
    yield f"# Written by `amfm import megatron-args` from {one_line(translated.given.where)}."
    yield (
        f"# Of {len(translated.given.given)} arguments {counts['equal']} are equal here, {counts['differs']} have another form, "
        f"{counts['missing']} are missing (users: H {counts['H']}, M {counts['M']}, L {counts['L']}), {counts['unknown']} are not known."
    )
    known = sorted((each for each in translated.missing if each.row is not None), key=rank)
    yield from ["#", "# Missing:"] if known else []
    for each in known:
        assert each.row is not None, "chosen above"
        default = " (a default)" if each.is_default else ""
        note = f": {each.row.note}" if each.row.note else ""
        yield f"#   [{each.row.users or 'L'}] {flag(each.name)} {one_line(each.value)}{default}{note}"
    others = [flag(each.name) for each in translated.missing if each.row is None]
    if others:
        yield f"# Not known, and left out: {' '.join(one_line(each) for each in others)}"
    yield from ["#", "# Different whatever was given:", *(f"#   {each}" for each in ALWAYS)]


def rank(missing: Missing) -> tuple[int, bool]:
    """High before low, given before default."""
    assert missing.row is not None, "known"
    return "HML".find(missing.row.users or "L"), missing.is_default


def comment_of(found: Line, translated: Translation) -> str:
    """Where a line comes from."""
    given = [name for name in found.names if name in translated.given.given]
    flags = " ".join(flag(name) for name in given or found.names[:1])
    if found.is_approximate:
        return f"approximated: {found.note}" + (f" ({flags})" if flags else "")
    return flags if given else f"default of Megatron-LM ({flags})"


def body_lines(tree: dict[str, Any], comments: dict[str, str], prefix: str = "") -> Iterator[str]:
    """Mappings in blocks, other values on their line with a comment after."""
    indent = "  " * prefix.count(".")
    for key, value in tree.items():
        setting = f"{prefix}{key}"
        if setting in comments:
            yield f"{indent}{key}: {dump(value)}  # {one_line(comments[setting])}"
        else:
            yield f"{indent}{key}:"
            yield from body_lines(value, comments, f"{setting}.")


def dump(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, float) and value != 0 and not math.isinf(value) and "." not in repr(value):
        return f"{value:.1e}" if float(f"{value:.1e}") == value else repr(value).replace("e", ".0e")
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def flag(name: str) -> str:
    """An argument as a flag."""
    return "--" + name.lstrip("-").replace("_", "-")


def one_line(value: Any) -> str:
    """A text for a comment: without line ends, cut where it is long."""
    return " ".join(str(value).split())[:300]
