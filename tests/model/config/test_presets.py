"""The presets are the models that they are named for: published sizes, public configurations, and no broken rule."""

from pathlib import Path

import pytest
import torch
import transformers

from amfm.model.flops import count_parameters
from amfm.model.huggingface.classes import TokenIds, huggingface_config, model_config_from_huggingface
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.stages import resolve_stages

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
ULTRA_TILE = "EMEMEM*EMEMEMEM*EMEMEMEM*"

# What the public config.json files say about sizes; other fields keep the class's defaults.
NEMOTRON = {"vocab_size": 131_072, "head_dim": 128, "num_key_value_heads": 2, "mamba_head_dim": 64, "n_groups": 8}
DEPTHS = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "moe"]}
PUBLIC = {
    "nemotron3_nano_30b": NEMOTRON
    | {
        "hybrid_override_pattern": "MEMEM*" + "EMEMEM*" * 4 + "EMEMEMEM*" + "EMEMEMEME",
        "hidden_size": 2688,
        "num_attention_heads": 32,
        "mamba_num_heads": 64,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "routed_scaling_factor": 2.5,
    },
    "nemotron3_super_120b": NEMOTRON
    | DEPTHS
    | {
        "hybrid_override_pattern": "MEMEMEM*" + "EMEMEMEM*" * 2 + "EMEMEMEMEM*" * 4 + "EMEMEMEM*" + "EMEMEMEME",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "mamba_num_heads": 128,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_latent_size": 1024,
        "routed_scaling_factor": 5.0,
    },
    "nemotron3_ultra_550b": NEMOTRON
    | DEPTHS
    | {
        "hybrid_override_pattern": "MEMEMEM*" + ULTRA_TILE * 3 + "EMEMEM*EMEMEMEM*" + "EMEMEMEME",
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "mamba_num_heads": 256,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_intermediate_size": 5120,
        "moe_shared_expert_intermediate_size": 10_240,
        "moe_latent_size": 2048,
        "routed_scaling_factor": 5.0,
    },
}
GRANITE_H_SMALL = {
    "vocab_size": 100_352,
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "layer_types": ["attention" if layer % 10 == 5 else "mamba" for layer in range(40)],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 16.0,
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "intermediate_size": 768,
    "shared_intermediate_size": 1536,
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# Initial values, which config.json has of the released class and our presets of the recipe that trained it.
INITIAL = {"initializer_range": None, "megatron_init": None}
# What an imported configuration does not know, because config.json does not say it.
TRAINING_ONLY = {"bias_update_rate", "auxiliary_loss_weight", "sequence_loss_weight", "z_loss_weight"}


def load(name):
    return load_checked(CONFIGS / f"{name}.yaml")


def count_on_meta(build):
    """Parameters of a module built without memory; shared ones once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def sizes_of(model):
    """A model's configuration as plain values, with the pattern spelled out and without training-only settings."""
    fields = model.model_dump() | {"pattern": "".join(model.letters), "mtp": None}
    if fields["mamba"] is not None:
        fields["mamba"] = fields["mamba"] | {"keep_states": None}  # what training keeps in memory, not what is computed
    return fields | {"moe": {key: value for key, value in fields["moe"].items() if key not in TRAINING_ONLY}}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_breaks_no_rule_and_its_model_can_be_built(name):
    config = load(name).model
    model = HybridModel(config, single_rank_groups(), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total


def test_turbos_has_its_published_size_and_blocks():
    config = load("turbos_560b")
    counts = count_parameters(config.model)
    assert counts.total == pytest.approx(560e9, rel=0.01)
    assert counts.active == pytest.approx(56e9, rel=0.02)
    assert config.model.parsed_pattern.counts() == {"M": 57, "*": 7, "E": 64}


def test_turbos_has_the_four_stages_of_its_report():
    config = load("turbos_560b")
    stages = resolve_stages(config)
    assert [stage.num_tokens() for stage in stages] == pytest.approx([16e12, 300e9, 30e9, 20e9], rel=1e-3)
    assert [stage.train.sequence_length for stage in stages] == [4096, 4096, 32_768, 262_144]
    assert [stage.config.model.attention.rope.ntk_alpha for stage in stages] == [None, None, 50, 1000]
    assert {stage.train.global_batch_size * stage.train.sequence_length for stage in stages} == {2048 * 4096}
    rates = [stage.rate(stage.last_step) for stage in stages]
    assert rates == pytest.approx([3e-4, 5e-6, 5e-6, 5e-6], rel=1e-3)


def test_jamba_has_its_published_size():
    config = load("jamba1.5_large_like")
    counts = count_parameters(config.model)
    assert counts.total == pytest.approx(398e9, rel=0.01)
    assert counts.active == pytest.approx(94e9, rel=0.01)
    assert config.model.parsed_pattern.counts() == {"M": 63, "*": 9, "-": 36, "E": 36}


@pytest.mark.parametrize(
    ("name", "total", "active"),
    # Active parameters are published with the embedding's table left out: one row of it serves a token.
    [
        ("nemotron3_nano_30b", 31.6e9, 3.2e9),
        ("nemotron3_super_120b", 120e9, 12e9),
        ("nemotron3_ultra_550b", 550e9, 55e9),
    ],
)
def test_nemotron_has_its_published_size(name, total, active):
    model = load(name).model
    # The published sizes are without multi-token prediction, whose module Super and Ultra have besides.
    counts = count_parameters(model.without_depths())
    assert counts.total == pytest.approx(total, rel=0.015)
    assert counts.active - counts.active_by_kind["embedding"] == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize("name", PUBLIC)
def test_nemotron_is_its_public_configuration_in_the_class_of_transformers(name):
    public = transformers.NemotronHConfig(**PUBLIC[name])
    preset = load(name).model
    read = model_config_from_huggingface(public.to_dict())
    assert sizes_of(preset) | INITIAL == sizes_of(read) | INITIAL
    # The depths of the release are one module, which training used twice.
    assert read.num_depths == preset.num_depth_modules
    assert read.parsed_pattern.depth_letters == preset.parsed_pattern.depth_letters
    plain = count_parameters(preset.without_depths()).total
    assert plain == count_on_meta(lambda: transformers.NemotronHForCausalLM(public))


def test_granite_is_its_public_configuration_in_the_class_of_transformers():
    public = transformers.GraniteMoeHybridConfig(**GRANITE_H_SMALL)
    preset = load("granite4_h_small").model
    imported = model_config_from_huggingface(public.to_dict())
    assert sizes_of(preset) | {"attention": None} == sizes_of(imported) | {"attention": None}
    ours, theirs = preset.attention, imported.attention
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (
        theirs.num_heads,
        theirs.num_kv_heads,
        theirs.head_dim,
    )
    # 1 / head_dim, which is not the usual root of it.
    assert ours.softmax_scale == theirs.softmax_scale == 1 / ours.head_dim
    counted = count_on_meta(lambda: transformers.GraniteMoeHybridForCausalLM(public))
    assert count_parameters(preset).total == counted
    assert counted == pytest.approx(32e9, rel=0.02)


def test_qwen3_next_is_its_public_configuration_in_the_class_of_transformers():
    # The class's defaults are the released 80B-A3B, but for the base of its positions.
    rope = {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25}
    public = transformers.Qwen3NextConfig(rope_parameters=rope)
    preset = load("qwen3_next_80b").model
    assert sizes_of(preset) == sizes_of(model_config_from_huggingface(public.to_dict()))
    counts = count_parameters(preset)
    assert counts.total == count_on_meta(lambda: transformers.Qwen3NextForCausalLM(public))
    # 80B total and 3B active in its name; the embedding's table left out.
    assert counts.total == pytest.approx(80e9, rel=0.01)
    assert counts.active - counts.active_by_kind["embedding"] == pytest.approx(3.5e9, rel=0.1)


def test_kimi_linear_is_its_public_configuration_in_the_class_of_transformers():
    latent = {*range(3, 27, 4), 26}
    kinds = ["full_attention" if layer in latent else "linear_attention" for layer in range(27)]
    public = transformers.KimiLinearConfig(layer_types=kinds)
    preset = load("kimi_linear_48b").model
    assert sizes_of(preset) == sizes_of(model_config_from_huggingface(public.to_dict()))
    counts = count_parameters(preset)
    assert counts.total == count_on_meta(lambda: transformers.KimiLinearForCausalLM(public))
    # 48B total and 3B active in its name.
    assert counts.total == pytest.approx(48e9, rel=0.03)


def test_lfm2_is_its_public_configuration_in_the_class_of_transformers():
    kinds = ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)]
    # Sizes of the release are the class's defaults, but for its layers.
    public = transformers.Lfm2MoeConfig(layer_types=kinds, num_hidden_layers=24)
    preset = load("lfm2_8b_a1b").model
    assert sizes_of(preset) == sizes_of(model_config_from_huggingface(public.to_dict()))
    counts = count_parameters(preset)
    assert counts.total == count_on_meta(lambda: transformers.Lfm2MoeForCausalLM(public))
    # 8.3B total and 1.5B active, says its model card.
    assert counts.total == pytest.approx(8.3e9, rel=0.01)
    assert counts.active == pytest.approx(1.5e9, rel=0.05)


