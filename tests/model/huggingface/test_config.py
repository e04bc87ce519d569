"""config.json: what it says of a model, and the model that it gives back."""

from __future__ import annotations

import json

import pytest

from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.schema import ModelConfig, MultipliersConfig
from amfm.model.huggingface.classes import TokenIds, huggingface_config, model_config_from_huggingface, weight_map
from amfm.model.huggingface.hf_class import Target
from tests.model.huggingface.cases import (
    GRANITE,
    NEMOTRON_H,
    QWEN3_NEXT,
    TARGETED,
    build_ours,
    deepseek_v3_config,
    deepseek_v32_config,
    granite_config,
    grouped,
    lfm2_config,
    nemotron_h_config,
    qwen3_next_config,
)


@pytest.mark.parametrize(("target", "config"), TARGETED.values(), ids=TARGETED.keys())
def test_config_json_gives_the_configuration_back(target: str, config: ModelConfig) -> None:
    none = TokenIds(None, None, None)
    fields = huggingface_config(config, target, none, max_position_embeddings=64)
    read = model_config_from_huggingface(fields)
    again = huggingface_config(read, target, none, max_position_embeddings=64)
    assert again == fields
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields, "JSON must hold every field"


def test_config_json_avoids_the_known_traps() -> None:
    none = TokenIds(None, None, None)
    without_shared = nemotron_h_config(moe=grouped(NEMOTRON_H.moe, shared_expert_hidden_size=0))
    fields = huggingface_config(without_shared, "nemotron_h", none, max_position_embeddings=64)
    assert 0 < fields["time_step_min"] < 1e-20, "0 makes the class fail, 0.001 clamps"
    assert fields["n_shared_experts"] == 1, "vLLM multiplies by it"
    assert fields["moe_shared_expert_intermediate_size"] == 1, "0 would become intermediate_size"
    assert fields["tie_word_embeddings"] is False
    assert fields["rescale_prenorm_residual"] is False
    assert fields["hybrid_override_pattern"] == "M*EM-E", "vLLM reads it"
    granite = huggingface_config(GRANITE, "granitemoehybrid", none, max_position_embeddings=64)
    assert granite["attention_multiplier"] == 6**-0.5, "the class's default is 1"
    multipliers = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    assert all(granite[name] == 1.0 for name in multipliers)


def test_config_json_has_the_keys_that_other_readers_ask_for() -> None:
    none = TokenIds(None, None, None)

    def fields_of(config: ModelConfig, target: Target) -> dict:
        return huggingface_config(config, target, none, max_position_embeddings=64)

    nemotron = fields_of(nemotron_h_config(pattern="M*EME"), "nemotron_h")
    assert nemotron["num_hidden_layers"] == 5, "llama.cpp's converter stops without it"
    assert nemotron["intermediate_size"] == 16, "mlx-lm asks for it without a dense layer too"
    granite = fields_of(granite_config(), "granitemoehybrid")
    assert granite["time_step_limit"][0] == 0.0, "mlx-lm's default clamps dt"
    assert granite["rope_theta"] == granite["rope_parameters"]["rope_theta"] == 10_000.0
    no_positions = granite_config(attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6))
    assert fields_of(no_positions, "granitemoehybrid")["position_embedding_type"] == "nope", "others are rope to mlx-lm"
    for target in ("qwen3_next", "qwen3_5_moe"):
        qwen = fields_of(qwen3_next_config(pattern="GE*E"), target)
        assert (qwen["rope_theta"], qwen["partial_rotary_factor"], qwen["full_attention_interval"]) == (200.0, 0.5, 2)
        assert qwen.get("intermediate_size") == (16 if target == "qwen3_next" else None)
    assert "full_attention_interval" not in fields_of(qwen3_next_config(pattern="*EGEGE"), "qwen3_next")
    lfm2 = fields_of(lfm2_config(), "lfm2")
    asked = ("block_dim", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim")
    assert [lfm2[name] for name in asked] == [24, 256, 1.0, False], "mlx-lm's class has no default for them"
    assert lfm2["conv_dim"] == 24, "vLLM asks for it"
    for config, target in ((deepseek_v3_config(), "deepseek_v3"), (deepseek_v32_config(), "deepseek_v32")):
        deepseek = fields_of(config, target)
        routing = (deepseek["scoring_func"], deepseek["topk_method"])
        assert routing == ("sigmoid", "noaux_tc"), "vLLM takes a softmax and no biases otherwise"


def test_transformers_reads_the_flat_keys_of_a_scaled_rotation_as_the_nested_ones() -> None:
    from transformers import Qwen3NextConfig

    config = TARGETED["qwen3_next, tied, no shared expert, plain weights, as many key heads, yarn"][1]
    fields = huggingface_config(config, "qwen3_next", TokenIds(None, None, None), max_position_embeddings=64)
    assert fields["rope_scaling"]["rope_type"] == "yarn", "without it a reader of flat keys would not scale"
    theirs = Qwen3NextConfig(**fields)
    assert theirs.rope_parameters == fields["rope_parameters"]
    assert theirs.layer_types == fields["layer_types"]
    assert model_config_from_huggingface(theirs.to_dict()) == model_config_from_huggingface(fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "phi3"}, "model_type=phi3 cannot be imported"),
        ({"use_bias": True}, "use_bias=True cannot be imported; our model has use_bias=False only"),
        ({"sliding_window": 128}, "sliding_window=128 cannot be imported"),
        ({"time_step_limit": [0.001, 0.1]}, r"time_step_limit=\(0.001, 0.1\) cannot be imported"),
        ({"layers_block_type": ["mamba", "conv"]}, r"layer kinds \['conv'\] cannot be imported"),
    ],
)
def test_what_our_model_lacks_is_refused_on_import(changes: dict, message: str) -> None:
    fields = huggingface_config(NEMOTRON_H, "nemotron_h", TokenIds(None, None, None), max_position_embeddings=64)
    with pytest.raises(ValueError, match=message):
        model_config_from_huggingface(fields | changes)


def test_gates_that_the_description_does_not_have_are_refused_on_import() -> None:
    mapping = weight_map(QWEN3_NEXT, "qwen3_next")
    theirs = mapping.to_theirs(build_ours(QWEN3_NEXT).state_dict())
    attention = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(
        ValueError, match=r"q_proj\.weight has an output gate, and the model .* has none; remove amfm_model\.json"
    ):
        dict(mapping.to_ours(theirs | {attention: theirs[attention] + 1}))
    shared = "model.layers.0.mlp.shared_expert_gate.weight"
    with pytest.raises(ValueError, match=r"shared_expert_gate\.weight is not zero"):
        mapping.to_ours(theirs | {shared: theirs[shared] + 1})


def test_released_multipliers_of_granite_come_back_whole() -> None:
    none = TokenIds(None, None, None)
    fields = huggingface_config(GRANITE, "granitemoehybrid", none, max_position_embeddings=64)
    released = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0}
    released["attention_multiplier"] = 0.0078125
    read = model_config_from_huggingface(fields | released)
    assert read.multipliers == MultipliersConfig(embedding=12.0, residual=0.22, logits=1 / 6)
    again = huggingface_config(read, "granitemoehybrid", none, max_position_embeddings=64)
    assert again == fields | released
