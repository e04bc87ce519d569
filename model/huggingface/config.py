"""Convert our ModelConfig to the config.json of each export target and back.

Fields were read from transformers 5.24 (`configuration_nemotron_h.py`); those of other classes are in `granitemoehybrid.py`,
`qwen3_next.py` and `latent_attention.py`. Layer names are written in the older spelling (`mamba`, `attention`), which both older and newer readers take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amfm.model.config.mup import without_mup
from amfm.model.config.pattern import SECTIONS
from amfm.model.config.schema import (
    AttentionConfig,
    FeedForwardConfig,
    Mamba2Config,
    ModelConfig,
    MoeConfig,
)
from amfm.model.huggingface.dense import model_config_from_dense
from amfm.model.huggingface.depths import depth_fields, depth_pattern
from amfm.model.huggingface.fields import LAYER_NAMES, letters_of, require_fields
from amfm.model.huggingface.granitemoehybrid import granite_fields, model_config_from_granite
from amfm.model.huggingface.latent_attention import LATENT_TARGETS, latent_fields, model_config_from_latent
from amfm.model.huggingface.qwen3_next import (
    QWEN3_5_MOE_TYPE,
    model_config_from_qwen3_next,
    qwen3_5_moe_fields,
    qwen3_next_fields,
)
from amfm.model.huggingface.targets import Source, Target, registered_mixers

OWN_MODEL_TYPE = "amfm"
TARGET_OF_TYPE: dict[str, Target] = {
    "nemotron_h": "nemotron_h",
    "granitemoehybrid": "granitemoehybrid",
    "qwen3_next": "qwen3_next",
    QWEN3_5_MOE_TYPE: "qwen3_5_moe",
    "kimi_linear": "kimi_linear",
    "deepseek_v3": "deepseek_v3",
    OWN_MODEL_TYPE: "own",
}
# What is read besides: classes that our models are not written as.
SOURCE_OF_TYPE: dict[str, Source] = {**TARGET_OF_TYPE, "llama": "llama", "qwen3": "qwen3"}
# The class clamps dt at run time to at least `time_step_min`; training does not. 0 fails in its initialisation (log).
# `time_step_limit` is left at its default (0, infinity), which JSON cannot spell.
NO_CLAMP_TIME_STEP = 1e-30


@dataclass(frozen=True)
class TokenIds:
    """Special ids of the tokenizer; None: it has none."""

    bos: int | None
    eos: int | None
    pad: int | None


def huggingface_config(
    config: ModelConfig, target: Target, tokens: TokenIds, *, max_position_embeddings: int
) -> dict[str, Any]:
    """Build config.json as a dict, for weights in float32. The configuration must fit the target (`explain_unfit`)."""
    config = _drop_unused_sections(without_mup(config))
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
        return fields | _nemotron_h_fields(config) | depth_fields(config, target)
    if target == "granitemoehybrid":
        return fields | granite_fields(config)
    if target == "qwen3_next":
        return fields | qwen3_next_fields(config) | depth_fields(config, target)
    if target == "qwen3_5_moe":
        return fields | qwen3_5_moe_fields(config)
    if target in LATENT_TARGETS:
        # The second name is what mlx-lm asks kimi_linear for.
        return fields | {"model_max_length": max_position_embeddings} | latent_fields(config, target)
    return fields | _own_fields(config)


def _drop_unused_sections(config: ModelConfig) -> ModelConfig:
    """Drop the sections whose letter the pattern lacks: config.json must not depend on what nothing reads."""
    letters = config.built_letters
    used = {name: getattr(config.mixers, name) for name in registered_mixers(config).values()}
    unused = {name: None for letter, name in SECTIONS.items() if letter not in letters}
    return config.model_copy(update=unused | {"mixers": type(config.mixers)(**used)})


def _nemotron_h_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of Nemotron-H; those of blocks that the pattern lacks are left to the class's defaults."""
    letters = config.letters
    fields: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "".join(letters),
        "layers_block_type": [LAYER_NAMES[letter] for letter in letters],
        # The class counts the names; llama.cpp's converter and mlx-lm ask for the number.
        "num_hidden_layers": len(letters),
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
        # mlx-lm asks for it where no layer has it, too.
        fields.setdefault("intermediate_size", moe.expert_hidden_size)
    return fields


def _own_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of our own class, whose code is exported beside the weights and loaded through `auto_map`."""
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
        "multipliers": config.multipliers.model_dump(),
        "mamba": config.mamba.model_dump() if config.mamba else None,
        "attention": config.attention.model_dump() if config.attention else None,
        "moe": config.moe.model_dump() if config.moe else None,
        "feed_forward": config.feed_forward.model_dump() if config.feed_forward else None,
        "mixers": {name: getattr(config.mixers, name).model_dump() for name in registered_mixers(config).values()},
    }


def model_config_from_huggingface(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from the config.json of one of the classes that we read.

    `fields` is config.json with the class's defaults filled in. What config.json does not say (initialisation, loss
    weights) gets our defaults. Raises ValueError where the class uses something that our model does not have.
    """
    kind = fields.get("model_type")
    if kind == "nemotron_h":
        return _from_nemotron_h(fields)
    if kind == "granitemoehybrid":
        return model_config_from_granite(fields)
    if kind in ("qwen3_next", QWEN3_5_MOE_TYPE):
        return model_config_from_qwen3_next(fields)
    if kind in LATENT_TARGETS:
        return model_config_from_latent(fields, kind)
    if kind in ("llama", "qwen3"):
        return model_config_from_dense(fields)
    if kind == OWN_MODEL_TYPE:
        return _from_own(fields)
    known = ", ".join(SOURCE_OF_TYPE)
    raise ValueError(f"config.json: model_type={kind} cannot be imported; use one of {known}")


def _from_nemotron_h(fields: Mapping[str, Any]) -> ModelConfig:
    no_bias = {"use_bias": False, "mlp_bias": False, "attention_bias": False, "mamba_proj_bias": False}
    require_fields(fields, no_bias | {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "sliding_window": None})
    names = fields.get("layers_block_type") or fields.get("layer_types")
    main = "".join(letters_of(list(names)) if names else list(fields["hybrid_override_pattern"]))
    letters = main + depth_pattern(fields, "nemotron_h")
    return ModelConfig(
        pattern=letters,
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


def _from_own(fields: Mapping[str, Any]) -> ModelConfig:
    """Invert `_own_fields`; validation checks what somebody may have edited."""
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
            "multipliers": fields.get("multipliers") or {},
            **sections,
        }
    )
