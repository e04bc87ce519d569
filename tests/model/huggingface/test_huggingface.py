"""Our model and the transformers classes are one function: logits and every weight's gradient agree in float32."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor

from model.config.schema import (
    AttentionConfig,
    FeedForwardConfig,
    Mamba2Config,
    ModelConfig,
    MultipliersConfig,
    RopeConfig,
)
from model.huggingface.config import TokenIds, huggingface_config, model_config_from_huggingface
from model.huggingface.targets import choose_target, explain_unfit
from model.huggingface.weights import weight_map, weight_shapes
from model.hybrid import HybridModel
from model.packing import PackMeta
from model.parallel.groups import single_rank_groups
from tests.model.huggingface.cases import (
    CASES,
    GRANITE,
    NEMOTRON_H,
    QWEN3_NEXT,
    VOCABULARY,
    delta_mixers,
    granite_config,
    grouped,
    nemotron_h_config,
    qwen3_5_moe_config,
    qwen3_next_config,
)

# Both sides compute in float32 and add in another order; the largest number of a tensor sets its scale.
RELATIVE_TOLERANCE = 1e-5
# Our own float32 gradients, which pass every layer twice: up to 1.3e-5 from float64 on one processor. As whole models elsewhere.
GRADIENT_TOLERANCE = 5e-5


# The name of a case begins with its class.
TARGETED = {name: (name.split(",")[0], config) for name, config in CASES.items()}


def build_ours(config: ModelConfig, seed: int = 0) -> HybridModel:
    """A model whose weights are large enough for every part to matter, with a bias that moves the routing."""
    model = HybridModel(config, single_rank_groups(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith((".D", "conv.bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            elif not name.endswith(("A_log", "dt_bias")):
                parameter.mul_(6.0)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.eval()


def load_into_transformers(ours: HybridModel, tmp_path, target: str = "auto") -> torch.nn.Module:
    """The transformers model with our weights, through our maps and the files that an export writes."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = ours.config
    target = choose_target(config) if target == "auto" else target
    assert target != "own", explain_unfit(config, target)
    assert not explain_unfit(config, target)
    state = {name: tensor.detach() for name, tensor in ours.state_dict().items()}
    theirs = {name: tensor.clone() for name, tensor in weight_map(config, target).to_theirs(state).items()}
    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = huggingface_config(config, target, TokenIds(None, 2, None), max_position_embeddings=128)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    scale = max(float(theirs.abs().max()), 1e-6)
    return float((ours - theirs).abs().max()) / scale


@pytest.mark.parametrize(("target", "config"), TARGETED.values(), ids=TARGETED.keys())
def test_logits_and_all_gradients_equal_transformers(target: str, config: ModelConfig, tmp_path) -> None:
    ours = build_ours(config)
    theirs = load_into_transformers(ours, tmp_path, target)
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 37), generator=generator)
    weight_BTV = torch.randn(2, 37, VOCABULARY, generator=generator)

    logits_BTV = ours(tokens_BT, PackMeta.one_document_a_row(2, 37)).logits_BTV
    their_logits_BTV = theirs(tokens_BT, use_cache=False).logits
    assert float(their_logits_BTV.std()) > 0.05, "the comparison would not see an error"
    assert relative_difference(logits_BTV, their_logits_BTV) < RELATIVE_TOLERANCE
    assert torch.equal(logits_BTV.argmax(-1), their_logits_BTV.argmax(-1))

    (logits_BTV * weight_BTV).sum().backward()
    (their_logits_BTV * weight_BTV).sum().backward()
    exact = copy.deepcopy(ours).double()
    exact.zero_grad()
    (exact(tokens_BT, PackMeta.one_document_a_row(2, 37)).logits_BTV * weight_BTV).sum().backward()
    exact_gradients = {name: parameter.grad for name, parameter in exact.named_parameters()}
    their_gradients = gradients_by_our_name(ours, theirs, target)
    compared = 0
    for name, parameter in ours.named_parameters():
        rounded = relative_difference(parameter.grad, their_gradients[name])
        unrounded = relative_difference(exact_gradients[name], their_gradients[name])
        # A wrong map or formula shows in both; rounding that one side has alone shows in one.
        assert min(rounded, unrounded) < RELATIVE_TOLERANCE, (name, rounded, unrounded)
        assert rounded < GRADIENT_TOLERANCE, (name, rounded)
        compared += 1
    assert compared == len(list(ours.parameters()))


