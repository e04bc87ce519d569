"""Dense Qwen3 (transformers 5.24, `models/qwen3`) as a class to export to; amfm reads it, and so has its map of weights."""

from __future__ import annotations

from typing import Any

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.dense import dense_map, model_config_from_dense
from amfm.model.huggingface.fields import flat_rope_fields, rope_parameters, unfit_gates, unfit_multipliers
from amfm.model.huggingface.hf_class import HfTarget


def fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that are the class's own."""
    assert config.attention is not None and config.feed_forward is not None, "`unfit` asks for both"
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": len(config.letters) // 2,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads,
        "head_dim": config.attention.head_dim,
        "intermediate_size": config.feed_forward.hidden_size,
        "rope_parameters": rope_parameters(config.attention),
    } | flat_rope_fields(rope_parameters(config.attention))


def unfit(config: ModelConfig) -> list[str]:
    """Every choice that the class cannot hold: what its own reader would not give back."""
    reasons = unfit_multipliers(config, "qwen3") + unfit_gates(config, "qwen3")
    attention, feed_forward = config.attention, config.feed_forward
    if "".join(config.letters) != "*-" * (len(config.letters) // 2) or attention is None or feed_forward is None:
        return [*reasons, "model.pattern: layers of qwen3 are * and then -; use (*-)xN, or target own"]
    if (
        not attention.qk_norm
        or attention.positions != "rope"
        or attention.rope.fraction != 1
        or attention.softmax_scale
    ):
        reasons.append(
            "model.attention: qwen3 norms queries and keys and rotates whole heads; use qk_norm and rope, or own"
        )
    if feed_forward.activation != "swiglu" or feed_forward.linear_kind != "dense":
        reasons.append("model.feed_forward: that of qwen3 is gated and dense; use activation=swiglu, or target own")
    return reasons


TARGET = HfTarget(
    name="qwen3_dense",  # type: ignore[arg-type]
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    read=model_config_from_dense,
    weights=dense_map,
    fields=fields,
    unfit=unfit,
)
