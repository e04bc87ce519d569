"""Small models of every export target, with the tokenizer of a tiny store, as the folders that export reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.inference.weights import Weights, write_weights
from tests.pretrain.tiny_run import MODEL

GRANITE: dict[str, Any] = {
    **MODEL,
    "pattern": "ME*E",
    "tie_embeddings": True,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope", "softmax_scale": 0.3},
    # Small against the blocks: with tied weights a larger one would repeat the last token for ever.
    "multipliers": {"embedding": 0.3, "residual": 1.7, "logits": 0.125},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_hidden_size": 24,
        "shared_expert_hidden_size": 16,
        "activation": "swiglu",
        "router": "softmax",
    },
}
QWEN3_NEXT: dict[str, Any] = {
    **MODEL,
    "pattern": "GE*EG-",
    "mixers": {"gated_deltanet": {"num_heads": 4, "num_key_heads": 2, "head_dim": 8, "chunk_size": 16}},
    "attention": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "qk_norm": True,
        "positions": "rope",
        "rope": {"fraction": 0.5},
        "gate": "element",
    },
    "feed_forward": {"hidden_size": 40, "activation": "swiglu"},
    "moe": GRANITE["moe"] | {"shared_expert_gate": True},
}
# Everything at once that no native class holds.
OWN: dict[str, Any] = {
    **MODEL,
    "pattern": "M*E-M*",
    "multipliers": {"embedding": 2.0, "residual": 0.5, "logits": 0.3},
    "attention": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "qk_norm": True,
        "gate": "head",
        "positions": "rope",
        "rope": {
            "theta": 300.0,
            "fraction": 0.75,
            "scaling": "yarn",
            "yarn_factor": 4.0,
            "yarn_original_length": 16,
        },
    },
    "feed_forward": {"hidden_size": 40, "activation": "swiglu"},
    "moe": {
        "num_experts": 6,
        "top_k": 2,
        "expert_hidden_size": 12,
        "shared_expert_hidden_size": 16,
        "shared_expert_gate": True,
        "activation": "swiglu",
        "latent_size": 10,
        "expert_bias": True,
        "routed_scaling": 1.5,
        "router": "sqrt_softplus",
        "num_router_groups": 3,
        "router_group_top_k": 2,
        "group_score_top_k": 1,
    },
}
LFM2: dict[str, Any] = {
    **MODEL,
    "pattern": "C-*-C-",
    "mixers": {"short_conv": {}},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qk_norm": True, "positions": "rope"},
    "feed_forward": {"hidden_size": 40, "activation": "swiglu"},
}
LFM2_MOE: dict[str, Any] = {
    **LFM2,
    "pattern": "C-*ECE",
    "moe": GRANITE["moe"] | {"router": "sigmoid", "expert_bias": True, "shared_expert_hidden_size": 0},
}
GPT_OSS: dict[str, Any] = {
    **MODEL,
    "pattern": "WE*E",
    "mixers": {"window": {"window": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "sinks": True}},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope", "sinks": True},
    "moe": {
        "num_experts": 6,
        "top_k": 2,
        "expert_hidden_size": 16,
        "activation": "swiglu_oai",
        "activation_limit": 0.5,
        "router": "softmax",
    },
}
FALCON_H1: dict[str, Any] = {
    **MODEL,
    "pattern": "((M&*)-)x2",
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope"},
    "feed_forward": {"hidden_size": 40, "activation": "swiglu"},
}
MODELS = {
    "nemotron_h": MODEL,
    "granitemoehybrid": GRANITE,
    "qwen3_next": QWEN3_NEXT,
    "lfm2": LFM2,
    "lfm2_moe": LFM2_MOE,
    "gpt_oss": GPT_OSS,
    "falcon_h1": FALCON_H1,
    "own": OWN,
}


def random_weights(data: DataConfig, model: dict[str, Any], seed: int = 0) -> Weights:
    """A model with weights large enough that its text is not uniform."""
    config = ModelConfig.model_validate(model)
    hybrid = HybridModel(config, single_rank_groups(), seed=seed)
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.mul_(4.0)
        for name, buffer in hybrid.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()))
    state = {name: tensor.detach() for name, tensor in hybrid.state_dict().items()}
    return Weights(config, state, load_tokenizer(data.store), "a test")


def weights_folder(data: DataConfig, folder: Path, target: str) -> Path:
    """A weights folder of a model that fits this target and no other."""
    folder.mkdir(parents=True)
    write_weights(folder, random_weights(data, MODELS[target]))
    return folder
