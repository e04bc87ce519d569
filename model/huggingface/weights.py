"""Weight maps of the transformers classes: names, and the few changes of shape between them.

Names on disk are those of the published checkpoints (transformers renames some while loading). Shapes are computed from the
configuration, so that a checkpoint is checked and converted without building either model; blocks without a section of their
own are built on the meta device to ask for theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from amfm.model.build import build_mixer
from amfm.model.config.schema import ModelConfig
from amfm.model.config.structure import Structure
from amfm.model.huggingface.dense import dense_map
from amfm.model.huggingface.depths import nemotron_h_depths
from amfm.model.huggingface.entries import Form, WeightEntry, WeightMap
from amfm.model.huggingface.latent_attention import LATENT_TARGETS
from amfm.model.huggingface.latent_attention_weights import latent_map
from amfm.model.huggingface.qwen3_next_weights import qwen3_next_map
from amfm.model.huggingface.targets import Source
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.routed_updates import update_shapes


def weight_map(config: ModelConfig, target: Source) -> WeightMap:
    """Build the map between our names and those of `target`; the configuration must fit it (`explain_unfit`)."""
    if target in ("llama", "qwen3"):
        return dense_map(config)
    if target == "nemotron_h":
        return _nemotron_h_map(config)
    if target == "granitemoehybrid":
        return _granite_map(config)
    if target == "qwen3_next":
        return qwen3_next_map(config)
    if target == "qwen3_5_moe":
        return qwen3_next_map(config, is_next=False)
    if target in LATENT_TARGETS:
        return latent_map(config, target)
    return WeightMap(tuple(WeightEntry(name, (name,)) for name in weight_shapes(config)), {})


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List names and shapes of all weights of our model (the router's bias buffer included), in order."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    width = config.hidden_size

    def add_blocks(prefix: str, letters: Sequence[str]) -> None:
        for index, letter in enumerate(letters):
            shapes[f"{prefix}blocks.{index}.norm.weight"] = (width,)
            for name, shape in block_shapes(config, letter).items():
                shapes[f"{prefix}blocks.{index}.mixer.{name}"] = shape
            for name, shape in update_shapes(config, letter).items():
                shapes[f"{prefix}blocks.{index}.{name}"] = shape

    add_blocks("", config.letters)
    shapes["final_norm.weight"] = (width,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, width)
    for depth in range(config.num_depth_modules):
        own = f"mtp.{depth}."
        shapes |= {f"{own}embed_norm.weight": (width,), f"{own}stream_norm.weight": (width,)}
        shapes[f"{own}in_proj.weight"] = (width, 2 * width)
        add_blocks(own, config.parsed_pattern.depth_letters)
        shapes[f"{own}norm.weight"] = (width,)
    return shapes


def block_shapes(config: ModelConfig, letter: str) -> dict[str, tuple[int, ...]]:
    """List names and shapes of all weights of a kind of block, without its norm; registered mixers are built for it."""
    if letter in _MIXER_SHAPES:
        return _MIXER_SHAPES[letter](config)
    with torch.device("meta"):
        mixer = build_mixer(config.built_letters.index(letter), config, single_rank_groups(), "torch")
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
    if attention.qk_norm:
        shapes |= {"q_norm.weight": (attention.head_dim,), "k_norm.weight": (attention.head_dim,)}
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
    read, hidden = moe.latent_size or width, moe.expert_hidden_size
    shapes["experts.up"] = (moe.num_experts, hidden * (2 if moe.activation == "swiglu" else 1), read)
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
    prefix: str, width: int, hidden: int, activation: str, structure: Structure, *, is_guided: bool
) -> dict[str, tuple[int, ...]]:
    segments = (hidden, hidden) if activation == "swiglu" else (hidden,)
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

# Mamba2 tensors are named alike in both native classes, but for the convolution.
_CONV_FORMS: dict[str, tuple[str, Form]] = {
    "conv.weight": ("conv1d.weight", "conv"),
    "conv.bias": ("conv1d.bias", "same"),
}


def _nemotron_h_map(config: ModelConfig) -> WeightMap:
    entries = [WeightEntry("embedding.weight", ("backbone.embeddings.weight",))]
    zeros: dict[str, tuple[int, ...]] = {}
    for index, letter in enumerate(config.letters):
        own, own_zeros = _nemotron_h_block(config, letter, f"blocks.{index}.", f"backbone.layers.{index}.")
        entries += own
        zeros |= own_zeros
    depths = nemotron_h_depths(config, partial(_nemotron_h_block, config))
    entries += depths.entries
    zeros |= depths.zeros
    entries.append(WeightEntry("final_norm.weight", ("backbone.norm_f.weight",)))
    # The class never ties its head: without its own copy of a tied weight it would start at random.
    tied = config.tie_embeddings
    entries.append(
        WeightEntry("embedding.weight" if tied else "head.weight", ("lm_head.weight",), "copy" if tied else "same")
    )
    return WeightMap(tuple(entries), zeros)


def _nemotron_h_block(
    config: ModelConfig, letter: str, ours: str, theirs: str
) -> tuple[list[WeightEntry], dict[str, tuple[int, ...]]]:
    """Entries of a block with its norm, and the tensors of it that are always zero."""
    entries = [WeightEntry(f"{ours}norm.weight", (f"{theirs}norm.weight",))]
    for name in _MIXER_SHAPES[letter](config):
        entries.append(_nemotron_h_entry(f"{ours}mixer.{name}", f"{theirs}mixer.", name, config))
    return entries, _nemotron_h_zeros(f"{theirs}mixer.", config) if letter == "E" else {}


_NEMOTRON_H_MOE = {
    "router.weight": "gate.weight",
    "expert_bias": "gate.e_score_correction_bias",
    "shared.up_proj.weight": "shared_experts.up_proj.weight",
    "shared.down_proj.weight": "shared_experts.down_proj.weight",
    "latent_down.weight": "fc1_latent_proj.weight",
    "latent_up.weight": "fc2_latent_proj.weight",
}


def _nemotron_h_entry(ours: str, theirs: str, name: str, config: ModelConfig) -> WeightEntry:
    if name in ("experts.up", "experts.down"):
        assert config.moe is not None, "experts without a moe section"
        suffix = "up_proj" if name == "experts.up" else "down_proj"
        names = tuple(f"{theirs}experts.{expert}.{suffix}.weight" for expert in range(config.moe.num_experts))
        return WeightEntry(ours, names, "experts")
    if name in _CONV_FORMS:
        other, form = _CONV_FORMS[name]
        return WeightEntry(ours, (theirs + other,), form)
    return WeightEntry(ours, (theirs + _NEMOTRON_H_MOE.get(name, name),))


def _nemotron_h_zeros(theirs: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors the class always has: a shared expert of width 1 and a routing bias, both zero where we have none."""
    moe, width = config.moe, config.hidden_size
    assert moe is not None, "the pattern has E, the configuration no moe section"
    zeros: dict[str, tuple[int, ...]] = {}
    if not moe.expert_bias:
        zeros[f"{theirs}gate.e_score_correction_bias"] = (moe.num_experts,)
    if not moe.shared_expert_hidden_size:
        zeros[f"{theirs}shared_experts.up_proj.weight"] = (1, width)
        zeros[f"{theirs}shared_experts.down_proj.weight"] = (width, 1)
    return zeros


