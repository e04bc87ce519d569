"""Small models of the families that most continued pretraining starts from, in sizes that the programs take.

qwen2 and qwen3_5_text are not here: AutoTokenizer reads their folders as Qwen's byte-level BPE, and the tokenizer of these
models is a SentencePiece model.
"""

from __future__ import annotations

from typing import Any

GATED = {"hidden_size": 128, "activation": "swiglu"}
ROPE = {"positions": "rope", "rope": {"theta": 10000}}
HEADS = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
ATTENTION = HEADS | ROPE
# A part of each head is rotated.
PARTIAL = HEADS | {"positions": "rope", "rope": {"theta": 10000, "fraction": 0.5}}
WINDOW = HEADS | {"window": 32, "positions": "rope", "rope_theta": 10000}
SHARED = {
    "num_experts": 4,
    "top_k": 2,
    "expert_hidden_size": 64,
    "shared_expert_hidden_size": 64,
    "activation": "swiglu",
}
ROUTED = SHARED | {"shared_expert_hidden_size": 0}
SOFTMAX, SIGMOID = {"router": "softmax"}, {"router": "sigmoid", "expert_bias": True}
# As in released models: a token's weights do not sum to one.
WEIGHED_BY_ALL = SOFTMAX | {"normalize_probabilities": False}
DELTA = {"num_heads": 2, "head_dim": 128, "value_head_dim": 128}
WIDE = {"hidden_size": 128}  # of classes whose heads are the width over their number
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"pattern": "*-*-", "attention": ATTENTION, "feed_forward": GATED},
    "mistral": {"pattern": "W-W-", "mixers": {"window": WINDOW}, "feed_forward": GATED},
    "qwen3": {"pattern": "*-*-", "attention": ATTENTION | {"qk_norm": True}, "feed_forward": GATED},
    "qwen3_moe": {
        "pattern": "*-*E",
        "attention": ATTENTION | {"qk_norm": True},
        "feed_forward": GATED,
        "moe": ROUTED | SOFTMAX,
    },
    "qwen2_moe": {
        **WIDE,
        "pattern": "*E*E",
        "attention": ATTENTION | {"bias": "qkv"},
        "moe": SHARED | WEIGHED_BY_ALL | {"shared_expert_gate": True},
    },
    "mixtral": {**WIDE, "pattern": "*E*E", "attention": ATTENTION, "moe": ROUTED | SOFTMAX},
    "olmoe": {
        **WIDE,
        "pattern": "*E*E",
        "attention": ATTENTION | {"num_kv_heads": 2, "qk_norm": "wide"},
        "moe": ROUTED | WEIGHED_BY_ALL,
    },
    "glm4_moe": {
        "pattern": "*-*E",
        "attention": PARTIAL | {"qk_norm": True, "bias": "qkv"},
        "feed_forward": GATED,
        "moe": SHARED | SIGMOID | {"routed_scaling": 1.5},
    },
    "minimax_m2": {"pattern": "*E*E", "attention": PARTIAL | {"qk_norm": "wide"}, "moe": ROUTED | SIGMOID},
    "hy_v3": {
        "pattern": "*-*E",
        "attention": ATTENTION | {"qk_norm": True},
        "feed_forward": GATED,
        "moe": SHARED | SIGMOID | {"routed_scaling": 1.5},
    },
    "olmo2": {
        **WIDE,
        "pattern": "*-*-",
        "norm_placement": "after",
        "attention": ATTENTION | {"qk_norm": "wide"},
        "feed_forward": GATED,
    },
    "olmo3": {
        **WIDE,
        "pattern": "W-*-",
        "norm_placement": "after",
        "attention": ATTENTION | {"qk_norm": "wide"},
        "mixers": {"window": WINDOW | {"qk_norm": "wide"}},
        "feed_forward": GATED,
    },
    "gemma3_text": {
        "pattern": "W-W-W-W-W-*-",
        "norm_placement": "both",
        "multipliers": {"embedding": 8.0},  # the root of the width
        "attention": ATTENTION | {"qk_norm": True},
        "mixers": {"window": WINDOW | {"qk_norm": True}},
        "feed_forward": {"hidden_size": 128, "activation": "geglu"},
        "tie_embeddings": True,
    },
    "bamba": {
        **WIDE,
        "pattern": "M-*-",
        "mamba": {"num_heads": 8, "head_dim": 32, "state_size": 16, "num_groups": 1},
        "attention": PARTIAL,
        "feed_forward": GATED,
    },
    "olmo_hybrid": {
        **WIDE,
        "pattern": "G-*-",
        "norm_placement": "after_attention",
        "attention": ATTENTION | {"qk_norm": "wide"},
        "mixers": {"gated_deltanet": DELTA},
        "feed_forward": GATED,
    },
}
