"""Models that each native class of transformers holds, in all the choices that it leaves open."""

from __future__ import annotations

import torch

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.moe import BIAS_CHANNELS, MoeConfig
from amfm.model.config.rope import RopeConfig, YarnStretch
from amfm.model.config.schema import ModelConfig, MultipliersConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups

VOCABULARY = 61


def nemotron_h_config(**changes) -> ModelConfig:
    fields = {
        "pattern": "M*EM-E",
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "mamba": Mamba2Config(num_heads=3, head_dim=8, state_size=5, num_groups=1, chunk_size=16),
        "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=12),
        "feed_forward": FeedForwardConfig(hidden_size=20),
        "moe": MoeConfig(
            num_experts=4, top_k=2, expert_hidden_size=16, shared_expert_hidden_size=12, routed_scaling=2.5
        ),
    }
    return ModelConfig(**(fields | changes))


def granite_config(**changes) -> ModelConfig:
    fields = {
        "pattern": "ME*EME",
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "mamba": Mamba2Config(num_heads=6, head_dim=8, state_size=5, num_groups=2, chunk_size=16),
        "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6, positions="rope"),
        "moe": MoeConfig(
            num_experts=4,
            top_k=2,
            expert_hidden_size=16,
            shared_expert_hidden_size=12,
            activation="swiglu",
            router="softmax",
        ),
    }
    return ModelConfig(**(fields | changes))


def delta_mixers(**changes) -> dict:
    options = {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "value_head_dim": 5, "chunk_size": 16}
    return {"gated_deltanet": options | changes}


def qwen3_next_config(**changes) -> ModelConfig:
    fields = {
        "pattern": "GE*EG-",
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "mixers": delta_mixers(),
        "attention": AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            qk_norm=True,
            positions="rope",
            rope=RopeConfig(theta=200.0, fraction=0.5),
        ),
        "feed_forward": FeedForwardConfig(hidden_size=20, activation="swiglu"),
        "moe": GRANITE.moe,
    }
    return ModelConfig(**(fields | changes))


def qwen3_5_moe_config(**changes) -> ModelConfig:
    return qwen3_next_config(**({"pattern": "GE*E"} | changes))


# Odd sizes of heads and latents, and as many heads of values as no other width.
KDA = {"num_heads": 3, "head_dim": 7, "chunk_size": 16}
MLA_YARN = {"factor": 4.0, "original_length": 8, "beta_fast": 3.0, "beta_slow": 0.5}
MLA = {"num_heads": 3, "latent_size": 11, "nope_head_dim": 5, "rope_head_dim": 6, "value_head_dim": 7}


def kimi_linear_config(**changes) -> ModelConfig:
    fields = {
        "pattern": "K-KE+E",
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "mixers": {"kda": KDA, "mla": MLA},
        "feed_forward": FeedForwardConfig(hidden_size=20, activation="swiglu"),
        "moe": MoeConfig(
            num_experts=4,
            top_k=2,
            expert_hidden_size=16,
            shared_expert_hidden_size=16,
            activation="swiglu",
            routed_scaling=2.5,
            expert_bias=True,
        ),
    }
    return ModelConfig(**(fields | changes))


def deepseek_v3_config(**changes) -> ModelConfig:
    fields = {"pattern": "+-+E", "mixers": {"mla": MLA | {"positions": "rope", "query_latent_size": 9}}}
    return kimi_linear_config(**(fields | changes))


def deepseek_v32_mixers(**changes) -> dict:
    """Latent attention with an indexer of many heads: of few, scores are 0, and the class takes any of equal ones."""
    indexer = {"top_k": 7, "num_heads": 16, "head_dim": 12, "rope_fraction": 0.5} | changes.pop("indexer", {})
    return {"mla": MLA | {"positions": "rope", "query_latent_size": 9, "indexer": indexer} | changes}


def deepseek_v32_config(**changes) -> ModelConfig:
    return deepseek_v3_config(**({"mixers": deepseek_v32_mixers()} | changes))


def lfm2_config(**changes) -> ModelConfig:
    fields = {
        "pattern": "C-C-*-",
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "mixers": {"short_conv": {}},
        "attention": AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, positions="rope", rope=RopeConfig(theta=200.0)
        ),
        "feed_forward": FeedForwardConfig(hidden_size=20, activation="swiglu"),
    }
    return ModelConfig(**(fields | changes))


def lfm2_moe_config(**changes) -> ModelConfig:
    moe = MoeConfig(
        num_experts=4,
        top_k=2,
        expert_hidden_size=16,
        shared_expert_hidden_size=0,
        activation="swiglu",
        expert_bias=True,
        routed_scaling=1.5,
    )
    return lfm2_config(**({"pattern": "C-CE*E", "moe": moe} | changes))


def gpt_oss_window(**changes) -> dict:
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": 7, "rope_theta": 200.0, "sinks": True}
    return {"window": options | changes}


