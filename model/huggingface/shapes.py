"""Names and shapes of all weights of a model, from its configuration alone.

So a checkpoint is checked and converted without building the model; blocks without a separate section are built on the
meta device to ask for theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amfm.model.build import build_mixer
from amfm.model.config.schema import ModelConfig
from amfm.model.config.structure import Activation, Structure, matrices_of
from amfm.model.head import head_shapes
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.routed_updates import update_shapes


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List names and shapes of all weights of our model (the router's bias buffer included), in order."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    width = config.hidden_size

    def add_blocks(prefix: str, letters: Sequence[str]) -> None:
        for index, letter in enumerate(letters):
            shapes[f"{prefix}blocks.{index}.norm.weight"] = (width,)
            place = index if not prefix and config.block_options(letter).differs_by_block() else None
            for name, shape in block_shapes(config, letter, place).items():
                shapes[f"{prefix}blocks.{index}.mixer.{name}"] = shape
            for name, shape in update_shapes(config, letter).items():
                shapes[f"{prefix}blocks.{index}.{name}"] = shape

    add_blocks("", config.letters)
    shapes["final_norm.weight"] = (width,)
    if config.head is not None:
        shapes |= {f"head.{name}": shape for name, shape in head_shapes(config).items()}
    elif not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, width)
    for depth in range(config.num_depth_modules):
        own = f"mtp.{depth}."
        shapes |= {f"{own}embed_norm.weight": (width,), f"{own}stream_norm.weight": (width,)}
        shapes[f"{own}in_proj.weight"] = (width, 2 * width)
        add_blocks(own, config.parsed_pattern.depth_letters)
        shapes[f"{own}norm.weight"] = (width,)
    return shapes


def block_shapes(config: ModelConfig, letter: str, index: int | None = None) -> dict[str, tuple[int, ...]]:
    """List names and shapes of all weights of a kind of block, without its norm; registered mixers are built for it.

    index: of the block, where blocks of the kind differ; by default the first.
    """
    if letter in _MIXER_SHAPES:
        return _MIXER_SHAPES[letter](config)
    with torch.device("meta"):
        place = config.built_letters.index(letter) if index is None else index
        mixer = build_mixer(place, config, single_rank_groups(), "torch")
    return {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()}


def _mamba_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    mamba, width = config.mamba, config.hidden_size
    assert mamba is not None, "the pattern has M, the configuration no mamba section"
    inner, channels = mamba.inner_size(), mamba.conv_channels()
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (inner + channels + mamba.num_heads, width),
        "conv.weight": (channels, mamba.conv_kernel),
    }
    if mamba.conv_bias:
        shapes["conv.bias"] = (channels,)
    heads = (mamba.num_heads,)
    return shapes | {
        "A_log": heads,
        "D": heads,
        "dt_bias": heads,
        "norm.weight": (inner,),
        "out_proj.weight": (width, inner),
    }


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    attention, width = config.attention, config.hidden_size
    assert attention is not None, "the pattern has *, the configuration no attention section"
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (queries, width),
        "k_proj.weight": (keys, width),
        "v_proj.weight": (keys, width),
        "o_proj.weight": (width, queries),
    }
    if attention.gate != "none":
        shapes["g_proj.weight"] = (queries if attention.gate == "element" else attention.num_heads, width)
    if attention.bias:
        shapes |= {f"{name}_proj.bias": shapes[f"{name}_proj.weight"][:1] for name in "qkvo"}
    if attention.sinks:
        shapes["sinks"] = (attention.num_heads,)
    if attention.qk_norm:
        shapes |= {"q_norm.weight": (attention.head_dim,), "k_norm.weight": (attention.head_dim,)}
    if attention.indexer is not None:
        size, heads = attention.indexer.head_dim, attention.indexer.num_heads
        shapes |= {
            "indexer.query.weight": (heads * size, width),
            "indexer.key.weight": (size, width),
            "indexer.head_weights.weight": (heads, width),
            "indexer.key_norm.weight": (size,),
            "indexer.key_norm.bias": (size,),
        }
    return shapes


def _feed_forward_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    dense = config.feed_forward
    assert dense is not None, "the pattern has -, the configuration no feed_forward section"
    return _mlp_shapes(
        "",
        config.hidden_size,
        dense.hidden_size,
        dense.activation,
        dense.structure(),
        is_guided=config.guide is not None,
    )


def _moe_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    moe, width = config.moe, config.hidden_size
    assert moe is not None, "the pattern has E, the configuration no moe section"
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (moe.num_experts, width)}
    if moe.expert_bias:
        shapes["expert_bias"] = (moe.num_experts,)
    if moe.bias:
        shapes |= {"router.bias": (moe.num_experts,), "down_bias": (moe.num_experts, moe.latent_size or width)}
    read, hidden = moe.expert_width(width), moe.expert_hidden_size
    shapes["experts.up"] = (moe.num_experts, hidden * (matrices_of(moe.activation) - 1), read)
    shapes["experts.down"] = (moe.num_experts, read, hidden)
    if moe.shared_expert_hidden_size:
        shared = moe.shared_expert_hidden_size
        is_guided = config.guide is not None
        shapes |= _mlp_shapes("shared.", width, shared, moe.activation, moe.shared_structure(), is_guided=is_guided)
    if moe.shared_expert_gate:
        shapes["shared_gate.weight"] = (1, width)
    if moe.latent_size is not None:
        shapes |= {"latent_down.weight": (moe.latent_size, width), "latent_up.weight": (width, moe.latent_size)}
    return shapes


def _mlp_shapes(
    prefix: str, width: int, hidden: int, activation: Activation, structure: Structure, *, is_guided: bool
) -> dict[str, tuple[int, ...]]:
    segments = (hidden,) * (matrices_of(activation) - 1)
    if structure.kind == "dense":
        return {f"{prefix}up_proj.weight": (sum(segments), width), f"{prefix}down_proj.weight": (width, hidden)}
    matrices = {"up": (width, segments), "down": (hidden, (width,))}
    shapes: dict[str, tuple[int, ...]] = {}
    for matrix, (inputs, rows) in matrices.items():
        for factor, shape in zip(("first", "second"), structure.shapes(inputs, rows), strict=True):
            shapes[f"{prefix}{matrix}_proj.{factor}"] = shape
        if is_guided:
            shapes[f"{prefix}{matrix}_proj.guide_weight"] = (sum(rows), inputs)
    return shapes


_MIXER_SHAPES = {"M": _mamba_shapes, "*": _attention_shapes, "-": _feed_forward_shapes, "E": _moe_shapes}
