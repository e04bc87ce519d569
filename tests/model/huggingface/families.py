"""Small models of transformers' classes, with every setting that changes numbers away from the class's default."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0, "partial_rotary_factor": 0.25}}
# As Llama 3.1 has it, over a shorter text.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
LATENT = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "num_key_value_heads": 4,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
}
# The class rotates pairs in place, where rows must be even.
EVEN = {"kv_lora_rank": 12, "qk_nope_head_dim": 4}
DELTA = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
BAILING = {
    "num_experts": 8,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "num_shared_experts": 2,
    "num_expert_group": 4,
    "topk_group": 2,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "short_conv_kernel_size": 3,
    "kda_lower_bound": -2.0,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
}
LISTED = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
TIED = {"tie_word_embeddings": True}
# Class and settings by a name that begins with the class.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name.split(",")[0], changes)
    for name, changes in {
        "llama, biases, heads of another size, stretched": {
            "attention_bias": True,
            "head_dim": 16,
            "rope_parameters": LLAMA3,
            **TIED,
        },
        "mistral, windows, yarn": {"sliding_window": 5, "head_dim": 8, "rope_parameters": YARN},
        "mistral, all tokens": {"sliding_window": None, **ROPE},
        "qwen2, windows and attention": {**LISTED, **ROPE, **TIED},
        "qwen3, biases, windows and attention": {**LISTED, **ROPE, "head_dim": 8, "attention_bias": True},
        "qwen3, all tokens, tied, stretched": {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            **TIED,
        },
        "qwen3_moe, a dense layer, biases": {
            **EXPERTS,
            "head_dim": 8,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "attention_bias": True,
            "num_hidden_layers": 3,
            **ROPE,
        },
        "qwen3_moe, windows, tied": {**EXPERTS, "use_sliding_window": True, "sliding_window": 5, **TIED},
        "mixtral, windows": {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "head_dim": 8,
            **ROPE,
        },
        "mixtral, tied, heads by width": {"num_local_experts": 4, "num_experts_per_tok": 2, **TIED},
        "qwen2_moe, dense and sparse layers": {
            **EXPERTS,
            **LISTED,
            **ROPE,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 12,
        },
        "qwen2_moe, no biases, tied": {**EXPERTS, "qkv_bias": False, "shared_expert_intermediate_size": 20, **TIED},
        "glm4_moe, groups, norms and biases": {
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_shared_experts": 2,
            "n_group": 3,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.7,
            "use_qk_norm": True,
            "attention_bias": True,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "head_dim": 8,
            **PARTIAL,
        },
        "glm4_moe, sparse alone, tied": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 0,
            "head_dim": 16,
            **TIED,
        },
        "hy_v3, biases": {
            **EXPERTS,
            "num_shared_experts": 2,
            "router_scaling_factor": 1.3,
            "attention_bias": True,
            "head_dim": 8,
            "mlp_layer_types": ["sparse", "dense"],
            **ROPE,
            **TIED,
        },
        "olmoe, biases": {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            **ROPE,
        },
        "olmoe, tied, llama3": {"num_experts": 4, "num_experts_per_tok": 2, "rope_parameters": LLAMA3, **TIED},
        "olmo2, biases, tied": {"attention_bias": True, **ROPE, **TIED},
        "olmo3, windows and attention, each with its rotation": {
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "rope_parameters": {"sliding_attention": ROPE["rope_parameters"], "full_attention": YARN},
        },
        "bamba, biases, groups": {
            "attn_layer_indices": [1],
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            **MAMBA,
            "mamba_conv_bias": False,
            "attention_bias": True,
            **ROPE,
            **TIED,
        },
        "qwen3_5_text, tied": {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 8,
            **DELTA,
            **PARTIAL,
            **TIED,
        },
        "deepseek_v2, groups, latent queries": {
            **LATENT,
            **EVEN,
            "q_lora_rank": 9,
            "n_group": 3,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "rope_parameters": YARN,
        },
        "deepseek_v2, greedy, tied": {**LATENT, **EVEN, "q_lora_rank": None, **ROPE, **TIED},
        "glm_moe_dsa, few keys": {
            **LATENT,
            "q_lora_rank": 9,
            "n_group": 3,
            "topk_group": 2,
            "index_topk": 7,
            "index_head_dim": 12,
            "index_n_heads": 16,
            "norm_topk_prob": False,
            **ROPE,
        },
        "bailing_hybrid, bounded decays, groups, latent queries": {
            **BAILING,
            "q_lora_rank": 9,
            "moe_renormalize": False,
            "routed_scaling_factor": 1.7,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": YARN,
        },
        "bailing_hybrid, decays without a bound, no latent queries": {
            **BAILING,
            "kda_safe_gate": False,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["sparse", "dense"],
            **ROPE,
        },
        "olmo_hybrid, biases, beta above 1, no positions": {
            **DELTA,
            "linear_value_head_dim": 3,
            "layer_types": ["linear_attention", "full_attention"],
            "attention_bias": True,
            "rope_parameters": None,
            **TIED,
        },
        "olmo_hybrid, rotated, beta below 1": {
            **DELTA,
            "linear_value_head_dim": 3,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "linear_allow_neg_eigval": False,
            **ROPE,
        },
        "gemma3_text, windows and attention, biases, tied": {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 5,
            "head_dim": 8,
            "query_pre_attn_scalar": 24,
            "attention_bias": True,
            "rope_parameters": {
                "sliding_attention": ROPE["rope_parameters"],
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
            },
        },
        "gemma3_text, attention alone, own head": {
            "layer_types": ["full_attention", "full_attention"],
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": False,
        },
        "minimax_m2, a part of heads rotated": {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            **PARTIAL,
            **TIED,
        },
    }.items()
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
# Near, but not equal: class, settings and the message.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"mlp_bias": True}, "mlp_bias=True cannot be imported"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu cannot be imported"),
    ("llama", DYNAMIC, "rope_type=dynamic cannot be imported"),
    ("llama", PARTIAL, "partial_rotary_factor=0.25 cannot be imported"),
    ("mistral", {"sliding_window": 5, "rope_parameters": LLAMA3}, "rope_type=llama3 cannot be imported with sliding"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act=gelu cannot be imported"),
    ("qwen3", DYNAMIC, "rope_type=dynamic cannot be imported"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 cannot be imported"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 cannot be imported"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 cannot be imported"),
    ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts=0 cannot be imported"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 cannot be imported"),
    ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 cannot be imported"),
    ("olmo2", {"hidden_act": "gelu"}, "hidden_act=gelu cannot be imported"),
    ("olmo3", {"rope_parameters": {"sliding_attention": LLAMA3, "full_attention": YARN}}, "rope_type=llama3 cannot be"),
    ("bamba", {**MAMBA, "mamba_proj_bias": True}, "mamba_proj_bias=True cannot be imported"),
    ("bamba", {**MAMBA, "time_step_limit": (0.01, 1.0)}, r"time_step_limit=\(0.01, 1.0\) cannot be imported"),
    ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation=silu cannot be imported"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 cannot be imported"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 cannot be imported"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True cannot be imported"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": LINEAR, "full_attention": LINEAR}},
        "rope_type=linear cannot be imported with sliding",
    ),
    ("deepseek_v2", {**LATENT, "rope_parameters": LINEAR}, "rope_type=linear cannot be imported with latent attention"),
    ("qwen3_5_text", {"hidden_act": "gelu"}, "hidden_act=gelu cannot be imported"),
    ("deepseek_v2", {**LATENT, "topk_method": "noaux"}, "topk_method=noaux cannot be imported"),
    ("glm_moe_dsa", {**LATENT, "indexer_types": ["full", "shared"]}, r"indexer_types=\['full', 'shared'\] cannot"),
    ("bailing_hybrid", {**BAILING, "attention_bias": True}, "attention_bias=True cannot be imported"),
    ("olmo_hybrid", {"hidden_act": "gelu"}, "hidden_act=gelu cannot be imported"),
    ("hy_v3", {"mlp_bias": True}, "mlp_bias=True cannot be imported"),
]


def class_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json with the defaults of its class filled in."""
    from transformers import AutoConfig

    rest = {name: value for name, value in fields.items() if name != "model_type"}
    return dict(AutoConfig.for_model(fields["model_type"], **rest).to_dict())


def made_by_transformers(kind: str, changes: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """A random model of the class, whose every part matters, and the tensors that transformers saves of it."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **deepcopy(SIZES | changes))  # which it writes defaults into
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * torch.randn_like(tensor))
            elif name.endswith("A_log"):
                # The first values of some heads forget all within a token, and their gradients are rounding.
                tensor.copy_(0.5 * torch.randn_like(tensor))
            elif not name.endswith(("inv_freq", "embed_scale")):
                tensor.add_((0.2 if "norm" in name else 0.1) * torch.randn_like(tensor))
                # In bf16, as releases: norms that a class stores as an offset from 1 come back whole.
                tensor.copy_(tensor.bfloat16())
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")
