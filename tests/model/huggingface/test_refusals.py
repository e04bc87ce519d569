"""Programs that are known to reject an export are named, with what helps, and only for what was tried."""

from __future__ import annotations

import pytest

from amfm.model.config.core_options import AttentionConfig, Mamba2Config
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import known_refusals
from amfm.model.huggingface.hf_class import Target
from tests.model.huggingface.cases import (
    YARN,
    deepseek_v3_config,
    deepseek_v32_config,
    delta_mixers,
    falcon_h1_config,
    gpt_oss_config,
    granite_config,
    kimi_linear_config,
    lfm2_config,
    lfm2_moe_config,
    nemotron_h_config,
    qwen3_next_config,
)

ONE_GROUP = Mamba2Config(num_heads=6, head_dim=8, state_size=5, num_groups=1, chunk_size=16)
WIDE = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=32, qk_norm=True, positions="rope")
STRETCHED = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, positions="rope", sinks=True, rope=YARN)
EXACT = STRETCHED.model_copy(update={"rope": YARN.model_copy(update={"yarn_truncate": False})})
SCALED = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, positions="rope", softmax_scale=0.3)
WINDOW = {"window": 9, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "positions": "rope"}
MOE = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "shared_expert_hidden_size": 8, "activation": "swiglu"}


def pairs(pattern: str, **moe: object) -> ModelConfig:
    """A model of attention or windows, feed-forwards or experts, whose heads are as wide as the residual stream."""
    heads = {name: value for name, value in WINDOW.items() if name != "window"}
    return ModelConfig.model_validate(
        {
            "vocab_size": 61,
            "hidden_size": 16,
            "pattern": pattern,
            "attention": heads,
            "mixers": {"window": WINDOW} if "W" in pattern else {},
            "feed_forward": {"hidden_size": 24, "activation": "swiglu"},
            "moe": MOE | moe,
        }
    )


WIDER = pairs("*E").model_copy(update={"hidden_size": 24})


@pytest.mark.parametrize(
    ("target", "config", "words"),
    [
        ("nemotron_h", nemotron_h_config(pattern="M-M*-"), ["moe_intermediate_size"]),
        ("nemotron_h", nemotron_h_config(pattern="M*EME"), ["is_act_and_mul=False"]),
        ("nemotron_h", nemotron_h_config(pattern="M*EM-"), ["both E and -", "is_act_and_mul=False"]),
        ("granitemoehybrid", granite_config(), ["num_groups=2 silently produces different values"]),
        ("granitemoehybrid", granite_config(mamba=ONE_GROUP), []),
        ("qwen3_next", qwen3_next_config(pattern="GEGE*E"), ["--no-mtp", "only in bf16"]),
        ("qwen3_next", qwen3_next_config(pattern="*-G-"), ["--no-mtp", "only in bf16", "every n-th mixer"]),
        (
            "qwen3_next",
            qwen3_next_config(pattern="G-*-", attention=WIDE),
            ["--no-mtp", "bf16", "model.attention.head_dim=32"],
        ),
        (
            "qwen3_next",
            qwen3_next_config(pattern="GE", attention=None, mixers=delta_mixers(head_dim=32)),
            ["--no-mtp", "bf16", "model.mixers.gated_deltanet.head_dim=32"],
        ),
        ("kimi_linear", kimi_linear_config(), ["kernel for GPUs"]),
        ("kimi_linear", kimi_linear_config(pattern="+-"), []),
        ("lfm2", lfm2_config(), ["rotary kernel (lfm2.py:176", "model.tie_embeddings: true"]),
        ("lfm2_moe", lfm2_moe_config(tie_embeddings=True), ["rotary kernel (lfm2.py:176"]),
        ("gpt_oss", gpt_oss_config(), ["experts in MXFP4", "only positions stretched by yarn"]),
        ("gpt_oss", gpt_oss_config(pattern="*E", mixers={}, attention=STRETCHED), ["experts in MXFP4"]),
        (
            "gpt_oss",
            gpt_oss_config(pattern="*E", mixers={}, attention=EXACT),
            ["MXFP4", "yarn_truncate: false silently"],
        ),
        ("falcon_h1", falcon_h1_config(), ["num_groups=2 silently produces different values"]),
        (
            "falcon_h1",
            falcon_h1_config(mamba=ONE_GROUP, attention=SCALED),
            ["softmax_scale=0.3 silently produces different values"],
        ),
        ("falcon_h1", falcon_h1_config(mamba=ONE_GROUP), []),
        ("deepseek_v3", deepseek_v3_config(), ["DSPARK_MARKOV_W1"]),
        ("deepseek_v32", deepseek_v32_config(), ["DSPARK_MARKOV_W1", "Sparse Attention is not supported on CPU"]),
        ("llama", pairs("*-"), []),
        ("mistral", pairs("W-"), ["attends past the windows of mistral"] * 2),
        ("mistral", pairs("*-"), []),
        ("qwen3", pairs("W-*-"), ["attends past the windows of qwen3"] * 2),
        ("olmo3", pairs("W-*-"), []),
        ("qwen3_moe", pairs("*-*E"), ["Can not map tensor"]),
        ("qwen3_moe", pairs("*E"), []),
        ("qwen2_moe", pairs("*E"), ["does not read norm_topk_prob"] * 2),
        ("qwen2_moe", pairs("*E", normalize_probabilities=False), []),
        ("olmoe", pairs("*E"), ["train with false for llama.cpp", "train with false for vllm"]),
        ("mixtral", pairs("*E"), []),
        ("mixtral", WIDER, ["hidden_size / num_heads, 12, for mlx-lm"]),
        ("gemma3_text", pairs("W-" * 5 + "*-"), []),
        ("gemma3_text", pairs("W-*-"), ["every 6th layer for full attention"]),
        ("gemma3_text", pairs("*-W-"), ["every 6th layer", "every n-th layer"]),
        ("hy_v3", pairs("*-*E"), ["AttributeError: HY_V3", "no class hy_v3"]),
        ("hy_v3", pairs("*E*-"), ["AttributeError: HY_V3", "no class hy_v3", "every - before the first E"]),
        ("minimax_m2", pairs("*E"), ["end with an AssertionError"]),
        ("bamba", pairs("*-"), ["different values for bamba", "no class bamba", "no class for bamba"]),
        ("olmo_hybrid", pairs("*-"), ["no class olmo_hybrid", "parameters not in model", "set_allocator"]),
        ("own", nemotron_h_config(), ["classes that it has itself"] * 2),
    ],
)
def test_what_a_program_refused_is_said_of_models_like_it(
    target: Target, config: ModelConfig, words: list[str]
) -> None:
    found = known_refusals(config, target, "huggingface")
    assert len(found) == len(words)
    for refusal, word in zip(found, words):
        assert word in str(refusal)


def test_the_converter_that_reads_no_sentencepiece_model_is_named_with_ours() -> None:
    cases: list[tuple[Target, ModelConfig]] = [
        ("nemotron_h", nemotron_h_config(pattern="M-")),
        ("granitemoehybrid", granite_config(mamba=ONE_GROUP)),
        ("qwen3_next", qwen3_next_config(pattern="GEGE*E")),
        ("lfm2", lfm2_config()),
        ("gpt_oss", gpt_oss_config()),
        ("falcon_h1", falcon_h1_config()),
    ]
    for target, config in cases:
        first = known_refusals(config, target, "sentencepiece")[0]
        assert str(first).startswith("llama.cpp") and "--format gguf" in first.rule and first.by_setting
