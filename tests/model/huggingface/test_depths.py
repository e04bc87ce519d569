"""MTP layers in exports: their names, the same logits without them, and what has no place for them."""

from __future__ import annotations

import pytest
import torch

from amfm.model.config.schema import ModelConfig, MtpConfig
from amfm.model.huggingface.classes import (
    TokenIds,
    huggingface_config,
    left_out_depths,
    model_config_from_huggingface,
    weight_map,
)
from amfm.model.huggingface.depths import count_depths
from amfm.model.huggingface.hf_class import Target
from amfm.model.packing import PackMeta
from amfm.model.shapes import weight_shapes
from tests.model.huggingface.cases import (
    VOCABULARY,
    build_ours,
    gated,
    granite_config,
    nemotron_h_config,
    qwen3_next_config,
)
from tests.model.huggingface.test_huggingface import load_into_transformers

NONE = TokenIds(None, None, None)
CASES: dict[str, tuple[Target, ModelConfig]] = {
    "nemotron_h, two": ("nemotron_h", nemotron_h_config(pattern="M*EM/*E/*E")),
    "nemotron_h, shared": ("nemotron_h", nemotron_h_config(pattern="M*/*E/*E", mtp=MtpConfig(shared=True))),
    "qwen3_next": ("qwen3_next", qwen3_next_config(pattern="GE*-/*E")),
    "qwen3_next, gated": ("qwen3_next", gated(qwen3_next_config(pattern="GE*-/*E/*E", mtp=MtpConfig(shared=True)))),
}


@pytest.mark.parametrize(("target", "config"), CASES.values(), ids=CASES.keys())
def test_an_export_with_depths_has_the_logits_of_one_without(target: Target, config: ModelConfig, tmp_path) -> None:
    ours = build_ours(config)
    assert weight_shapes(config) == {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    # The loader finds every weight of its class, and passes over those of the depths.
    theirs = load_into_transformers(ours, tmp_path, target)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 37), generator=torch.Generator().manual_seed(1))
    logits_BTV = ours(tokens_BT, PackMeta.one_document_a_row(2, 37)).logits_BTV
    difference = (logits_BTV - theirs(tokens_BT, use_cache=False).logits).abs().max()
    assert float(difference) < 1e-5 * float(logits_BTV.abs().max())


@pytest.mark.parametrize(("target", "config"), CASES.values(), ids=CASES.keys())
def test_depths_come_back_from_an_export(target: Target, config: ModelConfig) -> None:
    state = build_ours(config).state_dict()
    assert left_out_depths(config, target) is None
    mapping = weight_map(config, target)
    theirs = mapping.to_theirs(state)
    back = mapping.to_ours(theirs)
    assert all(torch.allclose(back[name], value, rtol=0, atol=2**-24) for name, value in state.items())
    fields = huggingface_config(config, target, NONE, max_position_embeddings=64)
    read = model_config_from_huggingface(fields)
    # One module for several depths is one depth there.
    assert read.num_depths == config.num_depth_modules
    assert read.parsed_pattern.depth_letters == config.parsed_pattern.depth_letters


def test_names_are_those_that_engines_read() -> None:
    _, config = CASES["nemotron_h, two"]
    names = {name for name in weight_map(config, "nemotron_h").their_names() if name.startswith("mtp.")}
    of_layer = {
        place: {n.split(".", 3)[3] for n in names if n.startswith(f"mtp.layers.{place}.")} for place in range(4)
    }
    start = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
    attention = {f"mixer.{part}_proj.weight" for part in "qkvo"} | {"norm.weight"}
    assert of_layer[0] == of_layer[2] == start | attention
    assert of_layer[1] == of_layer[3]
    assert {"norm.weight", "final_layernorm.weight", "mixer.gate.weight", "mixer.experts.3.up_proj.weight"} < of_layer[
        1
    ]
    fields = huggingface_config(config, "nemotron_h", NONE, max_position_embeddings=64)
    assert fields["num_nextn_predict_layers"] == 2 and fields["mtp_layers_block_type"] == ["attention", "moe"]
    _, config = CASES["qwen3_next"]
    names = {name for name in weight_map(config, "qwen3_next").their_names() if name.startswith("mtp.")}
    assert {"mtp.fc.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"} < names
    assert {"mtp.norm.weight", "mtp.layers.0.input_layernorm.weight", "mtp.layers.0.self_attn.q_proj.weight"} < names
    assert {"mtp.layers.0.post_attention_layernorm.weight", "mtp.layers.0.mlp.shared_expert_gate.weight"} < names


def test_the_projection_reads_the_embedding_first() -> None:
    _, config = CASES["nemotron_h, two"]
    state = build_ours(config).state_dict()
    theirs = weight_map(config, "nemotron_h").to_theirs(state)
    assert torch.equal(theirs["mtp.layers.0.eh_proj.weight"], state["mtp.0.in_proj.weight"])
    assert torch.equal(theirs["mtp.layers.0.enorm.weight"], state["mtp.0.embed_norm.weight"])


@pytest.mark.parametrize(
    ("target", "config", "reason"),
    [
        ("granitemoehybrid", granite_config(pattern="ME/*E"), "granitemoehybrid has no place for them"),
        ("own", nemotron_h_config(pattern="M*/*E"), "own has no place for them"),
        ("qwen3_next", qwen3_next_config(pattern="GE/*-"), "one module of attention and experts"),
        ("qwen3_next", qwen3_next_config(pattern="GE/*E/*E"), "one module of attention and experts"),
        ("nemotron_h", nemotron_h_config(pattern="M/GE", mixers=qwen3_next_config().mixers), "has no such block"),
    ],
)
def test_what_has_no_place_for_depths_leaves_them_out(target: Target, config: ModelConfig, reason: str) -> None:
    assert reason in (left_out_depths(config, target) or "")
    assert left_out_depths(config.without_depths(), target) is None


def test_a_number_of_depths_beyond_reason_is_refused() -> None:
    with pytest.raises(ValueError, match="num_nextn_predict_layers=1000000000000 must be from 0 to 64"):
        count_depths({"num_nextn_predict_layers": 10**12})
