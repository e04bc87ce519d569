"""Mixers that transformers has too compute what its layers compute, with gradients, on the same weights in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amfm.model.mixers.base import LinearMixer
from amfm.model.packing import PackMeta
from tests.helpers.numbers import assert_near
from tests.model.small_models import small_config, small_model

pytest.importorskip("transformers", reason="transformers is not installed")

# Both sides add in float32, in chunks of other sizes.
FLOAT32 = 1e-5
WIDTH, ROWS, TOKENS = 12, 2, 21


def our_mixer(pattern: str, index: int = 0, **mixers: dict) -> LinearMixer:
    model = small_model(small_config(pattern, mixers=mixers), dtype=torch.float32)
    mixer = model.blocks[index].mixer
    assert isinstance(mixer, LinearMixer)
    return mixer


def put(peer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives the peer exactly these parameters."""
    missing, unknown = peer.load_state_dict(
        {name: weight.detach().clone() for name, weight in weights.items()}, strict=False
    )
    buffers = dict(peer.named_buffers())
    assert not unknown and set(missing) <= set(buffers), (missing, unknown)


def compare(ours: Callable[[Tensor], Tensor], peer: Callable[[Tensor], Tensor], tolerance: float = FLOAT32) -> None:
    """Outputs and the gradient of the input."""
    generator = torch.Generator().manual_seed(2)
    x_BTD = torch.randn(ROWS, TOKENS, WIDTH, generator=generator).requires_grad_()
    expected, actual = peer(x_BTD), ours(x_BTD)
    assert float(expected.std()) > 1e-3, "the comparison would not see an error"
    assert_near(actual, expected, tolerance, "outputs")
    weight = torch.randn(expected.shape, generator=generator)
    (expected_BTD,) = torch.autograd.grad((expected * weight).sum(), x_BTD)
    (actual_BTD,) = torch.autograd.grad((actual * weight).sum(), x_BTD)
    assert_near(actual_BTD, expected_BTD, 5 * tolerance, "the input's gradient")


def whole_rows(mixer: LinearMixer) -> Callable[[Tensor], Tensor]:
    return lambda x_BTD: mixer(x_BTD, PackMeta.one_document_a_row(ROWS, TOKENS)).y_BTD


DELTA = {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "value_head_dim": 5, "conv_kernel": 3, "chunk_size": 8}
DELTA_FIELDS = {
    "hidden_size": WIDTH,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 3,
    "rms_norm_eps": 1e-5,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


def delta_parts(mixer: LinearMixer) -> dict[str, Tensor]:
    """Rows of the projection by what they give."""
    sizes = {name: part.size for name, part in mixer.parts().items() if part.units is not None}
    return dict(zip(sizes, mixer.in_proj.weight.split(list(sizes.values()))))


def test_gated_deltanet_equals_the_layer_of_qwen3_next() -> None:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    mixer = our_mixer("G", gated_deltanet=DELTA)
    peer = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**DELTA_FIELDS), 0)
    # A key head's q, k, v and gate stand together there, and so do beta and what decides the decay.
    by_key_head = {name: rows.unflatten(0, (2, -1)) for name, rows in delta_parts(mixer).items()}
    weights = {
        "in_proj_qkvz.weight": torch.cat([by_key_head[name] for name in ("q", "k", "v", "gate")], dim=1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat([by_key_head["beta"], by_key_head["decay"]], dim=1).flatten(0, 1),
        "conv1d.weight": mixer.conv.weight[:, None],
        "norm.weight": mixer.norm.weight,
        "out_proj.weight": mixer.out_proj.weight,
        "A_log": mixer.A_log,
        "dt_bias": mixer.dt_bias,
    }
    put(peer, weights)
    compare(whole_rows(mixer), peer)


@pytest.mark.parametrize("is_negative", [False, True], ids=["beta below 1", "beta below 2"])
def test_gated_deltanet_equals_the_layer_of_olmo_hybrid(is_negative: bool) -> None:
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    # Its recurrence has as many key heads as value heads.
    options = DELTA | {"num_key_heads": 4, "allow_negative_eigenvalues": is_negative}
    fields = DELTA_FIELDS | {"linear_num_key_heads": 4, "linear_allow_neg_eigval": is_negative}
    mixer = our_mixer("G", gated_deltanet=options)
    peer = OlmoHybridGatedDeltaNet(OlmoHybridConfig(**fields, num_attention_heads=4), 0)
    names = {"q": "q", "k": "k", "v": "v", "decay": "a", "beta": "b", "gate": "g"}
    weights = {f"{names[part]}_proj.weight": rows for part, rows in delta_parts(mixer).items()}
    weights |= {
        "conv1d.weight": mixer.conv.weight[:, None],
        "o_norm.weight": mixer.norm.weight,
        "o_proj.weight": mixer.out_proj.weight,
        "A_log": mixer.A_log,
        "dt_bias": mixer.dt_bias,
    }
    put(peer, weights)
    compare(whole_rows(mixer), peer)


def test_kda_equals_the_layer_of_kimi_linear() -> None:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    mixer = our_mixer("K", kda={"num_heads": 3, "head_dim": 6, "conv_kernel": 3, "chunk_size": 8})
    config = KimiLinearConfig(
        hidden_size=WIDTH,
        linear_num_heads=3,
        linear_head_dim=6,
        linear_conv_kernel_dim=3,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-5,
    )
    peer = KimiLinearDeltaAttention(config, 0)
    weights = {f"{name}_proj.weight": rows for name, rows in delta_parts(mixer).items() if name in ("q", "k", "v")}
    decay_inside, gate_inside = mixer.shared_proj.chunk(2)
    weights |= {
        "b_proj.weight": mixer.in_proj.weight[-3:],
        "conv1d.weight": mixer.conv.weight[:, None],
        "forget_gate.f_a_proj.weight": decay_inside,
        "forget_gate.f_b_proj.weight": mixer.decay_proj,
        "forget_gate.dt_bias": mixer.dt_bias,
        "forget_gate.A_log": mixer.A_log.view(1, 1, 3, 1),
        "g_a_proj.weight": gate_inside,
        "g_b_proj.weight": mixer.gate_proj,
        "o_norm.weight": mixer.norm.weight,
        "o_proj.weight": mixer.out_proj.weight,
    }
    put(peer, weights)
    compare(whole_rows(mixer), peer)


@pytest.mark.parametrize("query_latent", [None, 9])
@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
def test_mla_equals_the_layers_of_deepseek_v3_and_kimi_linear(family: str, query_latent: int | None) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    sizes = {"latent_size": 7, "query_latent_size": query_latent, "nope_head_dim": 6, "rope_head_dim": 4}
    options = {"num_heads": 3, "value_head_dim": 5, "positions": "rope" if family == "deepseek_v3" else "none"}
    model = small_model(small_config("+", mixers={"mla": options | sizes}), dtype=torch.float32)
    mixer = model.blocks[0].mixer
    fields = {
        "hidden_size": WIDTH,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "kv_lora_rank": 7,
        "q_lora_rank": query_latent,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "num_hidden_layers": 1,
        "attn_implementation": "eager",
    }
    names = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out_proj": "o_proj"}
    names |= {"q_proj": "q_proj"} if query_latent is None else {
        "q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_proj": "q_b_proj",
    }  # fmt: skip
    mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None]
    if family == "kimi_linear":
        kimi_config = kimi.KimiLinearConfig(**fields, layer_types=["full_attention"])
        layer: nn.Module = kimi.KimiLinearAttention(kimi_config, 0)
        arguments: dict[str, Any] = {}
    else:
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        config = deepseek.DeepseekV3Config(**fields, rope_interleave=False, rope_parameters=rope)
        layer = deepseek.DeepseekV3Attention(config, 0)
        rotary = deepseek.DeepseekV3RotaryEmbedding(config)
        arguments = {"position_embeddings": rotary(torch.zeros(1), torch.arange(TOKENS)[None])}
    put(layer, {f"{theirs}.weight": getattr(mixer, ours).weight for ours, theirs in names.items()})
    compare(whole_rows(mixer), lambda x_BTD: layer(x_BTD, attention_mask=mask, **arguments)[0])


