"""Depths of multi-token prediction in checkpoints of transformers' classes, which load without them.

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

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightEntry
from amfm.model.huggingface.fields import LAYER_NAMES, letters_of

QWEN3_NEXT_DEPTH = ("*", "E")
MOST_DEPTHS = 64

# Entries of one block, and tensors that are always zero: of its letter, our prefix and theirs.
BlockMap = Callable[[str, str, str], tuple[list[WeightEntry], dict[str, tuple[int, ...]]]]


@dataclass(frozen=True)
class DepthEntries:
    """Entries of all depths, and the shapes of tensors that the class demands but our model lacks."""

    entries: list[WeightEntry]
    zeros: dict[str, tuple[int, ...]]


def explain_left_out(config: ModelConfig, target: str, unfit_main: Callable[[ModelConfig], list[str]]) -> str | None:
    """Say why an export of this target leaves the depths out; None where it writes them, or there are none.

    `unfit_main`: lists what a model without depths has that the class cannot hold.
    """
    pattern = config.parsed_pattern
    if not pattern.num_depths:
        return None
    shown = f"the prediction depths /{''.join(pattern.depth_letters)} are left out"
    if target not in ("nemotron_h", "qwen3_next"):
        return f"{shown}: {target} has no place for them"
    alone = config.without_depths().model_copy(update={"pattern": "".join(pattern.depth_letters)})
    reasons = unfit_main(alone)
    if reasons:
        return f"{shown}: {reasons[0]}"
    if target == "qwen3_next" and (pattern.depth_letters != QWEN3_NEXT_DEPTH or config.num_depth_modules > 1):
        return f"{shown}: qwen3_next has one module of attention and experts; use /*E, or model.mtp.shared"
    return None


def depth_fields(config: ModelConfig, target: str) -> dict[str, Any]:
    """Fields of config.json that say how many depths there are, and of a nemotron_h which blocks each has."""
    if not config.num_depths:
        return {}
    fields: dict[str, Any] = {"num_nextn_predict_layers": config.num_depth_modules}
    letters = config.parsed_pattern.depth_letters
    if target == "nemotron_h":
        fields["mtp_layers_block_type"] = [LAYER_NAMES[letter] for letter in letters]
        fields["mtp_hybrid_override_pattern"] = "".join(letters)
    return fields


def depth_pattern(fields: Mapping[str, Any], target: str) -> str:
    """The part of a pattern behind the main blocks that config.json names, with its `/`; "" for no depths."""
    number = fields.get("num_nextn_predict_layers") or 0
    if not 0 <= number <= MOST_DEPTHS:
        raise ValueError(f"config.json: num_nextn_predict_layers={number} must be from 0 to {MOST_DEPTHS}")
    letters = list(QWEN3_NEXT_DEPTH)
    if target == "nemotron_h" and number:
        names = fields.get("mtp_layers_block_type")
        letters = letters_of(list(names)) if names else list(fields["mtp_hybrid_override_pattern"])
    return f"/{''.join(letters)}" * number


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
