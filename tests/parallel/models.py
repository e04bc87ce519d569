"""Models that layouts of ranks train: every kind of block, with the settings that change what a rank holds of it."""

from __future__ import annotations

from typing import Any

# Every core kind of block. Four tensor ranks outnumber the key-value heads and the groups of B and C.
LATENT = {
    "num_heads": 8,
    "latent_size": 12,
    "query_latent_size": 10,
    "nope_head_dim": 6,
    "rope_head_dim": 4,
    "value_head_dim": 5,
    "positions": "rope",
}
# Stretched positions: frequencies of a rank's rows are those of whole rows.
YARN = {"factor": 4.0, "original_length": 16, "beta_fast": 4.0, "beta_slow": 0.5}
WINDOW = {"num_heads": 8, "num_kv_heads": 2, "window": 12, "head_dim": 4, "sinks": True, "bias": True}
MODEL: dict[str, Any] = {
    "pattern": "ME*-ME",
    "vocab_size": 448,
    "hidden_size": 32,
    "initializer_range": 0.1,
    "mamba": {"num_heads": 8, "head_dim": 4, "state_size": 8, "num_groups": 2, "chunk_size": 16},
    "attention": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 8, "qk_norm": True, "positions": "rope"},
    "feed_forward": {"hidden_size": 48, "activation": "swiglu"},
    "moe": {
        "num_experts": 8,
        "top_k": 2,
        "expert_hidden_size": 16,
        "shared_expert_hidden_size": 16,
        "expert_bias": True,
        "auxiliary_loss_weight": 0.01,
        "sequence_loss_weight": 0.01,
        "z_loss_weight": 0.001,
    },
    "logits_z_loss_weight": 1e-4,
}
# The same with what other settings of the blocks bring, or with only two blocks.
VARIANTS: dict[str, dict[str, Any]] = {
    "core": MODEL,
    "latent": MODEL
    | {
        "tie_embeddings": True,
        "attention": MODEL["attention"] | {"gate": "element", "sinks": True, "bias": True},
        "moe": MODEL["moe"]
        | {
            "latent_size": 12,
            "activation": "swiglu",
            "shared_expert_gate": True,
            "bias": True,
            "router": "sqrt_softplus",
        },
        "multipliers": {"embedding": 2.0, "residual": 0.5, "logits": 0.5},
    },
    "mixers": MODEL
    | {
        "pattern": "MEGK*PEC{gdn2}{mamba3}",
        "mixers": {
            "short_conv": {},
            "gated_deltanet": {
                "num_heads": 8,
                "num_key_heads": 2,
                "head_dim": 6,
                "value_head_dim": 4,
                "chunk_size": 16,
            },
            "kda": {"num_heads": 8, "head_dim": 4, "gate_rank": 6, "chunk_size": 16},
            "gdn2": {"num_heads": 8, "head_dim": 4, "gate_rank": 6, "chunk_size": 16},
            # One of two groups is copied where tensor ranks are four.
            "mamba3": {"num_heads": 8, "head_dim": 4, "state_size": 8, "num_groups": 2, "chunk_size": 16},
            # beta below 1: steps that reflect would amplify float32 rounding beyond the tolerance.
            "deltaproduct": {"num_heads": 8, "head_dim": 4, "chunk_size": 16},
        },
    },
    "mla": MODEL
    | {
        "pattern": "M+E+",
        "mixers": {"mla": LATENT | {"gate": "element", "sinks": True, "yarn": YARN | {"mscale": 0.7}}},
    },
    "chosen_keys": MODEL
    | {
        "pattern": "M*E+",
        "attention": MODEL["attention"] | {"indexer": {"top_k": 9, "head_dim": 8}},
        "mixers": {"mla": LATENT | {"indexer": {"top_k": 9, "head_dim": 8}}},
    },
    "parallel": MODEL
    | {
        "pattern": "(M&*)E(W&M)-",
        "attention": MODEL["attention"]
        | {"rope": {"scaling": "yarn"} | {f"yarn_{name}": value for name, value in YARN.items()}},
        "mixers": {"window": WINDOW | {"yarn": YARN}},
    },
    "mtp": MODEL | {"pattern": "ME*-/*E/*E"},
    "mtp_shared": MODEL | {"pattern": "MEM*-/*E/*E", "tie_embeddings": True, "mtp": {"shared": True}},
    "experts": MODEL | {"pattern": "*E"},
    "recycle": MODEL | {"moe": MODEL["moe"] | {"capacity_factor": 1.0, "overflow": "recycle"}},
    "sources": MODEL | {"attention_residuals": {"blocks_per_source": 2}},
    "streams": MODEL | {"hyper_connections": {"streams": 3}},
    "ngrams": MODEL
    | {
        "pattern": "M{ngram_memory}E*{ngram_memory}-/{ngram_memory}*",
        "mixers": {"ngram_memory": {"num_heads": 2, "head_dim": 4, "table_size": 50}},
    },
    "quantile": MODEL | {"moe": MODEL["moe"] | {"bias_rule": "quantile"}},
}
VARIANTS["muon"] = VARIANTS["normuon"] = VARIANTS["latent"]
# Rows with padding, of which routers see nothing.
VARIANTS["padded"], VARIANTS["padded_recycle"] = MODEL, VARIANTS["recycle"]
# Settings that go with a variant, in every layout of it.
SETTINGS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer__kind": "muon"},
    "normuon": {"optimizer__kind": "muon", "optimizer__muon": {"rule": "normuon"}},
    "padded": {"data__packing": "best_fit"},
    "padded_recycle": {"data__packing": "best_fit"},
}
