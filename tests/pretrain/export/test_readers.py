"""Programs that are known to refuse an export are named, with what helps, and only for what was tried."""

from __future__ import annotations

import pytest

from model.config.schema import AttentionConfig, ModelConfig
from model.huggingface.targets import Target
from pretrain.export.readers import known_refusals
from tests.model.huggingface.cases import delta_mixers, granite_config, nemotron_h_config, qwen3_next_config

WIDE = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=32, qk_norm=True, positions="rope")


@pytest.mark.parametrize(
    ("target", "config", "words"),
    [
        ("nemotron_h", nemotron_h_config(pattern="M-M*-"), []),
        ("nemotron_h", nemotron_h_config(pattern="M*EME"), ["is_act_and_mul=False"]),
        ("nemotron_h", nemotron_h_config(pattern="M*EM-"), ["both E and -", "is_act_and_mul=False"]),
        ("granitemoehybrid", granite_config(), []),
        ("qwen3_next", qwen3_next_config(), ["--no-mtp", "bf16 alone"]),
        ("qwen3_next", qwen3_next_config(attention=WIDE), ["--no-mtp", "bf16", "model.attention.head_dim=32"]),
        (
            "qwen3_next",
            qwen3_next_config(pattern="GE", attention=None, mixers=delta_mixers(head_dim=32)),
            ["--no-mtp", "bf16", "model.mixers.gated_deltanet.head_dim=32"],
        ),
        ("own", nemotron_h_config(), []),
    ],
)
def test_what_a_program_refused_is_said_of_models_like_it(
    target: Target, config: ModelConfig, words: list[str]
) -> None:
    found = known_refusals(config, target, "huggingface")
    assert len(found) == len(words)
    for refusal, word in zip(found, words):
        assert word in refusal


def test_the_converter_that_reads_no_sentencepiece_model_is_named() -> None:
    for target, config in (("nemotron_h", nemotron_h_config(pattern="M-")), ("granitemoehybrid", granite_config())):
        (refusal,) = known_refusals(config, target, "sentencepiece")
        assert refusal.startswith("llama.cpp") and "_set_vocab_sentencepiece" in refusal
    assert len(known_refusals(qwen3_next_config(), "qwen3_next", "sentencepiece")) == 2