def gpt_oss_config(**changes) -> ModelConfig:
    fields = {
        "pattern": "WE*E",
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "mixers": gpt_oss_window(),
        "attention": AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=6, positions="rope", rope=RopeConfig(theta=200.0), sinks=True
        ),
        "moe": MoeConfig(
            num_experts=4,
            top_k=2,
            expert_hidden_size=16,
            activation="swiglu_oai",
            activation_limit=0.5,
            router="softmax",
        ),
    }
    return ModelConfig(**(fields | changes))


def falcon_h1_config(**changes) -> ModelConfig:
    fields = {
        "pattern": "((M&*)-)x2",
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "mamba": Mamba2Config(num_heads=6, head_dim=4, state_size=5, num_groups=2, chunk_size=16),
        "attention": AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=8, positions="rope", rope=RopeConfig(theta=200.0)
        ),
        "feed_forward": FeedForwardConfig(hidden_size=20, activation="swiglu"),
    }
    return ModelConfig(**(fields | changes))


def grouped(moe: MoeConfig | None, **changes) -> MoeConfig:
    assert moe is not None
    return moe.model_copy(update=changes)


def gated(config: ModelConfig) -> ModelConfig:
    assert config.attention is not None
    attention = config.attention.model_copy(update={"gate": "element"})
    return config.model_copy(update={"attention": attention, "moe": grouped(config.moe, shared_expert_gate=True)})


