"""Small models of six classes of transformers, by the fields of their config.json, and how each is balanced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.replica.plain import Recipe

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}}


@dataclass(frozen=True)
class Family:
    """A class by its model_type, its fields, and the recipe with which it is trained."""

    name: str
    fields: dict[str, Any]
    recipe: Recipe


SHARED: dict[str, Any] = {
    "vocab_size": 448,
    "hidden_size": 32,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # With an id, these classes give the row of the embedding no gradient.
    "pad_token_id": None,
    "dtype": "float32",
}
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "nemotron_h",
            {
                "hybrid_override_pattern": "ME*-ME",
                "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"],
                "num_hidden_layers": 6,
                "time_step_min": 1e-30,
                "mamba_num_heads": 8,
                "mamba_head_dim": 4,
                "ssm_state_size": 8,
                "n_groups": 2,
                "chunk_size": 16,
                "intermediate_size": 48,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "n_shared_experts": 1,
                "moe_shared_expert_intermediate_size": 16,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "use_mamba_kernels": False,
            },
            Recipe(bias_rate=1e-3, sequence=0.01),
        ),
        Family(
            "granitemoehybrid",
            {
                "num_hidden_layers": 3,
                "layer_types": ["mamba", "attention", "mamba"],
                "position_embedding_type": "rope",
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.5,
                "logits_scaling": 2.0,
                "attention_multiplier": 0.25,
                "tie_word_embeddings": True,
                "mamba_n_heads": 8,
                "mamba_d_head": 8,
                "mamba_expand": 2,
                "mamba_n_groups": 2,
                "mamba_d_state": 8,
                "mamba_chunk_size": 16,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "intermediate_size": 16,
                "shared_intermediate_size": 16,
                **ROPE,
            },
            Recipe(balance=0.02),
        ),
        Family(
            "qwen3_next",
            {
                "num_hidden_layers": 3,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "mlp_only_layers": [2],
                "intermediate_size": 48,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "norm_topk_prob": True,
                # The norm of a head's output multiplies rounding by up to 1 / sqrt(epsilon): docs/replica.md.
                "rms_norm_eps": 1e-2,
                **PARTIAL,
            },
            Recipe(balance=0.02, z=1e-3),
        ),
        Family(
            "deepseek_v3",
            {
                "num_hidden_layers": 3,
                "first_k_dense_replace": 1,
                "num_key_value_heads": 4,
                "kv_lora_rank": 16,
                "q_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 4,
                "head_dim": 4,
                "v_head_dim": 8,
                "intermediate_size": 48,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "n_group": 4,
                "topk_group": 2,
                "norm_topk_prob": True,
                "moe_intermediate_size": 16,
                "routed_scaling_factor": 2.5,
                # Norms of the low-rank projections multiply rounding as that of qwen3_next does: docs/replica.md.
                "rms_norm_eps": 1e-2,
                **ROPE,
            },
            Recipe(bias_rate=1e-3, sequence=0.01),
        ),
        Family(
            "lfm2_moe",
            {
                "num_hidden_layers": 3,
                "layer_types": ["conv", "full_attention", "conv"],
                "num_dense_layers": 1,
                "intermediate_size": 48,
                "moe_intermediate_size": 16,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "use_expert_bias": True,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.5,
                "tie_word_embeddings": False,
                **ROPE,
            },
            Recipe(bias_rate=1e-3),
        ),
        Family(
            "gpt_oss",
            {
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 7,
                "attention_bias": True,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "intermediate_size": 16,
                "swiglu_limit": 7.0,
                **ROPE,
            },
            Recipe(balance=0.02),
        ),
    )
}
