"""MTP layers in checkpoints of transformers' classes, which load without them.

The classes ignore tensors under `mtp.`, so an export that has them computes the same logits, and serving engines that draft
find theirs. Names and order were read in vLLM (`nemotron_h_mtp.py`, `qwen3_next_mtp.py`). A nemotron_h numbers the blocks
of all depths through, with the projection's two norms at a depth's first and the last norm at its last. A qwen3_next has one
projection, and layers of attention and a feed-forward. Depths that share one module are one depth there, which an engine
uses again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from amfm.model.config.mup import without_mup
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightEntry
from amfm.model.huggingface.hf_class import HfTarget

QWEN3_NEXT_DEPTH = ("*", "E")
MOST_DEPTHS = 64

# Entries of one block, and tensors that are always zero: of its letter, our prefix and theirs.
BlockMap = Callable[[str, str, str], tuple[list[WeightEntry], dict[str, tuple[int, ...]]]]


@dataclass(frozen=True)
class DepthEntries:
    """Entries of all depths, and the shapes of tensors that the class demands but our model lacks."""

    entries: list[WeightEntry]
    zeros: dict[str, tuple[int, ...]]


def explain_left_out(config: ModelConfig, target: HfTarget) -> str | None:
    """Report why an export of this class leaves the depths out; None if it writes them, or there are none."""
    pattern = config.parsed_pattern
    if not pattern.num_depths:
        return None
    shown = f"the MTP layers /{''.join(pattern.depth_letters)} are left out"
    if target.unfit_depths is None:
        return f"{shown}: {target.name} has no place for them"
    alone = config.without_depths().model_copy(update={"pattern": "".join(pattern.depth_letters)})
    reasons = target.unfit(without_mup(alone)) or target.unfit_depths(config)
    return f"{shown}: {reasons[0]}" if reasons else None


def depth_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that say how many depths there are."""
    return {"num_nextn_predict_layers": config.num_depth_modules} if config.num_depths else {}


def count_depths(fields: Mapping[str, Any]) -> int:
    """How many depths config.json names. Raises ValueError for a number beyond reason."""
    number: int = fields.get("num_nextn_predict_layers") or 0
    if not 0 <= number <= MOST_DEPTHS:
        raise ValueError(f"config.json: num_nextn_predict_layers={number} must be from 0 to {MOST_DEPTHS}")
    return number


def nemotron_h_depths(config: ModelConfig, block_map: BlockMap) -> DepthEntries:
    """Build the map of the depths of a nemotron_h."""
    found = DepthEntries([], {})
    letters = config.parsed_pattern.depth_letters
    for depth in range(config.num_depth_modules):
        for place, letter in enumerate(letters):
            ours, theirs = f"mtp.{depth}.blocks.{place}.", f"mtp.layers.{depth * len(letters) + place}."
            if place == 0:
                for own, other in (("embed_norm", "enorm"), ("stream_norm", "hnorm"), ("in_proj", "eh_proj")):
                    found.entries.append(WeightEntry(f"mtp.{depth}.{own}.weight", (f"{theirs}{other}.weight",)))
            entries, zeros = block_map(letter, ours, theirs)
            found.entries.extend(entries)
            found.zeros.update(zeros)
            if place == len(letters) - 1:
                found.entries.append(WeightEntry(f"mtp.{depth}.norm.weight", (f"{theirs}final_layernorm.weight",)))
    return found


def qwen3_next_depth(
    config: ModelConfig,
    norm: Callable[[str, tuple[str, ...]], WeightEntry],
    layer: Callable[[str, str, str], Iterator[WeightEntry]],
) -> Iterator[WeightEntry]:
    """Build the map of the one depth of a qwen3_next; `norm` and `layer` give the entries of its norms and blocks."""
    if not config.num_depths:
        return
    yield WeightEntry("mtp.0.in_proj.weight", ("mtp.fc.weight",))
    for own, other in (
        ("embed_norm", "pre_fc_norm_embedding"),
        ("stream_norm", "pre_fc_norm_hidden"),
        ("norm", "norm"),
    ):
        yield norm(f"mtp.0.{own}.weight", (f"mtp.{other}.weight",))
    for place, letter in enumerate(QWEN3_NEXT_DEPTH):
        yield from layer(letter, f"mtp.0.blocks.{place}.", "mtp.layers.0.")
