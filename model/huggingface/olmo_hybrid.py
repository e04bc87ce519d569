"""The transformers class `olmo_hybrid` (Gated DeltaNet, attention, feed-forwards): which models fit it, and its config.json.

Read from transformers 5.24 (`configuration_olmo_hybrid.py`, `modeling_olmo_hybrid.py`). Layers with attention have their norms after
both blocks, layers with Gated DeltaNet before them. Heads of Gated DeltaNet are normed with an epsilon of their own, and
attention has no positions unless config.json has `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import Piece, WeightEntry, WeightMap, paired_map
from amfm.model.huggingface.fields import (
    GATED,
    Wanted,
    flat_rope_fields,
    read_sizes,
    require_fields,
    rope_from_parameters,
    rope_parameters,
    unfit_multipliers,
    unfit_settings,
    unfit_softmax_scale,
)
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.kimi_linear import ConvEntry
from amfm.model.huggingface.qwen3_next_weights import GatedEntry, RowsEntry, delta_options
from amfm.model.huggingface.refusals import IGNORED_ARGUMENTS, Refusal, packed_rows
from amfm.model.on_demand import Shape
from amfm.model.shapes import block_shapes

NAME = "olmo_hybrid"
LAYER_TYPES = {"G": "linear_attention", "*": "full_attention"}
LETTERS = {name: letter for letter, name in LAYER_TYPES.items()}
HEAD_NORM_EPSILON = 1e-5  # fixed in the class
PARTS = ("q", "k", "v", "b", "a", "g")  # of our projection, in its order
# As releases have them. transformers renames them while loading, and saves the first of a layer with attention as NORMS[1].
NORMS = ("attention_layer_norm", "feedforward_layer_norm")
NORMS_AFTER = {NORMS[0]: "post_attention_layernorm", NORMS[1]: "post_feedforward_layernorm"}
ATTENTION: Wanted = {
    "qk_norm": ("wide", "all heads together are normed"),
    "gate": ("none", "attention has no gate"),
}


@dataclass(frozen=True)
class _WholeConvEntry(ConvEntry):
    """Convolutions of q, k and v, which transformers 5.24 saves in three equal parts whatever their sizes, and reads joined."""

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """One piece."""
        yield self.whole_piece()

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class, wherever they were cut."""
        return torch.cat([tensors[name].squeeze(1) for name in self.theirs])


