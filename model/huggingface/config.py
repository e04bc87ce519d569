"""The config.json of each export target from our ModelConfig, and our ModelConfig from a config.json.

Fields were read from transformers 5.24 (`configuration_nemotron_h.py`, `configuration_granitemoehybrid.py`); those of
qwen3_next are in `huggingface_qwen3_next.py`. Layer names
are written in the older spelling (`mamba`, `attention`), which both older and newer readers take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config.pattern import SECTIONS
from model.config.schema import AttentionConfig, FeedForwardConfig, Mamba2Config, ModelConfig, MoeConfig, RopeConfig
from model.huggingface.fields import require_fields, rope_from_parameters, rope_parameters
from model.huggingface.qwen3_next import model_config_from_qwen3_next, qwen3_next_fields
from model.huggingface.targets import NATIVE_TARGETS, Target, registered_mixers

OWN_MODEL_TYPE = "amfm"
# The class clamps dt at run time to at least `time_step_min`; training does not. 0 fails in its initialisation (log).
# `time_step_limit` is left at its default (0, infinity), which JSON cannot spell.
NO_CLAMP_TIME_STEP = 1e-30
NEMOTRON_H_NAMES = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
LETTERS_OF_NAMES = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}


@dataclass(frozen=True)
class TokenIds:
    """Special ids of the tokenizer; None: it has none."""

    bos: int | None
    eos: int | None
    pad: int | None


def huggingface_config(
    config: ModelConfig, target: Target, tokens: TokenIds, *, max_position_embeddings: int
) -> dict[str, Any]:
    """config.json as a dict, for weights in float32. The configuration must fit the target (`explain_unfit`)."""
    config = _drop_unused_sections(config)
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "dtype": "float32",
        "use_cache": True,
    }
    if target == "nemotron_h":
        return fields | _nemotron_h_fields(config)
    if target == "granitemoehybrid":
        return fields | _granite_fields(config)
    if target == "qwen3_next":
        return fields | qwen3_next_fields(config)
    return fields | _own_fields(config)


def _drop_unused_sections(config: ModelConfig) -> ModelConfig:
    """Without the sections whose letter the pattern lacks: config.json must not depend on what nothing reads."""
    letters = config.letters
    used = {name: getattr(config.mixers, name) for name in registered_mixers(config).values()}
    unused = {name: None for letter, name in SECTIONS.items() if letter not in letters}
    return config.model_copy(update=unused | {"mixers": type(config.mixers)(**used)})


def _nemotron_h_fields(config: ModelConfig) -> dict[str, Any]:
    letters = config.letters
    fields: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "".join(letters),
        "layers_block_type": [NEMOTRON_H_NAMES[letter] for letter in letters],
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": False,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "use_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "residual_in_fp32": config.residual_in_fp32,
        "rescale_prenorm_residual": False,
        "time_step_min": NO_CLAMP_TIME_STEP,
    }
    if config.mamba is not None:
        mamba = config.mamba
        fields |= {
            "mamba_num_heads": mamba.num_heads,
            "mamba_head_dim": mamba.head_dim,
            "ssm_state_size": mamba.state_size,
            "n_groups": mamba.num_groups,
            "conv_kernel": mamba.conv_kernel,
            "use_conv_bias": mamba.conv_bias,
            "chunk_size": mamba.chunk_size,
            "mamba_hidden_act": "silu",
        }
    if config.attention is not None:
        fields |= {
            "num_attention_heads": config.attention.num_heads,
            "num_key_value_heads": config.attention.num_kv_heads,
            "head_dim": config.attention.head_dim,
        }
    if config.feed_forward is not None:
        fields["intermediate_size"] = config.feed_forward.hidden_size
    if config.moe is not None:
        moe = config.moe
        fields |= {
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_hidden_size,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": moe.shared_expert_hidden_size or 1,
            "moe_latent_size": moe.latent_size,
            "n_group": moe.num_router_groups,
            "topk_group": moe.router_group_top_k,
            "norm_topk_prob": moe.normalize_probabilities,
            "routed_scaling_factor": moe.routed_scaling,
        }
    return fields


def _granite_fields(config: ModelConfig) -> dict[str, Any]:
    letters = config.letters
    mixers = letters[0::2]
    fields: dict[str, Any] = {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": len(mixers),
        "layer_types": [NEMOTRON_H_NAMES[letter] for letter in mixers],
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mamba_proj_bias": False,
        "position_embedding_type": None,
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


def _granite_attention_fields(attention: AttentionConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        # The class multiplies by this and defaults to 1.
        "attention_multiplier": attention.softmax_scale or attention.head_dim**-0.5,
    }
    if attention.positions == "none":
        return fields
    return fields | {"position_embedding_type": "rope", "rope_parameters": rope_parameters(attention)}


def _own_fields(config: ModelConfig) -> dict[str, Any]:
    letters = config.letters
    return {
        "architectures": ["AmfmForCausalLM"],
        "model_type": OWN_MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_amfm.AmfmConfig",
            "AutoModelForCausalLM": "modeling_amfm.AmfmForCausalLM",
        },
        "num_hidden_layers": len(letters),
        "tie_word_embeddings": config.tie_embeddings,
        "pattern": "".join(letters),
        "norm_epsilon": config.norm_epsilon,
        "mamba": config.mamba.model_dump() if config.mamba else None,
        "attention": config.attention.model_dump() if config.attention else None,
        "moe": config.moe.model_dump() if config.moe else None,
        "feed_forward": config.feed_forward.model_dump() if config.feed_forward else None,
        "mixers": {name: getattr(config.mixers, name).model_dump() for name in registered_mixers(config).values()},
    }


def model_config_from_huggingface(fields: Mapping[str, Any]) -> ModelConfig:
    """Our configuration of a model in one of the classes that we export to.

    `fields` is config.json with the class's defaults filled in. What config.json does not say (initialisation, loss
    weights) gets our defaults. Raises ValueError where the class uses something that our model does not have.
    """
    kind = fields.get("model_type")
    if kind == "nemotron_h":
        return _from_nemotron_h(fields)
    if kind == "granitemoehybrid":
        return _from_granite(fields)
    if kind == "qwen3_next":
        return model_config_from_qwen3_next(fields)
    if kind == OWN_MODEL_TYPE:
        return _from_own(fields)
    known = ", ".join([*NATIVE_TARGETS, OWN_MODEL_TYPE])
    raise ValueError(f"config.json: model_type={kind} cannot be imported; use one of {known}")


def _letters(names: list[str]) -> list[str]:
    unknown = sorted(set(names) - set(LETTERS_OF_NAMES))
    if unknown:
        raise ValueError(f"config.json: layer kinds {unknown} cannot be imported; known are {sorted(LETTERS_OF_NAMES)}")
    return [LETTERS_OF_NAMES[name] for name in names]


def _from_nemotron_h(fields: Mapping[str, Any]) -> ModelConfig:
    no_bias = {"use_bias": False, "mlp_bias": False, "attention_bias": False, "mamba_proj_bias": False}
    require_fields(fields, no_bias | {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "sliding_window": None})
    names = fields.get("layers_block_type") or fields.get("layer_types")
    letters = _letters(list(names)) if names else list(fields["hybrid_override_pattern"])
    return ModelConfig(
        pattern="".join(letters),
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        norm_epsilon=fields["layer_norm_epsilon"],
        tie_embeddings=False,
        initializer_range=fields["initializer_range"],
        residual_in_fp32=fields.get("residual_in_fp32", False),
        mamba=Mamba2Config(
            num_heads=fields["mamba_num_heads"],
            head_dim=fields["mamba_head_dim"],
            state_size=fields["ssm_state_size"],
            num_groups=fields["n_groups"],
            conv_kernel=fields["conv_kernel"],
            conv_bias=fields["use_conv_bias"],
            chunk_size=fields["chunk_size"],
        )
        if "M" in letters
        else None,
        attention=AttentionConfig(
            num_heads=fields["num_attention_heads"],
            num_kv_heads=fields["num_key_value_heads"],
            head_dim=fields["head_dim"],
        )
        if "*" in letters
        else None,
        feed_forward=FeedForwardConfig(hidden_size=fields["intermediate_size"], activation="squared_relu")
        if "-" in letters
        else None,
        moe=MoeConfig(
            num_experts=fields["n_routed_experts"],
            top_k=fields["num_experts_per_tok"],
            expert_hidden_size=fields["moe_intermediate_size"],
            shared_expert_hidden_size=fields["moe_shared_expert_intermediate_size"] or fields["intermediate_size"],
            activation="squared_relu",
            router="sigmoid",
            expert_bias=True,
            normalize_probabilities=fields["norm_topk_prob"],
            routed_scaling=float(fields["routed_scaling_factor"]),
            num_router_groups=fields["n_group"],
            router_group_top_k=fields["topk_group"],
            latent_size=fields["moe_latent_size"],
        )
        if "E" in letters
        else None,
    )


def _from_granite(fields: Mapping[str, Any]) -> ModelConfig:
    require_fields(
        fields,
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "mamba_proj_bias": False,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    )
    mixers = _letters(list(fields["layer_types"]))
    second = "E" if fields["num_local_experts"] else "-"
    return ModelConfig(
        pattern="".join(mixer + second for mixer in mixers),
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        norm_epsilon=fields["rms_norm_eps"],
        tie_embeddings=fields["tie_word_embeddings"],
        initializer_range=fields["initializer_range"],
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


def _from_own(fields: Mapping[str, Any]) -> ModelConfig:
    sections = {name: fields.get(name) for name in ("mamba", "attention", "moe", "feed_forward")}
    return ModelConfig.model_validate(
        {
            "pattern": fields["pattern"],
            "vocab_size": fields["vocab_size"],
            "hidden_size": fields["hidden_size"],
            "norm_epsilon": fields["norm_epsilon"],
            "tie_embeddings": fields["tie_word_embeddings"],
            "initializer_range": fields["initializer_range"],
            # Exports of earlier versions have none.
            "mixers": fields.get("mixers") or {},
            **sections,
        }
    )
