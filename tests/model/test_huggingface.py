"""Our model and the transformers classes are one function: logits and every weight's gradient agree in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import AttentionConfig, FeedForwardConfig, Mamba2Config, ModelConfig, MoeConfig, RopeConfig
from model.groups import single_rank_groups
from model.huggingface import choose_target, explain_unfit
from model.huggingface_config import TokenIds, huggingface_config
from model.huggingface_weights import weight_map
from model.hybrid import HybridModel
from model.packing import PackMeta

# Both sides compute in float32 and add in another order; the largest number of a tensor sets its scale.
RELATIVE_TOLERANCE = 1e-5
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


def grouped(moe: MoeConfig | None, **changes) -> MoeConfig:
    assert moe is not None
    return moe.model_copy(update=changes)


NEMOTRON_H = nemotron_h_config()
GRANITE = granite_config()
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
    "granitemoehybrid, dense": granite_config(
        pattern="M-*-", moe=None, feed_forward=FeedForwardConfig(hidden_size=20, activation="swiglu")
    ),
}


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


def load_into_transformers(ours: HybridModel, tmp_path) -> torch.nn.Module:
    """The transformers model with our weights, through our maps and the files that an export writes."""
    import json

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = ours.config
    target = choose_target(config)
    assert target != "own", explain_unfit(config, target)
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


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_logits_and_all_gradients_equal_transformers(config: ModelConfig, tmp_path) -> None:
    ours = build_ours(config)
    theirs = load_into_transformers(ours, tmp_path)
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
    their_gradients = gradients_by_our_name(config, theirs)
    compared = 0
    for name, parameter in ours.named_parameters():
        difference = relative_difference(parameter.grad, their_gradients[name])
        assert difference < RELATIVE_TOLERANCE, (name, difference)
        compared += 1
    assert compared == len(list(ours.parameters()))


def gradients_by_our_name(config: ModelConfig, theirs: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of the transformers model under our names; a tied weight's are the sum over its places."""
    from transformers.core_model_loading import revert_weight_conversion

    raw = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    on_disk = revert_weight_conversion(theirs, raw)
    gradients: dict[str, Tensor] = {}
    for entry in weight_map(config, choose_target(config)).entries:
        if entry.ours.endswith("expert_bias"):
            continue
        gradient = entry.join(on_disk)
        gradients[entry.ours] = gradients[entry.ours] + gradient if entry.ours in gradients else gradient
    return gradients