def gradients_by_our_name(ours: HybridModel, theirs: torch.nn.Module, target: str) -> dict[str, Tensor]:
    """Gradients of the transformers model under our names; a tied weight's are the sum over its places."""
    from transformers.core_model_loading import revert_weight_conversion

    raw = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    on_disk = revert_weight_conversion(theirs, raw)
    weights, gradients = ours.state_dict(), dict[str, Tensor]()
    for entry in weight_map(ours.config, target).entries:
        if entry.ours.endswith("expert_bias"):
            continue
        # Through the map itself: some of theirs are twice ours.
        own = {name: weights[name].detach().clone().requires_grad_() for name in entry.our_names()}
        parts = [(part, on_disk[name]) for name, part in entry.write(own).items() if name in on_disk]
        found = torch.autograd.grad([part for part, _ in parts], list(own.values()), [other for _, other in parts])
        for name, gradient in zip(own, found, strict=True):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return gradients


@pytest.mark.parametrize(("target", "config"), TARGETED.values(), ids=TARGETED.keys())
def test_maps_cover_every_weight_and_go_back_without_change(target: str, config: ModelConfig) -> None:
    ours = build_ours(config).state_dict()
    assert weight_shapes(config) == {name: tuple(tensor.shape) for name, tensor in ours.items()}
    mapping = weight_map(config, target)
    back = mapping.to_ours(mapping.to_theirs(ours))
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        if target.startswith("qwen3") and name.endswith("norm.weight"):
            # Norms of the class are 1 + w: what is below 0.5 is rounded.
            assert float((back[name] - tensor).abs().max()) <= 2**-24
            tensor = torch.where(tensor < 0.5, back[name], tensor)
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(("target", "config"), TARGETED.values(), ids=TARGETED.keys())
def test_config_json_gives_the_configuration_back(target: str, config: ModelConfig) -> None:
    none = TokenIds(None, None, None)
    fields = huggingface_config(config, target, none, max_position_embeddings=64)
    read = model_config_from_huggingface(fields)
    again = huggingface_config(read, target, none, max_position_embeddings=64)
    assert again == fields
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields, "JSON must hold every field"


