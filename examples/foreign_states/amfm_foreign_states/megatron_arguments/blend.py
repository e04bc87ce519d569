"""Megatron's blend files: `--data-args-path` (words, a weight before each prefix or only prefixes) and
`--per-split-data-args-path` (JSON with such lists for train, valid and test), as `data.sources` and `validation`.

Without weights Megatron draws each dataset by its tokens, so the bytes of its .bin are its weight. Source:
`get_blend_from_list` of megatron/core/datasets/utils.py (megatron-core 0.16.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.durable.json_files import parse_object, read_bounded
from amfm.data_pipeline.prepare.sources import list_files
from amfm_foreign_states.megatron_arguments.training_settings import read_sources

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Blend:
    """Sources with weights, validation sets, and the splits that have no place."""

    sources: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    left_out: tuple[str, ...]


def read_blend(path: Path) -> Blend:
    """Read a blend file. Raises ValueError for a file that is none, and for a dataset that is not there."""
    content = read_bounded(path)
    if not content.lstrip().startswith(b"{"):
        return _make(path, {"train": content.decode("utf-8", errors="replace").split()})
    splits = parse_object(content, str(path), ValueError)
    unknown = sorted(splits.keys() - {"train", "valid", "test"})
    if unknown or not isinstance(splits.get("train"), list):
        raise ValueError(
            f"{path} has the splits {', '.join(map(str, splits))}; train, valid and test are read, train must be there"
        )
    return _make(path, {name: _words(path, name, given) for name, given in splits.items() if given})


def _make(path: Path, words: dict[str, list[str]]) -> Blend:
    sources = _weigh(path, words["train"]) if "train" in words else []
    if not sources:
        raise ValueError(f"{path} has no dataset to train on; put prefixes into it")
    taken = {source["name"] for source in sources}
    sets = [
        {"name": _free(each["name"], taken), "paths": each["paths"]} for each in _weigh(path, words.get("valid", []))
    ]
    return Blend(sources, sets, ("test",) if "test" in words else ())


def _words(path: Path, name: str, given: Any) -> list[str]:
    if not isinstance(given, list):
        raise ValueError(f"{path}: {name} is {type(given).__name__}; it must be a list of weights and prefixes")  # noqa: TRY004
    return [str(word) for word in given]


def _free(name: str, taken: set[str]) -> str:
    """A name that no source has."""
    found = f"{name}_valid" if name in taken else name
    taken.add(found)
    return found


def _weigh(path: Path, words: list[str]) -> list[dict[str, Any]]:
    """The datasets of a list, each with its weight; ValueError for one that is not there or has a weight below 0."""
    if words and len(words) % 2 and all(NUMBER.fullmatch(word) for word in words[0::2]):
        raise ValueError(f"{path} ends with the weight {words[-1]} and no prefix after it; complete or remove it")
    has_weights = len(words) > 1 and len(words) % 2 == 0 and all(NUMBER.fullmatch(word) for word in words[0::2])
    sources = read_sources(list(words))
    found = []
    for source in sources:
        if source["weight"] < 0:
            raise ValueError(f"{path} gives {source['paths'][0]} the weight {source['weight']}; it must be 0 or more")
        try:
            (file,) = list_files(SourceConfig(name=source["name"], paths=tuple(source["paths"])))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        found.append(file.num_bytes)
    total = sum(found)
    if not has_weights:
        return [source | {"weight": round(size / total, 6)} for source, size in zip(sources, found) if total]
    return sources
