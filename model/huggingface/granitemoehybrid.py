"""What config.json of transformers' `granitemoehybrid` says of a model, and the model that it describes.

Read from transformers 5.24 (`configuration_granitemoehybrid.py`). Its multipliers are ours: `attention_multiplier` is the
scale of the softmax, and `logits_scaling` divides where ours multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amfm.model.config.schema import (
    AttentionConfig,
    FeedForwardConfig,
    Mamba2Config,
    ModelConfig,
    MoeConfig,
    MultipliersConfig,
    RopeConfig,
)
from amfm.model.huggingface.fields import (
    LAYER_NAMES,
    flat_rope_fields,
    letters_of,
    require_fields,
    rope_from_parameters,
    rope_parameters,
)


def granite_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    letters = config.letters
    mixers = letters[0::2]
    fields: dict[str, Any] = {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": len(mixers),
        "layer_types": [LAYER_NAMES[letter] for letter in mixers],
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "embedding_multiplier": config.multipliers.embedding,
        "residual_multiplier": config.multipliers.residual,
        "logits_scaling": _divisor(config.multipliers.logits),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mamba_proj_bias": False,
        # None of ours: dt is below 1e30, and JSON cannot spell infinity. mlx-lm would keep dt at 0.001 or more.
        "time_step_limit": [0.0, 1e30],
        # As the released models say it: to mlx-lm every other value is "rope", and the base has to be there.
        "position_embedding_type": "nope",
        "rope_theta": 10_000.0,
        # A model without Mamba2 or attention still needs sizes that the class accepts.
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "attention_multiplier": 1.0,
        "mamba_n_heads": 1,
        "mamba_d_head": config.hidden_size,
        "mamba_expand": 1,
    }
    if config.moe is not None:
        fields |= {
            "num_local_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "intermediate_size": config.moe.expert_hidden_size,
            "shared_intermediate_size": config.moe.shared_expert_hidden_size or 1,
        }
    elif config.feed_forward is not None:
        fields |= {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "intermediate_size": config.feed_forward.hidden_size,
            "shared_intermediate_size": config.feed_forward.hidden_size,
        }
    if config.attention is not None:
        fields |= _granite_attention_fields(config.attention)
    if config.mamba is not None:
        mamba = config.mamba
        fields |= {
            "mamba_n_heads": mamba.num_heads,
            "mamba_d_head": mamba.head_dim,
            "mamba_expand": mamba.inner_size() // config.hidden_size,
            "mamba_d_state": mamba.state_size,
            "mamba_n_groups": mamba.num_groups,
            "mamba_d_conv": mamba.conv_kernel,
            "mamba_conv_bias": mamba.conv_bias,
            "mamba_chunk_size": mamba.chunk_size,
        }
    return fields


def _divisor(multiplier: float) -> float:
    """1 / multiplier to 12 digits, so that a whole divisor comes back whole."""
    return float(f"{1.0 / multiplier:.12g}")


def _granite_attention_fields(attention: AttentionConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        # The class multiplies by this and defaults to 1.
        "attention_multiplier": attention.softmax_scale or attention.head_dim**-0.5,
    }
    if attention.positions == "none":
        return fields
    rope = rope_parameters(attention)
    return fields | {"position_embedding_type": "rope", "rope_parameters": rope} | flat_rope_fields(rope)


def model_config_from_granite(fields: Mapping[str, Any]) -> ModelConfig:
    """Our configuration from config.json with the class's defaults filled in; ValueError for what our model has not."""
    require_fields(
        fields,
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "mamba_proj_bias": False,
        },
    )
    mixers = letters_of(list(fields["layer_types"]))
    second = "E" if fields["num_local_experts"] else "-"
    return ModelConfig(
        pattern="".join(mixer + second for mixer in mixers),
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        norm_epsilon=fields["rms_norm_eps"],
        tie_embeddings=fields["tie_word_embeddings"],
        initializer_range=fields["initializer_range"],
        multipliers=MultipliersConfig(
            embedding=fields.get("embedding_multiplier", 1.0),
            residual=fields.get("residual_multiplier", 1.0),
            logits=1.0 / fields.get("logits_scaling", 1.0),
        ),
        mamba=Mamba2Config(
            num_heads=fields["mamba_n_heads"],
            head_dim=fields["mamba_d_head"],
            state_size=fields["mamba_d_state"],
            num_groups=fields["mamba_n_groups"],
            conv_kernel=fields["mamba_d_conv"],
            conv_bias=fields["mamba_conv_bias"],
            chunk_size=fields["mamba_chunk_size"],
        )
        if "M" in mixers
        else None,
        attention=_granite_attention(fields) if "*" in mixers else None,
        feed_forward=FeedForwardConfig(hidden_size=fields["shared_intermediate_size"], activation="swiglu")
        if second == "-"
        else None,
        moe=MoeConfig(
            num_experts=fields["num_local_experts"],
            top_k=fields["num_experts_per_tok"],
            expert_hidden_size=fields["intermediate_size"],
            shared_expert_hidden_size=fields["shared_intermediate_size"],
            activation="swiglu",
            router="softmax",
            normalize_probabilities=True,
        )
        if second == "E"
        else None,
    )


def _granite_attention(fields: Mapping[str, Any]) -> AttentionConfig:
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    scale = float(fields["attention_multiplier"])
    rope = RopeConfig()
    if fields["position_embedding_type"] == "rope":
        rope = rope_from_parameters(fields.get("rope_parameters") or {})
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=head_dim,
        positions="rope" if fields["position_embedding_type"] == "rope" else "none",
        rope=rope,
        softmax_scale=None if scale == head_dim**-0.5 else scale,
    )
