"""Small models of the classes that we export, and of our own class, in sizes that the programs take."""

from __future__ import annotations

from typing import Any

from benchmarks.clients.families import FAMILIES

EXPERTS = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 64, "shared_expert_hidden_size": 64}
SWIGLU_EXPERTS = EXPERTS | {"activation": "swiglu", "router": "softmax"}
MAMBA = {"num_heads": 4, "head_dim": 32, "state_size": 16, "num_groups": 1}
LATENT = {"num_heads": 2, "latent_size": 64, "nope_head_dim": 64, "rope_head_dim": 32, "value_head_dim": 64}
ATTENTION = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
SINKS = ATTENTION | {"bias": True, "sinks": True}
YARN = {"factor": 4.0, "original_length": 64, "truncate": False}
# Sizes that the programs take: heads of 64 in attention and 128 in Gated DeltaNet for vLLM, one group of Mamba2 for mlx-lm.
MODELS: dict[str, dict[str, Any]] = {
    "nemotron_h": {"pattern": "M-M*M-", "mamba": MAMBA, "attention": ATTENTION, "feed_forward": {"hidden_size": 128}},
    "nemotron_h with experts": {
        "pattern": "ME*EM-",
        "mamba": MAMBA,
        "attention": ATTENTION,
        "feed_forward": {"hidden_size": 128},
        "moe": EXPERTS | {"router": "sigmoid", "expert_bias": True},
    },
    "granitemoehybrid": {
        "pattern": "MEME*E",
        "hidden_size": 128,  # the class has no field for the size of heads
        "mamba": MAMBA | {"num_heads": 8},
        "attention": ATTENTION,
        "moe": SWIGLU_EXPERTS,
    },
    "qwen3_next": {
        "pattern": "GEGE*E",
        "mixers": {"gated_deltanet": {"num_heads": 2, "num_key_heads": 1, "head_dim": 128, "value_head_dim": 128}},
        "attention": ATTENTION
        | {"qk_norm": True, "gate": "element", "positions": "rope", "rope": {"theta": 10000, "fraction": 0.5}},
        "moe": SWIGLU_EXPERTS | {"shared_expert_gate": True},
    },
    "kimi_linear": {
        "pattern": "K-KEKE+E",
        "mixers": {
            "kda": {"num_heads": 2, "head_dim": 64},
            "mla": LATENT,
        },
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": EXPERTS | {"activation": "swiglu", "router": "sigmoid", "expert_bias": True},
    },
    "lfm2_moe": {
        "pattern": "C-*ECE",
        "hidden_size": 128,  # heads are its width over their number
        "tie_embeddings": True,  # mlx-lm has no head of its own
        "mixers": {"short_conv": {}},
        "attention": ATTENTION | {"qk_norm": True, "positions": "rope", "rope": {"theta": 10000}},
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": EXPERTS
        | {"activation": "swiglu", "router": "sigmoid", "expert_bias": True, "shared_expert_hidden_size": 0},
    },
    "lfm2": {
        "pattern": "C-*-",
        "hidden_size": 128,
        "tie_embeddings": True,
        "mixers": {"short_conv": {}},
        "attention": ATTENTION | {"qk_norm": True, "positions": "rope", "rope": {"theta": 10000}},
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
    },
    # As released: windows and attention by turns, stretched alike, sinks, biases, and the limit of its experts.
    "gpt_oss": {
        "pattern": "WE*E",
        "mixers": {"window": SINKS | {"window": 32, "rope_theta": 10000, "yarn": YARN}},
        "attention": SINKS
        | {
            "positions": "rope",
            "rope": {"theta": 10000, "scaling": "yarn"} | {f"yarn_{name}": value for name, value in YARN.items()},
        },
        "moe": EXPERTS
        | {
            "activation": "swiglu_oai",
            "activation_limit": 7.0,
            "router": "softmax",
            "bias": True,
            "shared_expert_hidden_size": 0,
        },
    },
    "falcon_h1": {
        "pattern": "((M&*)-)x2",
        "mamba": MAMBA,
        "attention": ATTENTION | {"positions": "rope", "rope": {"theta": 10000}},
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
    },
    "falcon_h1 with groups and a scale": {
        "pattern": "((M&*)-)x2",
        "mamba": MAMBA | {"num_groups": 2},
        "attention": ATTENTION | {"positions": "rope", "rope": {"theta": 10000}, "softmax_scale": 0.25},
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
    },
    # Fewer keys than a row has, and heads enough that no two keys score 0.
    "deepseek_v32": {
        "pattern": "+-+E",
        "mixers": {
            "mla": LATENT
            | {
                "positions": "rope",
                "query_latent_size": 64,
                "indexer": {"top_k": 16, "num_heads": 16, "head_dim": 64, "rope_fraction": 0.5},
            }
        },
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": EXPERTS | {"activation": "swiglu", "router": "sigmoid", "expert_bias": True},
    },
    **FAMILIES,
    # What no native class holds: gates and norms in attention together with Mamba2, then blocks of four kinds, then
    # mixers that no program has.
    "own": {
        "pattern": "ME*-M-",
        "mamba": MAMBA,
        "attention": ATTENTION | {"qk_norm": True, "gate": "head", "positions": "rope"},
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": EXPERTS | {"activation": "swiglu", "router": "sigmoid", "expert_bias": True},
        "multipliers": {"logits": 0.5},
    },
    "own with latent attention": {
        "pattern": "CE+-W-ME",
        "mamba": MAMBA,
        "mixers": {
            "short_conv": {},
            "mla": LATENT,
            "window": {"num_heads": 2, "head_dim": 32, "window": 64},
        },
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": SWIGLU_EXPERTS,
    },
    "own with other mixers": {
        "pattern": "GEW-L-{gla}E",
        "mixers": {
            "gated_deltanet": {"num_heads": 2, "head_dim": 32},
            "window": {"num_heads": 2, "head_dim": 32, "window": 64},
            "lightning": {"num_heads": 2, "head_dim": 32},
            "gla": {"num_heads": 2, "head_dim": 32},
        },
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": SWIGLU_EXPERTS,
    },
}
