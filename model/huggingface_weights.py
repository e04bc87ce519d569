"""Where each of our weights lies in a transformers checkpoint: names, and the few changes of shape between them.

A map is a tuple of entries, each from one tensor of ours to one or more of theirs; every entry can be walked both ways
without rounding. Names on disk are those of the published checkpoints (transformers renames some while loading).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.groups import single_rank_groups
from model.huggingface import Target
from model.mixers.build import build_mixer
from model.pattern import parse_pattern

Form = Literal["same", "conv", "experts", "copy"]


@dataclass(frozen=True)
class WeightEntry:
    """One tensor of ours and where it lies in the other checkpoint.

    Forms: `same`; `conv` [C, W] <-> [C, 1, W]; `experts` [E, ...] <-> one tensor an expert; `copy` is a second place of a
    tied weight, which is written but not read back.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form = "same"

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor as theirs, by name. Views of it, made contiguous."""
        if self.form == "experts":
            assert tensor.shape[0] == len(self.theirs), (
                f"{self.ours}: {tensor.shape[0]} experts, {len(self.theirs)} names"
            )
            return {name: tensor[index].contiguous() for index, name in enumerate(self.theirs)}
        return {self.theirs[0]: (tensor.unsqueeze(1) if self.form == "conv" else tensor).contiguous()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Their tensors (by name; at least this entry's) as ours."""
        if self.form == "experts":
            return torch.stack([tensors[name] for name in self.theirs])
        tensor = tensors[self.theirs[0]]
        return tensor.squeeze(1).contiguous() if self.form == "conv" else tensor


@dataclass(frozen=True)
class WeightMap:
    """All entries of a model, and the tensors that the class demands but our model lacks (all zeros), with shapes."""

    entries: tuple[WeightEntry, ...]
    zeros: Mapping[str, tuple[int, ...]]

    def their_names(self) -> set[str]:
        """Every tensor name in the other checkpoint."""
        return {name for entry in self.entries for name in entry.theirs} | set(self.zeros)

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole state of ours under their names. The names must be exactly those of the model."""
        expected = {entry.ours for entry in self.entries}
        assert expected == set(ours), f"weights differ from the map: {sorted(expected ^ set(ours))[:8]}"
        tensors: dict[str, Tensor] = {}
        for entry in self.entries:
            tensors.update(entry.split(ours[entry.ours]))
        for name, shape in self.zeros.items():
            tensors[name] = torch.zeros(shape, dtype=torch.float32)
        return tensors

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole state of theirs under our names; tensors that are always zero are dropped.

        Raises ValueError where a tensor is missing or not in the map, a zero tensor is not zero, or copies differ.
        """
        missing, unknown = self.their_names() - set(theirs), set(theirs) - self.their_names()
        if missing or unknown:
            raise ValueError(
                f"the checkpoint's tensors are not those of its configuration: missing {sorted(missing)[:6]}, "
                f"unknown {sorted(unknown)[:6]}; check config.json"
            )
        for name in self.zeros:
            if torch.count_nonzero(theirs[name]):
                raise ValueError(
                    f"{name} is not zero, so the configuration beside the weights does not describe them; "
                    "remove amfm_model.json to read config.json instead"
                )
        ours = {entry.ours: entry.join(theirs) for entry in self.entries if entry.form != "copy"}
        for entry in self.entries:
            if entry.form == "copy" and not torch.equal(theirs[entry.theirs[0]], ours[entry.ours]):
                raise ValueError(
                    f"{entry.theirs[0]} differs from {entry.ours}, so the embeddings are no longer tied; "
                    "remove amfm_model.json to import them as two tensors"
                )
        return ours


def weight_map(config: ModelConfig, target: Target) -> WeightMap:
    """The map between our names and those of `target`; the configuration must fit it (`explain_unfit`)."""
    if target == "nemotron_h":
        return _nemotron_h_map(config)
    if target == "granitemoehybrid":
        return _granite_map(config)
    return WeightMap(tuple(WeightEntry(name, (name,)) for name in weight_shapes(config)), {})


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of our model (the router's bias buffer included), in order."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    for index, letter in enumerate(parse_pattern(config.pattern).letters):
        shapes[f"blocks.{index}.norm.weight"] = (config.hidden_size,)
        for name, shape in block_shapes(config, letter).items():
            shapes[f"blocks.{index}.mixer.{name}"] = shape
    shapes["final_norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def block_shapes(config: ModelConfig, letter: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a kind of block, its norm apart; of registered mixers on one that is built."""
    if letter in _MIXER_SHAPES:
        return _MIXER_SHAPES[letter](config)
    with torch.device("meta"):
        mixer = build_mixer(parse_pattern(config.pattern).letters.index(letter), config, single_rank_groups(), "torch")
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
    if attention.qk_norm:
        shapes |= {"q_norm.weight": (attention.head_dim,), "k_norm.weight": (attention.head_dim,)}
    return shapes


def _feed_forward_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    dense = config.feed_forward
    assert dense is not None, "the pattern has -, the configuration no feed_forward section"
    return _mlp_shapes("", config.hidden_size, dense.hidden_size, dense.activation)


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
        shapes |= _mlp_shapes("shared.", width, moe.shared_expert_hidden_size, moe.activation)
    if moe.latent_size is not None:
        shapes |= {"latent_down.weight": (moe.latent_size, width), "latent_up.weight": (width, moe.latent_size)}
    return shapes


def _mlp_shapes(prefix: str, width: int, hidden: int, activation: str) -> dict[str, tuple[int, ...]]:
    rows = 2 * hidden if activation == "swiglu" else hidden
    return {f"{prefix}up_proj.weight": (rows, width), f"{prefix}down_proj.weight": (width, hidden)}


_MIXER_SHAPES = {"M": _mamba_shapes, "*": _attention_shapes, "-": _feed_forward_shapes, "E": _moe_shapes}

# Mamba2 tensors are named alike in both native classes, but for the convolution.
_CONV_FORMS: dict[str, tuple[str, Form]] = {
    "conv.weight": ("conv1d.weight", "conv"),
    "conv.bias": ("conv1d.bias", "same"),
}


def _nemotron_h_map(config: ModelConfig) -> WeightMap:
    entries = [WeightEntry("embedding.weight", ("backbone.embeddings.weight",))]
    zeros: dict[str, tuple[int, ...]] = {}
    for index, letter in enumerate(parse_pattern(config.pattern).letters):
        ours, theirs = f"blocks.{index}.mixer.", f"backbone.layers.{index}.mixer."
        entries.append(WeightEntry(f"blocks.{index}.norm.weight", (f"backbone.layers.{index}.norm.weight",)))
        for name in _MIXER_SHAPES[letter](config):
            entries.append(_nemotron_h_entry(ours + name, theirs, name, config))
        if letter == "E":
            zeros |= _nemotron_h_zeros(theirs, config)
    entries.append(WeightEntry("final_norm.weight", ("backbone.norm_f.weight",)))
    # The class never ties its head: without its own copy of a tied weight it would start at random.
    tied = config.tie_embeddings
    entries.append(
        WeightEntry("embedding.weight" if tied else "head.weight", ("lm_head.weight",), "copy" if tied else "same")
    )
    return WeightMap(tuple(entries), zeros)


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
    for index, letter in enumerate(parse_pattern(config.pattern).letters):
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
