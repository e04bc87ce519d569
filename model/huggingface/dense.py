"""Dense softmax transformers that we read and do not write: Llama and Qwen3, the teachers of conversions.

Read from transformers 5.24 (`models/llama`, `models/qwen3`). Every layer is attention with rotary positions and a gated
feed-forward; Qwen3 norms each query and key head. Their halves of a head are paired as ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightEntry, WeightMap
from amfm.model.huggingface.fields import read_sizes, require_fields, rope_from_parameters
from amfm.model.huggingface.qwen3_next_weights import GatedEntry


def model_config_from_dense(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    Raises ValueError where the class uses something that our model does not have: biases, sliding windows, other activations
    and ways of stretching positions.
    """
    require_fields(
        fields, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
    )
    heads = fields["num_attention_heads"]
    return ModelConfig(
        pattern=f"(*-)x{fields['num_hidden_layers']}",
        **read_sizes(fields),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=fields["num_key_value_heads"],
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            qk_norm=fields["model_type"] == "qwen3",
            positions="rope",
            rope=rope_from_parameters(fields.get("rope_parameters") or {}),
        ),
        feed_forward=FeedForwardConfig(hidden_size=fields["intermediate_size"], activation="swiglu"),
    )


def dense_map(config: ModelConfig) -> WeightMap:
    """Build the map between our names and those of both classes, which have the same."""
    entries = [WeightEntry("embedding.weight", ("model.embed_tokens.weight",))]
    assert config.attention is not None, "a dense transformer has attention"
    names = ["q_proj", "k_proj", "v_proj", "o_proj", *(["q_norm", "k_norm"] if config.attention.qk_norm else [])]
    for index in range(0, len(config.letters), 2):
        layer = f"model.layers.{index // 2}."
        attention, feed_forward = f"blocks.{index}", f"blocks.{index + 1}"
        entries.append(WeightEntry(f"{attention}.norm.weight", (f"{layer}input_layernorm.weight",)))
        entries += [
            WeightEntry(f"{attention}.mixer.{name}.weight", (f"{layer}self_attn.{name}.weight",)) for name in names
        ]
        entries.append(WeightEntry(f"{feed_forward}.norm.weight", (f"{layer}post_attention_layernorm.weight",)))
        halves = (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight")
        entries.append(GatedEntry(f"{feed_forward}.mixer.up_proj.weight", halves))
        entries.append(WeightEntry(f"{feed_forward}.mixer.down_proj.weight", (f"{layer}mlp.down_proj.weight",)))
    entries.append(WeightEntry("final_norm.weight", ("model.norm.weight",)))
    if not config.tie_embeddings:
        entries.append(WeightEntry("head.weight", ("lm_head.weight",)))
    return WeightMap(tuple(entries), {})