UNFIT = {
    "nemotron_h": {
        "model.moe.activation=swiglu": {"moe": grouped(NEMOTRON_H.moe, activation="swiglu")},
        "model.moe.router=softmax": {"moe": grouped(NEMOTRON_H.moe, router="softmax")},
        "num_router_groups=4": {"moe": grouped(NEMOTRON_H.moe, num_router_groups=4, router_group_top_k=2)},
        "model.moe.expert_hidden_size=12": {"moe": grouped(NEMOTRON_H.moe, expert_hidden_size=12)},
        "model.moe.latent_size=6": {"moe": grouped(NEMOTRON_H.moe, latent_size=6)},
        "model.hidden_size=20": {"hidden_size": 20},
        "model.feed_forward.activation=swiglu": {
            "feed_forward": FeedForwardConfig(hidden_size=20, activation="swiglu")
        },
        "model.attention.positions=rope": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=12, positions="rope")
        },
        "model.attention.qk_norm=true": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=12, qk_norm=True)
        },
        "model.attention.softmax_scale=0.5": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=12, softmax_scale=0.5)
        },
        "model.attention.gate=element": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=12, gate="element")
        },
        "model.moe.shared_expert_gate=true": {"moe": grouped(NEMOTRON_H.moe, shared_expert_gate=True)},
        "model.multipliers.residual=0.5": {"multipliers": MultipliersConfig(residual=0.5)},
    },
    "granitemoehybrid": {
        "model.pattern=MM*E": {"pattern": "MM*E"},
        "model.pattern=MEM": {"pattern": "MEM"},
        "model.pattern=MEM-": {
            "pattern": "MEM-",
            "feed_forward": FeedForwardConfig(hidden_size=8, activation="swiglu"),
        },
        "model.moe.activation=squared_relu": {"moe": grouped(GRANITE.moe, activation="squared_relu")},
        "model.moe.router=sigmoid": {"moe": grouped(GRANITE.moe, router="sigmoid")},
        "model.moe.normalize_probabilities=false": {"moe": grouped(GRANITE.moe, normalize_probabilities=False)},
        "model.moe.routed_scaling=2.5": {"moe": grouped(GRANITE.moe, routed_scaling=2.5)},
        "model.moe.num_router_groups=2": {"moe": grouped(GRANITE.moe, num_router_groups=2, router_group_top_k=2)},
        "model.moe.expert_bias=true": {"moe": grouped(GRANITE.moe, expert_bias=True)},
        "model.moe.latent_size=8": {"moe": grouped(GRANITE.moe, latent_size=8)},
        "model.feed_forward.activation=squared_relu": {
            "pattern": "M-",
            "feed_forward": FeedForwardConfig(hidden_size=8, activation="squared_relu"),
        },
        "head_dim=8 = 32": {"attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=8)},
        "model.attention.qk_norm=true": {
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6, qk_norm=True)
        },
        "model.attention.rope.fraction=0.5": {
            "attention": AttentionConfig(
                num_heads=4, num_kv_heads=1, head_dim=6, positions="rope", rope=RopeConfig(fraction=0.5)
            )
        },
        "= 28: granitemoehybrid needs": {"mamba": Mamba2Config(num_heads=7, head_dim=4, num_groups=1)},
    },
    "qwen3_next": {
        "model.pattern=GE*": {"pattern": "GE*"},
        "model.pattern=MEG-": {"pattern": "MEG-", "mamba": GRANITE.mamba},
        "allow_negative_eigenvalues=true": {"mixers": delta_mixers(allow_negative_eigenvalues=True)},
        "conv_kernel=0": {"mixers": delta_mixers(conv_kernel=0)},
        "model.attention.qk_norm=false": {"attention": QWEN3_NEXT.attention.model_copy(update={"qk_norm": False})},
        "model.attention.positions=none": {"attention": QWEN3_NEXT.attention.model_copy(update={"positions": "none"})},
        "model.attention.softmax_scale=0.5": {
            "attention": QWEN3_NEXT.attention.model_copy(update={"softmax_scale": 0.5})
        },
        "model.attention.gate=head": {"attention": QWEN3_NEXT.attention.model_copy(update={"gate": "head"})},
        "model.multipliers.logits=0.5": {"multipliers": MultipliersConfig(logits=0.5)},
        "model.moe.activation=squared_relu": {"moe": grouped(QWEN3_NEXT.moe, activation="squared_relu")},
        "model.moe.router=sigmoid": {"moe": grouped(QWEN3_NEXT.moe, router="sigmoid")},
        "model.moe.routed_scaling=2.5": {"moe": grouped(QWEN3_NEXT.moe, routed_scaling=2.5)},
        "model.moe.num_router_groups=2": {"moe": grouped(QWEN3_NEXT.moe, num_router_groups=2, router_group_top_k=2)},
        "model.moe.expert_bias=true": {"moe": grouped(QWEN3_NEXT.moe, expert_bias=True)},
        "model.moe.latent_size=8": {"moe": grouped(QWEN3_NEXT.moe, latent_size=8)},
        "model.moe.expert_hidden_size=12": {"moe": grouped(QWEN3_NEXT.moe, expert_hidden_size=12)},
        "model.feed_forward.activation=squared_relu": {
            "feed_forward": FeedForwardConfig(hidden_size=8, activation="squared_relu"),
        },
    },
    "qwen3_5_moe": {
        "model.pattern=GE*-": {"pattern": "GE*-"},
        "model.moe.normalize_probabilities=false": {"moe": grouped(QWEN3_NEXT.moe, normalize_probabilities=False)},
        "of qwen3_5_moe, it scores experts with a softmax": {"moe": grouped(QWEN3_NEXT.moe, router="sigmoid")},
    },
}
BASES = {
    "nemotron_h": nemotron_h_config,
    "granitemoehybrid": granite_config,
    "qwen3_next": qwen3_next_config,
    "qwen3_5_moe": qwen3_5_moe_config,
}


