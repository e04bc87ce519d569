"""The transformers class `falcon_h1`: Mamba2 and attention side by side, then a gated feed-forward.

Read from transformers 5.24 (`configuration_falcon_h1.py`, `modeling_falcon_h1.py`). Every layer is `(M&*)` and `-`. Of the
class's fourteen multipliers those of embedding and logits are ours, and that of keys is our `softmax_scale`. The others are
written as 1, and a model that has them is rejected: each multiplies a matrix, and a map of weights reads no numbers of config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig
from amfm.model.config.schema import ModelConfig, MultipliersConfig
from amfm.model.huggingface.entries import CONV_FORMS, WeightEntry, WeightMap, paired_map
from amfm.model.huggingface.fields import (
    GATED,
    NO_QK_NORM,
    WHOLE_HEADS,
    Wanted,
    flat_rope_fields,
    mamba_fields,
    read_mamba,
    read_sizes,
    require_fields,
    rope_from_parameters,
    rope_parameters,
    unfit_settings,
)
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.qwen3_next_weights import GatedEntry
from amfm.model.huggingface.refusals import (
    IGNORED_ARGUMENTS,
    NO_CLASSIFIER,
    Refusal,
    misses_sentencepiece,
    norms_groups_together,
    packed_rows,
)
from amfm.model.shapes import block_shapes

HEADS = ("(M&*)", "(*&M)")
MULTIPLIERS: Wanted = {"residual": (1.0, "the output of a block has no factor")}
ATTENDING: Wanted = {
    **NO_QK_NORM,
    "positions": ("rope", "attention is rotary"),
    "gate": ("none", "attention has no gate"),
}
ONES: dict[str, Any] = {
    "mlp_multipliers": [1.0, 1.0],
    "attention_out_multiplier": 1.0,
    "attention_in_multiplier": 1.0,
    "ssm_multipliers": [1.0] * 5,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
}


def unfit_for_falcon_h1(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    if not (len(mixers) == len(seconds) and mixers[0] in HEADS and {*mixers} == {mixers[0]} and {*seconds} == {"-"}):
        rule = "layers of falcon_h1 are pairs, (M&*) and then -"
        return [f"model.pattern={''.join(letters)}: {rule}; use such a pattern, or target own"]
    attention = config.attention
    assert attention is not None, "every layer has all three"
    reasons = unfit_settings("model.multipliers", config.multipliers, "falcon_h1", MULTIPLIERS)
    reasons += unfit_settings("model.attention", attention, "falcon_h1", ATTENDING)
    reasons += unfit_settings("model.attention.rope", attention.rope, "falcon_h1", WHOLE_HEADS)
    return reasons + unfit_settings("model.feed_forward", config.feed_forward, "falcon_h1", GATED)


def falcon_h1_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    mamba, attention, dense = config.mamba, config.attention, config.feed_forward
    assert mamba is not None and attention is not None and dense is not None, "every layer has all three"
    rope = rope_parameters(attention)
    fields: dict[str, Any] = {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "num_hidden_layers": len(config.letters) // 2,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "intermediate_size": dense.hidden_size,
        "hidden_act": "silu",
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
        "projectors_bias": False,
        "mamba_d_ssm": mamba.inner_size(),
        **mamba_fields(mamba),
        "mamba_proj_bias": False,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        # JSON cannot spell infinity.
        "time_step_limit": [0.0, 1e30],
        "rope_parameters": rope,
        "embedding_multiplier": config.multipliers.embedding,
        "lm_head_multiplier": config.multipliers.logits,
        "key_multiplier": 1.0,
    }
    if attention.softmax_scale is not None:
        fields["key_multiplier"] = _rounded(attention.softmax_scale * attention.head_dim**0.5)
    return fields | ONES | flat_rope_fields(rope)


def _rounded(factor: float) -> float:
    """A factor to 12 digits, so that it comes back as it was."""
    return float(f"{factor:.12g}")


def model_config_from_falcon_h1(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    Raises ValueError if the class uses something that our model does not have.
    """
    require_fields(
        fields,
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "projectors_bias": False,
            "mamba_proj_bias": False,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            **ONES,
        },
    )
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    scale = float(fields["key_multiplier"])
    return ModelConfig(
        pattern=f"((M&*)-)x{fields['num_hidden_layers']}",
        **read_sizes(fields),
        multipliers=MultipliersConfig(embedding=fields["embedding_multiplier"], logits=fields["lm_head_multiplier"]),
        mamba=read_mamba(fields),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=fields["num_key_value_heads"],
            head_dim=head_dim,
            positions="rope",
            rope=rope_from_parameters(fields.get("rope_parameters") or {}),
            softmax_scale=None if scale == 1.0 else _rounded(scale * head_dim**-0.5),
        ),
        feed_forward=FeedForwardConfig(hidden_size=fields["intermediate_size"], activation="swiglu"),
    )


def falcon_h1_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    heads = {symbol: partial(_head_entries, symbol) for symbol in config.letters}
    norms = "input_layernorm", "pre_ff_layernorm"
    return paired_map(config, heads | {"-": _dense_entries}, norms=norms, final="final_layernorm")


def _head_entries(letter: str, config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    for number, symbol in enumerate(letter.strip("()").split("&")):
        place, theirs = f"{ours}branches.{number}.", "mamba" if symbol == "M" else "self_attn"
        for name in block_shapes(config, symbol):
            other, form = CONV_FORMS.get(name, (name, "same"))
            yield WeightEntry(place + name, (f"{layer}{theirs}.{other}",), form)


def _dense_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    halves = tuple(f"{layer}feed_forward.{name}_proj.weight" for name in ("gate", "up"))
    yield GatedEntry(f"{ours}up_proj.weight", halves)
    yield WeightEntry(f"{ours}down_proj.weight", (f"{layer}feed_forward.down_proj.weight",))


def falcon_h1_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject or misread a model of the class."""
    mamba, attention = config.mamba, config.attention
    assert mamba is not None and attention is not None, "every layer has both"
    found = misses_sentencepiece("falcon_h1", tokenizer_kind) + norms_groups_together(mamba.num_groups)
    if attention.softmax_scale is not None:
        rule = (
            f"model.attention.softmax_scale={attention.softmax_scale} silently produces different values, because it does not read "
            "key_multiplier; train without it for mlx-lm"
        )
        found.append(Refusal("mlx-lm", rule, misreads=True))
    return found


def limits(config: ModelConfig) -> list[str]:
    """What the class does not do."""
    return [packed_rows("Mamba2"), NO_CLASSIFIER, IGNORED_ARGUMENTS]


CLASS = HfTarget(
    name="falcon_h1",
    model_type="falcon_h1",
    class_name="FalconH1ForCausalLM",
    unfit=unfit_for_falcon_h1,
    fields=falcon_h1_fields,
    read=model_config_from_falcon_h1,
    weights=falcon_h1_map,
    refusals=falcon_h1_refusals,
    limits=limits,
)
