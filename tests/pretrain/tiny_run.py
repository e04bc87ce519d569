"""A RunConfig that trains in a second: every core kind of block, packed documents, experts with a balancing bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from pretrain.config import RunConfig
from tests.helpers.tiny_store import make_tiny_store

MODEL: dict[str, Any] = {
    "pattern": "ME*-",
    "vocab_size": 448,
    "hidden_size": 32,
    "mamba": {"num_heads": 4, "head_dim": 16, "state_size": 16, "num_groups": 2, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "feed_forward": {"hidden_size": 48},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_hidden_size": 24,
        "shared_expert_hidden_size": 16,
        "expert_bias": True,
        "auxiliary_loss_weight": 0.01,
        "z_loss_weight": 0.001,
    },
}


def tiny_data(folder: Path) -> DataConfig:
    """A store with documents so short that most rows hold several."""
    return make_tiny_store(folder, num_documents=200, mean_words=12)


def tiny_config(data: DataConfig, run_dir: Path, **overrides: Any) -> RunConfig:
    """A config with dotted keys set over it, written with double underscores: train__steps=3."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir), "tensorboard": False},
        "model": MODEL,
        "data": data.model_dump(mode="json"),
        "train": {
            "steps": 4,
            "sequence_length": 48,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "precision": "float32",
            "validation_batches": 1,
            "num_threads": 1,
            "timeout_seconds": 60,
        },
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "wsd", "warmup_steps": 2},
        "parallel": {"zero_stage": 1},
        "kernels": {"backend": "torch"},
    }
    for key, value in overrides.items():
        section, name = key.split("__")
        tree[section] = {**tree[section], name: value}
    return RunConfig.model_validate(tree)