NEMOTRON_H = nemotron_h_config()
GRANITE = granite_config()
QWEN3_NEXT = qwen3_next_config()
KIMI_LINEAR = kimi_linear_config()
YARN = RopeConfig(theta=500.0, scaling="yarn", yarn_factor=4.0, yarn_original_length=32)
CASES = {
    "nemotron_h, one group, three heads": NEMOTRON_H,
    "nemotron_h, two groups, no shared expert, tied": nemotron_h_config(
        tie_embeddings=True,
        mamba=Mamba2Config(num_heads=6, head_dim=4, state_size=8, num_groups=2, conv_bias=False),
        moe=grouped(NEMOTRON_H.moe, shared_expert_hidden_size=0, expert_bias=True),
    ),
    "nemotron_h, latent experts in router groups, plain weights": nemotron_h_config(
        moe=grouped(
            NEMOTRON_H.moe,
            num_experts=6,
            num_router_groups=3,
            router_group_top_k=2,
            latent_size=8,
            expert_bias=True,
            normalize_probabilities=False,
        )
    ),
    "nemotron_h, no Mamba2": nemotron_h_config(pattern="*E", mamba=None),
    "nemotron_h, Mamba2 alone": nemotron_h_config(pattern="MM", attention=None, moe=None, feed_forward=None),
    "granitemoehybrid, no Mamba2": granite_config(pattern="*E*E", mamba=None),
    "granitemoehybrid, no attention": granite_config(pattern="ME", attention=None),
    "granitemoehybrid, rope": GRANITE,
    "granitemoehybrid, tied, no positions, no shared expert, one group, scale": granite_config(
        tie_embeddings=True,
        mamba=Mamba2Config(num_heads=3, head_dim=8, state_size=8, num_groups=1, conv_kernel=3),
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=6, softmax_scale=0.3),
        moe=grouped(GRANITE.moe, shared_expert_hidden_size=0),
    ),
    "granitemoehybrid, ntk": granite_config(
        attention=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=6,
            positions="rope",
            rope=RopeConfig(theta=300.0, scaling="ntk", ntk_alpha=50.0),
        )
    ),
    "granitemoehybrid, yarn": granite_config(
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, positions="rope", rope=YARN)
    ),
    "granitemoehybrid, multipliers": granite_config(
        attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6, softmax_scale=0.2),
        multipliers=MultipliersConfig(embedding=3.0, residual=0.22, logits=1 / 6),
    ),
    "granitemoehybrid, dense": granite_config(
        pattern="M-*-", moe=None, feed_forward=FeedForwardConfig(hidden_size=20, activation="swiglu")
    ),
    "qwen3_next, dense and sparse layers": QWEN3_NEXT,
    "qwen3_next, tied, no shared expert, plain weights, as many key heads, yarn": qwen3_next_config(
        tie_embeddings=True,
        mixers=delta_mixers(num_key_heads=None, value_head_dim=None, conv_kernel=3),
        moe=grouped(GRANITE.moe, shared_expert_hidden_size=0, normalize_probabilities=False),
        attention=QWEN3_NEXT.attention.model_copy(update={"rope": YARN}),
    ),
    "qwen3_next, gated": gated(QWEN3_NEXT),
    "qwen3_next, no attention, dense": qwen3_next_config(pattern="G-G-", attention=None, moe=None),
    "qwen3_next, no Gated DeltaNet, ntk": qwen3_next_config(
        pattern="*E",
        mixers={},
        feed_forward=None,
        attention=QWEN3_NEXT.attention.model_copy(
            update={"rope": RopeConfig(theta=300.0, scaling="ntk", ntk_alpha=50.0, fraction=0.5)}
        ),
    ),
    "kimi_linear, dense and sparse layers": KIMI_LINEAR,
    "kimi_linear, tied, latent queries, groups, no shared expert": kimi_linear_config(
        pattern="KE+E",
        tie_embeddings=True,
        mixers={"kda": KDA | {"conv_kernel": 3}, "mla": MLA | {"query_latent_size": 9}},
        moe=grouped(
            KIMI_LINEAR.moe, num_experts=6, num_router_groups=3, router_group_top_k=2, shared_expert_hidden_size=0
        ),
    ),
    "kimi_linear, latent attention alone, dense": kimi_linear_config(pattern="+-", moe=None, mixers={"mla": MLA}),
    "kimi_linear, no latent attention": kimi_linear_config(pattern="KE", feed_forward=None, mixers={"kda": KDA}),
    "deepseek_v3, dense and sparse layers, latent queries": deepseek_v3_config(),
    "deepseek_v3, tied, bias, two shared experts, plain weights": deepseek_v3_config(
        pattern="+E",
        tie_embeddings=True,
        feed_forward=None,
        mixers={"mla": MLA | {"positions": "rope", "rope_theta": 300.0, "yarn": MLA_YARN | {"mscale": 1.0}}},
        moe=grouped(KIMI_LINEAR.moe, shared_expert_hidden_size=32, expert_bias=True, normalize_probabilities=False),
    ),
    "deepseek_v32, dense and sparse layers": deepseek_v32_config(),
    "deepseek_v32, tied, narrow indexer heads, a few keys": deepseek_v32_config(
        pattern="+E",
        tie_embeddings=True,
        feed_forward=None,
        mixers=deepseek_v32_mixers(
            rope_theta=300.0, yarn=MLA_YARN, indexer={"head_dim": 8, "rope_fraction": 0.75, "top_k": 3}
        ),
    ),
    "lfm2, convolutions and attention, tied": lfm2_config(tie_embeddings=True),
    "lfm2, wider convolutions alone": lfm2_config(
        pattern="C-", attention=None, mixers={"short_conv": {"conv_kernel": 4}}
    ),
    "lfm2, attention alone, yarn": lfm2_config(
        pattern="*-",
        mixers={},
        attention=lfm2_config().attention.model_copy(update={"rope": YARN}),
    ),
    "lfm2_moe, dense and sparse layers, tied": lfm2_moe_config(tie_embeddings=True),
    "lfm2_moe, sparse layers alone, no bias, plain weights": lfm2_moe_config(
        pattern="CE*E",
        feed_forward=None,
        moe=grouped(lfm2_moe_config().moe, expert_bias=False, normalize_probabilities=False),
    ),
    "gpt_oss, windows and attention by turns": gpt_oss_config(),
    "gpt_oss, biases": gpt_oss_config(
        mixers=gpt_oss_window(bias=True),
        attention=gpt_oss_config().attention.model_copy(update={"bias": True}),
        moe=grouped(gpt_oss_config().moe, bias=True),
    ),
    "gpt_oss, windows alone, tied": gpt_oss_config(pattern="WE", attention=None, tie_embeddings=True),
    "gpt_oss, windows and attention as released, yarn": gpt_oss_config(
        mixers=gpt_oss_window(yarn={"factor": 4.0, "original_length": 16, "truncate": False}),
        attention=gpt_oss_config().attention.model_copy(
            update={"rope": YarnStretch(factor=4.0, original_length=16, truncate=False).rope(200.0)}
        ),
    ),
    "gpt_oss, attention alone, yarn": gpt_oss_config(
        pattern="*E", mixers={}, attention=gpt_oss_config().attention.model_copy(update={"rope": YARN})
    ),
    "falcon_h1, two groups": falcon_h1_config(),
    "falcon_h1, tied, yarn, attention first, scaled": falcon_h1_config(
        pattern="(*&M)-",
        tie_embeddings=True,
        multipliers=MultipliersConfig(embedding=2.0, logits=0.5),
        attention=falcon_h1_config().attention.model_copy(update={"rope": YARN, "softmax_scale": 0.25}),
    ),
    "qwen3_5_moe, gated": gated(qwen3_5_moe_config()),
    "qwen3_5_moe, no gates, as many key heads": qwen3_5_moe_config(mixers=delta_mixers(num_key_heads=None)),
}

# The name of a case begins with its class.
TARGETED = {name: (name.split(",")[0], config) for name, config in CASES.items()}


def build_ours(config: ModelConfig, seed: int = 0) -> HybridModel:
    """A model whose weights are large enough for every part to matter, with a bias that moves the routing."""
    model = HybridModel(config, single_rank_groups(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm.bias", ".D", "conv.bias", "sinks")):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            elif name.endswith((".bias", "down_bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif not name.endswith(("A_log", "dt_bias")):
                parameter.mul_(6.0)
            if name.endswith("experts.up") and config.moe is not None and config.moe.bias:
                parameter[:, :, -BIAS_CHANNELS].copy_(torch.randn(parameter.shape[:2], generator=generator) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.eval()
