"""Write a layout into a configuration file in place: its `parallel` section, and the keys of `train` that it decides.

How it works: YAML is parsed to nodes only for their positions, and just those spans of the text are replaced, so that
comments, order and style stay. Dumping the parsed document would lose them. The new text is loaded and checked in a
file next to the old one, which it then replaces in one rename: a layout that breaks a rule leaves the file untouched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from amfm.data_pipeline.durable.files import replacing
from amfm.launch.plan.estimate import Estimate
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import ParallelConfig

Edit = tuple[int, int, str]  # of the text: from, to, instead


def write_layout(path: Path, chosen: Sequence[Estimate]) -> None:
    """Replace the file's layouts by these estimates', one for each training stage in order.

    Raises ConfigError, and does not change the file, if a rule is broken.
    """
    text = path.read_text(encoding="utf-8")
    first = chosen[0]
    found = edited(text, whole_section(path, first.layout.settings()), first.train, stage_settings(chosen))
    with replacing(path) as file:
        file.write(found.encode())
        file.flush()
        load_checked(Path(file.name), (), world_size=first.layout.ranks)


def whole_section(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The layout with the default of each setting that it leaves out and that this file, or one that it extends, sets."""
    defaults = ParallelConfig().model_dump()
    declared = load_config(path).parallel.model_dump()
    return settings | {
        name: defaults[name] for name, value in declared.items() if name not in settings and value != defaults[name]
    }


def stage_settings(chosen: Sequence[Estimate]) -> list[dict[str, Any]]:
    """What each stage declares of its layout; one that stays as the stage before declares nothing."""
    declared: list[dict[str, Any]] = [{}]
    for before, item in pairwise(chosen):
        here = {"parallel": item.layout.settings()} if item.layout.settings() != before.layout.settings() else {}
        declared.append(here | (item.train if item.train != before.train else {}))
    return declared


def edited(
    text: str, parallel: Mapping[str, Any], train: Mapping[str, Any], stages: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The text of a configuration with its `parallel` section replaced, and these keys of `train` and of stages set.

    Keys of a layout that a stage of the file has and must not keep get the value that holds before it.
    """
    root: Any = yaml.compose(text)
    sections = {key.value: (key, value) for key, value in root.value}
    edits: list[Edit] = []
    whole = f"parallel: {flow(parallel)}"
    if "parallel" in sections:
        key, value = sections["parallel"]
        edits.append((key.start_mark.index, end_of(value), whole))
    else:
        edits.append((len(text), len(text), f"\n{whole}\n"))
    if "train" in sections and sections["train"][1].value:
        edits += keys_of(sections["train"][1], train)
    else:
        edits.append((len(text), len(text), f"\ntrain: {flow(train)}\n"))
    if "stages" in sections:
        present: dict[str, Any] = {"parallel": dict(parallel), **train}
        for section, own in zip(sections["stages"][1].value, stages):
            present |= own
            here = {key.value for key, _ in section.value}
            edits += keys_of(
                section, {name: value for name, value in present.items() if name in own or name in here}, after=1
            )
    # From the end, so that earlier positions stay valid.
    for start, end, instead in sorted(edits, reverse=True):
        text = text[:start] + instead + text[end:]
    return text


def keys_of(section: Any, settings: Mapping[str, Any], *, after: int = 0) -> list[Edit]:
    """Edits that set keys of a section: values replaced where present, missing keys inserted after its first `after`."""
    present = {key.value: value for key, value in section.value}
    edits = [
        (present[name].start_mark.index, end_of(present[name]), flow(setting))
        for name, setting in settings.items()
        if name in present
    ]
    first = section.value[after][0].start_mark
    between = ", " if section.flow_style else "\n" + " " * first.column
    missing = [f"{name}: {flow(setting)}{between}" for name, setting in settings.items() if name not in present]
    return [*edits, (first.index, first.index, "".join(missing))]


def end_of(node: Any) -> int:
    """Position where a value's text ends, without comments that follow it."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return end_of(node.value[-1][1])
    return int(node.end_mark.index)


def flow(value: Any) -> str:
    """A value as YAML on one line; a section as a flow mapping."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {flow(setting)}" for name, setting in value.items()) + "}"
    return json.dumps(value)
