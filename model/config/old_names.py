"""Settings that had other names, or values: the old one is read as the new one, with one warning, wherever settings are written.

In YAML files and overrides (pretrain/config/file.py), in the checkpoints and run directories of before (config/saved.py) and
in exports (model/config/schema.py). What is written has the new names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

OLD_NAMES = {
    "convert.keep": "convert.keep_blocks",
    "data.probe": "data.synthetic",
    "launch.keep_loaded": "launch.warm_restarts",
    "low_precision.letters": "low_precision.block_types",
    "low_precision.out_projection": "low_precision.out_proj_recipe",
    "low_precision.saved": "low_precision.activation_storage",
    "low_precision.wide_first": "low_precision.bf16_first_layers",
    "low_precision.wide_last": "low_precision.bf16_last_layers",
    "model.guide": "model.self_guided_training",
    "model.moe.router_group_merit": "model.moe.group_score_top_k",
    "parallel.expert_room": "parallel.expert_buffer_factor",
}
OLD_VALUES = {"parallel.overlap_experts": {"rows": "two_batch"}}  # by the setting's present name
STAGE = re.compile(r"stages\.\d+\.")  # a stage changes settings by the names of the run
Mapped = Callable[[Any], "dict[str, Any] | None"]


class OldNameWarning(FutureWarning):
    """A setting is written under a name, or with a value, of before."""


def current_key(key: str) -> str:
    """The dotted key under its present name, or as it is."""
    stage = STAGE.match(key)
    prefix = stage[0] if stage is not None else ""
    rest = key.removeprefix(prefix)
    for old, new in OLD_NAMES.items():
        if rest == old or rest.startswith(f"{old}."):
            warn_of(prefix + old, prefix + new)
            return prefix + new + rest.removeprefix(old)
    return key


def warn_of(old: str, new: str) -> None:
    """Say once per process that a setting is written under its old name, or with its old value."""
    warnings.warn(f"{old} is called {new} now; the old name is read, write the new one", OldNameWarning, stacklevel=2)


def use_current_names(settings: dict[str, Any], prefix: str = "", mapped: Mapped | None = None) -> None:
    """Put present names for old ones, in place, in the settings below a dotted `prefix` and in those of stages.

    mapped: the settings in a value, None if it is not a mapping; without it values are dicts. Raises ValueError if a
    setting is there under both.
    """
    mapped = mapped or (lambda value: value if isinstance(value, dict) else None)
    for place, section in (("", settings), *stages_of(settings, mapped)):
        for old, new in OLD_NAMES.items():
            parent, name = parent_of(section, old, prefix, mapped)
            if parent is None or name not in parent:
                continue
            now = new.rpartition(".")[2]
            if now in parent:
                raise ValueError(
                    f"{place}{old} is the old name of {place}{new}, and both are given; remove the old one"
                )
            warn_of(place + old, place + new)
            renamed = {now if key == name else key: value for key, value in parent.items()}
            parent.clear()
            parent.update(renamed)
        for key, values in OLD_VALUES.items():
            parent, name = parent_of(section, key, prefix, mapped)
            written: Any = parent.get(name) if parent is not None else None
            value = getattr(written, "value", written)  # entries of a YAML tree hold theirs
            if parent is None or not isinstance(value, str) or value not in values:
                continue
            warn_of(f"{place}{key}={value}", f"{place}{key}={values[value]}")
            parent[name] = values[value] if written is value else replace(written, value=values[value])


def parent_of(section: dict[str, Any], key: str, prefix: str, mapped: Mapped) -> tuple[dict[str, Any] | None, str]:
    """The settings in which those below `prefix` would have a dotted key, None if they do not, and the key's last name."""
    parents, _, name = key.removeprefix(prefix).rpartition(".")
    parent: dict[str, Any] | None = section if key.startswith(prefix) else None
    for part in filter(None, parents.split(".")):
        parent = mapped(parent.get(part)) if parent is not None else None
    return parent, name


def stages_of(settings: Mapping[str, Any], mapped: Mapped) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of each stage of a run, with their dotted place."""
    stages = settings.get("stages")
    listed = getattr(stages, "value", stages)
    for index, stage in enumerate(listed if isinstance(listed, (list, tuple)) else ()):
        section = mapped(stage)
        if section is not None:
            yield f"stages.{index}.", section