def unfit_for_olmo_hybrid(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    if len(mixers) != len(seconds) or set(mixers) != set("G*") or set(seconds) != {"-"}:
        rule = f"layers of {NAME} are pairs, G or * and then -, some of each"
        return [f"model.pattern={''.join(letters)}: {rule}; use such a pattern, or target own"]
    reasons = unfit_multipliers(config, NAME) + list(_unfit_delta(config))
    if config.norm_placement != "after_attention":
        rule = f"{NAME} has norms only after attention"
        reasons.append(f"model.norm_placement={config.norm_placement}: {rule}; use after_attention, or target own")
    attention = config.attention
    assert attention is not None, "the pattern has *, the configuration no attention section"
    reasons += unfit_settings("model.attention", attention, NAME, ATTENTION)
    reasons += unfit_settings("model.feed_forward", config.feed_forward, NAME, GATED)
    reasons += unfit_softmax_scale(attention, NAME)
    if attention.num_heads * attention.head_dim != config.hidden_size:
        rule = f"heads of {NAME} together are as wide as the residual stream, {config.hidden_size}"
        reasons.append(f"model.attention.head_dim={attention.head_dim}: {rule}; change it, or target own")
    if attention.bias == "qkv":
        reasons.append(f"model.attention.bias=qkv: {NAME} has all four biases or none; use true, or target own")
    if attention.positions == "rope" and attention.rope.fraction != 1.0:
        rule = f"{NAME} rotates whole heads"
        reasons.append(f"model.attention.rope.fraction={attention.rope.fraction}: {rule}; use 1.0, or target own")
    return reasons


def _unfit_delta(config: ModelConfig) -> Iterator[str]:
    key, options = "model.mixers.gated_deltanet", delta_options(config)
    if not options.conv_kernel:
        yield f"{key}.conv_kernel=0: {NAME} always convolves; use 2 to 4, or target own"
    epsilon = options.head_norm_epsilon or config.norm_epsilon
    if epsilon != HEAD_NORM_EPSILON:
        yield f"{key}.head_norm_epsilon={epsilon}: {NAME} has {HEAD_NORM_EPSILON} there; use that, or target own"


def olmo_hybrid_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    attention, feed_forward, options = config.attention, config.feed_forward, delta_options(config)
    assert attention is not None and feed_forward is not None, "the pattern has * and -"
    rope = rope_parameters(attention) if attention.positions == "rope" else None
    return {
        "architectures": ["OlmoHybridForCausalLM"],
        "model_type": NAME,
        "num_hidden_layers": len(config.letters) // 2,
        "layer_types": [LAYER_TYPES[letter] for letter in config.letters[0::2]],
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "intermediate_size": feed_forward.hidden_size,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "attention_bias": bool(attention.bias),
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        "linear_num_key_heads": options.key_heads(),
        "linear_num_value_heads": options.num_heads,
        "linear_key_head_dim": options.key_dim(),
        "linear_value_head_dim": options.value_dim(),
        "linear_conv_kernel_dim": options.conv_kernel,
        "linear_allow_neg_eigval": options.allow_negative_eigenvalues,
    } | ({} if rope is None else flat_rope_fields(rope))


def model_config_from_olmo_hybrid(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    Raises ValueError if the class uses something that our model does not have.
    """
    require_fields(fields, {"hidden_act": "silu"})
    heads, rope = fields["num_attention_heads"], fields.get("rope_parameters")
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    attention: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": fields["num_key_value_heads"],
        "head_dim": head_dim,
        "qk_norm": "wide",
        "bias": fields["attention_bias"],
    }
    if rope:
        require_fields(rope, {"partial_rotary_factor": 1.0})
        attention |= {"positions": "rope", "rope": rope_from_parameters(rope)}
    return ModelConfig.model_validate(
        {
            "pattern": "".join(f"{LETTERS[kind]}-" for kind in fields["layer_types"]),
            **read_sizes(fields),
            "norm_placement": "after_attention",
            "attention": AttentionConfig.model_validate(attention),
            "mixers": {"gated_deltanet": _delta(fields)},
            "feed_forward": FeedForwardConfig(hidden_size=fields["intermediate_size"], activation="swiglu"),
        }
    )


def _delta(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "conv_kernel": fields["linear_conv_kernel_dim"],
        "num_heads": fields["linear_num_value_heads"],
        "num_key_heads": fields["linear_num_key_heads"],
        "head_dim": fields["linear_key_head_dim"],
        "value_head_dim": fields["linear_value_head_dim"],
        "allow_negative_eigenvalues": fields["linear_allow_neg_eigval"],
        "head_norm_epsilon": HEAD_NORM_EPSILON,
    }


def olmo_hybrid_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class, exact both ways."""
    blocks = {"G": _delta_entries, "*": _attention_entries, "-": _dense_entries}
    found = paired_map(config, blocks, norms=NORMS)
    layers = [f"model.layers.{layer}." for layer, letter in enumerate(config.letters[0::2]) if letter == "*"]
    behind = {
        f"{layer}{name}.weight": f"{layer}{other}.weight" for layer in layers for name, other in NORMS_AFTER.items()
    }
    entries = tuple(
        replace(entry, theirs=tuple(behind.get(name, name) for name in entry.theirs)) for entry in found.entries
    )
    return replace(
        found,
        entries=entries,
        aliases={f"{layer}{NORMS[1]}.weight": behind[f"{layer}{NORMS[0]}.weight"] for layer in layers},
    )


def _delta_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    options, theirs = delta_options(config), f"{layer}linear_attn."
    keys, values = options.key_heads() * options.key_dim(), options.num_heads * options.value_dim()
    sizes = (keys, keys, values, options.num_heads, options.num_heads, values)
    names = tuple(f"{theirs}{part}_proj.weight" for part in PARTS)
    yield RowsEntry(f"{ours}in_proj.weight", names, sizes=sizes, takes=tuple((part,) for part in range(len(PARTS))))
    convolved = tuple(f"{theirs}{part}_conv1d.weight" for part in PARTS[:3])
    yield _WholeConvEntry(f"{ours}conv.weight", convolved, sizes=sizes[:3], takes=((0,), (1,), (2,)))
    for name, other in (("A_log", "A_log"), ("dt_bias", "dt_bias"), ("norm", "o_norm"), ("out_proj", "o_proj")):
        ending = "" if name == other else ".weight"
        yield WeightEntry(f"{ours}{name}{ending}", (f"{theirs}{other}{ending}",))


def _attention_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    for name in block_shapes(config, "*"):
        yield WeightEntry(ours + name, (f"{layer}self_attn.{name}",))


def _dense_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    yield GatedEntry(f"{ours}up_proj.weight", (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"))
    yield WeightEntry(f"{ours}down_proj.weight", (f"{layer}mlp.down_proj.weight",))


def olmo_hybrid_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    names = 'it looks for norms by other names than the releases have and ends with "parameters not in model"'
    kernel = (
        'its Gated DeltaNet of this class is a kernel for GPUs and ends with "triton has no attribute set_allocator"; '
        "serve it from a GPU"
    )
    return [
        Refusal("llama.cpp", "its converter has no class olmo_hybrid; use another program"),
        Refusal("mlx-lm", f"{names}; use another program"),
        Refusal("vllm", kernel),
    ]


def _limits(config: ModelConfig) -> list[str]:
    return [packed_rows("Gated DeltaNet"), IGNORED_ARGUMENTS]


CLASS = HfTarget(
    name="olmo_hybrid",
    model_type=NAME,
    class_name="OlmoHybridForCausalLM",
    unfit=unfit_for_olmo_hybrid,
    fields=olmo_hybrid_fields,
    read=model_config_from_olmo_hybrid,
    weights=olmo_hybrid_map,
    refusals=olmo_hybrid_refusals,
    limits=_limits,
    holds=frozenset(("bias", "norm_placement")),
)