@pytest.mark.parametrize(
    ("target", "expected", "changes"),
    [(target, expected, changes) for target, cases in UNFIT.items() for expected, changes in cases.items()],
)
def test_each_choice_a_class_cannot_hold_is_named_with_a_remedy(target: str, expected: str, changes: dict) -> None:
    base = BASES[target]
    assert explain_unfit(base(), target) == []
    (reason,) = explain_unfit(base(**changes), target)
    assert expected in reason
    assert "; " in reason and "own" in reason, "a remedy is missing"
    assert choose_target(base(**changes)) != target
    assert explain_unfit(base(**changes), "own") == []


def test_sections_that_the_pattern_does_not_use_stop_no_target() -> None:
    config = nemotron_h_config(pattern="M-", moe=grouped(NEMOTRON_H.moe, activation="swiglu"))
    assert choose_target(config) == "nemotron_h"


def test_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="'mamba2' is unknown; use auto, nemotron_h"):
        explain_unfit(NEMOTRON_H, "mamba2")


def test_time_step_is_not_clamped_at_run_time(tmp_path) -> None:
    # The class clamps dt to time_step_min, by default 0.001: with steps below that the default gives other logits.
    ours = build_ours(NEMOTRON_H)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("dt_bias"):
                parameter.fill_(-9.0)
    tokens_BT = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = ours(tokens_BT, PackMeta.one_document_a_row(1, 40)).logits_BTV
        theirs = load_into_transformers(ours, tmp_path)
        assert relative_difference(expected, theirs(tokens_BT).logits) < RELATIVE_TOLERANCE
        for layer in theirs.model.layers:
            if layer.block_type == "linear_attention":
                layer.mixer.time_step_limit = (0.001, float("inf"))
        assert relative_difference(expected, theirs(tokens_BT).logits) > 100 * RELATIVE_TOLERANCE


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


def test_bf16_stays_close_in_distribution(tmp_path) -> None:
    # Tokens near a routing boundary choose other experts in bf16, so single logits may be far off: the distribution of
    # the next token is what can be promised.
    ours = build_ours(NEMOTRON_H)
    theirs = load_into_transformers(ours, tmp_path).to(torch.bfloat16)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = ours(tokens_BT, PackMeta.one_document_a_row(2, 64)).logits_BTV.log_softmax(-1)
        rounded = theirs(tokens_BT).logits.float().log_softmax(-1)
    divergence = (exact.exp() * (exact - rounded)).sum(-1)
    assert float(divergence.mean()) < 0.01
    assert float((exact.argmax(-1) == rounded.argmax(-1)).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type=llama cannot be imported"),
        ({"use_bias": True}, "use_bias=True cannot be imported; our model has use_bias=False only"),
        ({"sliding_window": 128}, "sliding_window=128 cannot be imported"),
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
        mapping.to_ours(theirs | {attention: theirs[attention] + 1})
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


def test_missing_and_foreign_tensors_are_named() -> None:
    mapping = weight_map(NEMOTRON_H, "nemotron_h")
    theirs = mapping.to_theirs(build_ours(NEMOTRON_H).state_dict())
    del theirs["lm_head.weight"]
    theirs["stray"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\], unknown \['stray'\]"):
        mapping.to_ours(theirs)


def test_a_tied_head_that_was_changed_is_refused() -> None:
    config = nemotron_h_config(tie_embeddings=True)
    mapping = weight_map(config, "nemotron_h")
    theirs = mapping.to_theirs(build_ours(config).state_dict())
    assert torch.equal(theirs["lm_head.weight"], theirs["backbone.embeddings.weight"])
    theirs["lm_head.weight"] = theirs["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="no longer tied"):
        mapping.to_ours(theirs)