def test_gpt_oss_has_the_sizes_of_its_public_configuration_without_its_biases():
    # Sizes of the larger release are the class's defaults; rows up to its original length need no stretch.
    public = transformers.GptOssConfig(
        num_hidden_layers=24,
        num_local_experts=32,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
    )
    preset = load("gpt_oss_20b_like").model
    read = model_config_from_huggingface(public.to_dict())
    assert sizes_of(preset) == sizes_of(read.model_copy(update={"moe": read.moe.model_copy(update={"bias": False})}))
    counts = count_parameters(preset)
    biases = 24 * 32 * (1 + 2 * 2880 + 2880)
    assert counts.total == count_on_meta(lambda: transformers.GptOssForCausalLM(public)) - biases
    # 20.9B total and 3.6B active, says its model card, the embedding's table left out.
    assert counts.total == pytest.approx(20.9e9, rel=0.005)
    assert counts.active - counts.active_by_kind["embedding"] == pytest.approx(3.6e9, rel=0.01)


def test_falcon_h1_has_the_size_in_its_name_in_the_class_of_transformers():
    preset = load("falcon_h1_7b_like").model
    fields = huggingface_config(preset, "falcon_h1", TokenIds(None, None, None), max_position_embeddings=4096)
    fields.pop("architectures")
    theirs = transformers.FalconH1Config(**fields)
    total = count_parameters(preset).total
    assert total == count_on_meta(lambda: transformers.FalconH1ForCausalLM(theirs))
    assert total == pytest.approx(7.59e9, rel=0.002)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("ladder")])
def test_ladder_rung_can_be_exported_to_the_native_class(name):
    config = load(name)
    assert config.export.target == "nemotron_h"
    fields = huggingface_config(config.model, "nemotron_h", TokenIds(None, None, None), max_position_embeddings=4096)
    fields.pop("architectures")
    theirs = transformers.NemotronHConfig(**fields)
    assert count_on_meta(lambda: transformers.NemotronHForCausalLM(theirs)) == count_parameters(config.model).total


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("ladder_20m", 21.4e6, 13.1e6),
        ("ladder_150m", 150e6, 69e6),
        ("ladder_1b_a300m", 1.0e9, 0.32e9),
        ("ladder_1b_muon", 1.0e9, 0.32e9),
        ("ladder_8b_a1b", 7.7e9, 1.05e9),
    ],
)
def test_ladder_rung_has_the_size_that_its_file_states(name, total, active):
    counts = count_parameters(load(name).model)
    assert counts.total == pytest.approx(total, rel=0.01)
    assert counts.active == pytest.approx(active, rel=0.02)
