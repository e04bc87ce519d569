"""The transformers class `qwen3_5_moe`, of which only the text model, `qwen3_5_moe_text`, is meant.

Read from transformers 5.24 (`configuration_qwen3_5_moe.py`, `modeling_qwen3_5_moe.py`). The same function as `qwen3_next`, with
an expert block in every layer; the projections of Gated DeltaNet are stored otherwise.

The transformers class `qwen3_5_text`: the dense text models of Qwen3.5, `qwen3_5_moe` with feed-forwards in place of experts.

Read from transformers 5.24 (`configuration_qwen3_5.py`, `modeling_qwen3_5.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightEntry, WeightMap
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.qwen3_next import (
    limits,
    model_config_from_qwen3_next,
    qwen3_next_fields,
    unfit_for_qwen3_next,
)
from amfm.model.huggingface.qwen3_next_weights import RowsEntry, delta_options, qwen3_next_map, scan_entries
from amfm.model.huggingface.refusals import needs_byte_level

QWEN3_5_MOE_TYPE = "qwen3_5_moe_text"


def unfit_for_qwen3_5_moe(config: ModelConfig) -> list[str]:
    """Every choice that the class cannot hold: what qwen3_next cannot, a dense layer, and weights that do not sum to 1."""
    reasons = [reason.replace("qwen3_next", "qwen3_5_moe") for reason in unfit_for_qwen3_next(config)]
    if "-" in config.letters:
        reasons.append(
            f"model.pattern={config.pattern}: every layer of qwen3_5_moe has experts; use E in place of -, or target own"
        )
    elif config.moe is not None and not config.moe.normalize_probabilities:
        reasons.append(
            "model.moe.normalize_probabilities=false: qwen3_5_moe divides the chosen probabilities by their sum; use true, "
            "or target own"
        )
    return reasons


def qwen3_5_moe_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the text model's own."""
    unknown = ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob", "intermediate_size")
    fields = {name: value for name, value in qwen3_next_fields(config).items() if name not in unknown}
    return fields | {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": QWEN3_5_MOE_TYPE}


def _plain_delta_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    options, theirs = delta_options(config), f"{layer}linear_attn."
    keys, values = options.key_heads() * options.key_dim(), options.num_heads * options.value_dim()
    # q, k and v together; beta, decay and gate apart.
    names = tuple(f"{theirs}in_proj_{part}.weight" for part in ("qkv", "b", "a", "z"))
    sizes = (keys, keys, values, options.num_heads, options.num_heads, values)
    yield RowsEntry(f"{ours}in_proj.weight", names, sizes=sizes, takes=((0, 1, 2), (3,), (4,), (5,)))
    yield from scan_entries(ours, theirs)


def qwen3_5_moe_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    return qwen3_next_map(config, _plain_delta_entries)


CLASS = HfTarget(
    name="qwen3_5_moe",
    model_type=QWEN3_5_MOE_TYPE,
    class_name="Qwen3_5MoeForCausalLM",
    unfit=unfit_for_qwen3_5_moe,
    fields=qwen3_5_moe_fields,
    read=model_config_from_qwen3_next,
    weights=qwen3_5_moe_map,
    unfit_tokenizer=partial(needs_byte_level, "qwen3_5_moe", "qwen3_next"),
    limits=limits,
)


TEXT_NAME = "qwen3_5_text"
# Of qwen3_next, and not of this class.
TEXT_UNKNOWN = ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob", "num_experts")


def unfit_for_qwen3_5_text(config: ModelConfig) -> list[str]:
    """Every choice that the class cannot hold: what qwen3_next cannot, and experts."""
    reasons = [reason.replace("qwen3_next", TEXT_NAME) for reason in unfit_for_qwen3_next(config)]
    if "E" in config.letters:
        rule = f"layers of {TEXT_NAME} are dense; use - in place of E, target qwen3_5_moe or own"
        reasons.append(f"model.pattern={config.pattern}: {rule}")
    return reasons


def qwen3_5_text_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the text model's own."""
    fields = {name: value for name, value in qwen3_next_fields(config).items() if name not in TEXT_UNKNOWN}
    return fields | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": TEXT_NAME}


TEXT_CLASS = replace(
    CLASS,
    name="qwen3_5_text",
    model_type=TEXT_NAME,
    class_name="Qwen3_5ForCausalLM",
    unfit=unfit_for_qwen3_5_text,
    fields=qwen3_5_text_fields,
    unfit_tokenizer=partial(needs_byte_level, TEXT_NAME, "qwen3_next"),
)