_GRANITE_SECOND = {
    "router.weight": "block_sparse_moe.router.layer.weight",
    "experts.up": "block_sparse_moe.input_linear.weight",
    "experts.down": "block_sparse_moe.output_linear.weight",
    "shared.up_proj.weight": "shared_mlp.input_linear.weight",
    "shared.down_proj.weight": "shared_mlp.output_linear.weight",
    "up_proj.weight": "shared_mlp.input_linear.weight",
    "down_proj.weight": "shared_mlp.output_linear.weight",
}


def _granite_map(config: ModelConfig) -> WeightMap:
    entries = [WeightEntry("embedding.weight", ("model.embed_tokens.weight",))]
    zeros: dict[str, tuple[int, ...]] = {}
    for index, letter in enumerate(config.letters):
        layer = f"model.layers.{index // 2}."
        norm = "input_layernorm" if letter in "M*" else "post_attention_layernorm"
        entries.append(WeightEntry(f"blocks.{index}.norm.weight", (f"{layer}{norm}.weight",)))
        for name in _MIXER_SHAPES[letter](config):
            ours = f"blocks.{index}.mixer.{name}"
            if letter == "M":
                other, form = _CONV_FORMS.get(name, (name, "same"))
                entries.append(WeightEntry(ours, (f"{layer}mamba.{other}",), form))
            elif letter == "*":
                entries.append(WeightEntry(ours, (f"{layer}self_attn.{name}",)))
            else:
                entries.append(WeightEntry(ours, (layer + _GRANITE_SECOND[name],)))
        if letter == "E" and config.moe is not None and not config.moe.shared_expert_hidden_size:
            zeros[f"{layer}shared_mlp.input_linear.weight"] = (2, config.hidden_size)
            zeros[f"{layer}shared_mlp.output_linear.weight"] = (config.hidden_size, 1)
    entries.append(WeightEntry("final_norm.weight", ("model.norm.weight",)))
    if not config.tie_embeddings:
        entries.append(WeightEntry("head.weight", ("lm_head.weight",)))
    return WeightMap(tuple(entries), zeros)