def mamba1_weights(mixer: Any) -> dict[str, Tensor]:
    """Ours under the names of the first Mamba's own code, which peers keep."""
    return {
        "in_proj.weight": mixer.in_proj.weight,
        "conv1d.weight": mixer.conv.weight[:, None],
        "x_proj.weight": mixer.x_proj.weight,
        "dt_proj.weight": mixer.dt_proj,
        "dt_proj.bias": mixer.dt_bias,
        "out_proj.weight": mixer.out_proj.weight,
        "A_log": mixer.A_log,
        "D": mixer.D,
    }


def test_mamba1_equals_the_layer_of_mamba() -> None:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer = our_mixer("{mamba1}", mamba1={"inner_size": 24, "state_size": 5, "dt_rank": 3, "chunk_size": 8})
    config = MambaConfig(
        hidden_size=WIDTH, state_size=5, expand=2, time_step_rank=3, num_hidden_layers=1, use_conv_bias=False
    )
    peer = MambaMixer(config, 0)
    put(peer, mamba1_weights(mixer))
    compare(whole_rows(mixer), peer)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_lightning_reads_what_the_layer_of_minimax_reads(layer: int) -> None:
    # What follows differs: a norm over all heads at once and a sigmoid gate there, a norm a head and a SiLU gate here.
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    mixer = our_mixer("L-L-L-", 2 * layer, lightning={"num_heads": 4, "head_dim": 6, "chunk_size": 8})
    config = MiniMaxConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        head_dim=6,
        num_hidden_layers=3,
        block_size=8,
        layer_types=["linear_attention"] * 3,
    )
    peer = MiniMaxLightningAttention(config, layer)
    parts = {name: rows.unflatten(0, (4, -1)) for name, rows in delta_parts(mixer).items()}
    weights = {
        "qkv_proj.weight": torch.cat([parts[name] for name in ("q", "k", "v")], dim=1).flatten(0, 1),
        "output_gate.weight": parts["gate"].flatten(0, 1),
        "out_proj.weight": mixer.out_proj.weight,
        "norm.weight": torch.ones(24),
    }
    put(peer, weights)
    seen: list[Tensor] = []
    peer.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def read_theirs(x_BTD: Tensor) -> Tensor:
        peer(x_BTD, position_embeddings=None, attention_mask=None)
        return seen[-1]

    def read_ours(x_BTD: Tensor) -> Tensor:
        projected, _ = mixer.project(x_BTD)
        return mixer.mix(projected, PackMeta.one_document_a_row(ROWS, TOKENS)).flatten(-2)

    compare(read_ours, read_theirs)
