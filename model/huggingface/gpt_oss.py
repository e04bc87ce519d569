"""The transformers class `gpt_oss`: attention with sinks, over windows or whole rows, and experts with limited gates.

Read from transformers 5.24 (`configuration_gpt_oss.py`, `modeling_gpt_oss.py`). Every layer is attention, over a window (`W`)
or not (`*`), and experts; both kinds of attention have the same heads and rotations, whose halves are paired as ours. A router
takes the softmax of the chosen logits, which is ours of all, normalized. Projections have biases or not; router and experts
always do, and an export of a model without them writes zeros. An import gives them all, to be trained on. Projections are
stored apart, and matrices of experts transposed, their biases apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.key_mixer_options import WindowOptions
from amfm.model.config.moe import BIAS_CHANNELS, MoeConfig
from amfm.model.config.rope import yarn_of
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import Piece, WeightEntry, WeightMap, Zeros, paired_map
from amfm.model.huggingface.fields import (
    NO_QK_NORM,
    WHOLE_HEADS,
    Wanted,
    flat_rope_fields,
    parameters_of,
    read_sizes,
    require_fields,
    rope_from_parameters,
    rope_parameters,
    unfit_expert_sizes,
    unfit_gates,
    unfit_multipliers,
    unfit_settings,
    unfit_softmax_scale,
)
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.qwen3_next_weights import part_pieces
from amfm.model.huggingface.refusals import IGNORED_ARGUMENTS, Refusal, misses_sentencepiece
from amfm.model.on_demand import Shape, cut_rows

LAYER_TYPES = {"W": "sliding_attention", "*": "full_attention"}
LETTERS = {name: letter for letter, name in LAYER_TYPES.items()}
ALPHA = 1.702
# What the router and the experts of ours must be.
ROUTING: Wanted = {
    "activation": ("swiglu_oai", "experts have this unit"),
    "router": ("softmax", "a softmax scores experts"),
    "normalize_probabilities": (True, "the softmax is over the chosen experts"),
    "routed_scaling": (1.0, "there is no such factor"),
    "num_router_groups": (1, "experts are not grouped"),
    "shared_expert_hidden_size": (0, "there is no shared expert"),
    "latent_size": (None, "experts read the full width"),
}
# What attention of either kind must be.
ATTENDING: Wanted = {
    "sinks": (True, "every head has a sink"),
    **NO_QK_NORM,
    "positions": ("rope", "attention is rotary"),
}


def window_options(config: ModelConfig) -> WindowOptions:
    """Options of the windows, which the pattern has."""
    options = config.block_options("W")
    assert isinstance(options, WindowOptions), f"W has {type(options).__name__}"
    return options


def unfit_for_gpt_oss(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    reasons = unfit_multipliers(config, "gpt_oss")
    if not (len(mixers) == len(seconds) and set(mixers) <= set(LAYER_TYPES) and set(seconds) <= {"E"}):
        rule = "layers of gpt_oss are pairs, W or * and then E"
        return [f"model.pattern={''.join(letters)}: {rule}; use such a pattern, or target own", *reasons]
    reasons += unfit_gates(config, "gpt_oss")
    if "*" in letters and config.attention is not None:
        reasons += _unfit_attention(config.attention)
    if "W" in letters:
        reasons += _unfit_window(config, window_options(config))
    if config.moe is not None:
        reasons += _unfit_experts(config, config.moe)
    return reasons


def _unfit_biases(key: str, bias: object) -> list[str]:
    rule = "gpt_oss has biases on all four projections or on none; use true or false, or target own"
    return [f"{key}.bias=qkv: {rule}"] if bias == "qkv" else []


def _unfit_attention(attention: AttentionConfig) -> list[str]:
    reasons = unfit_settings("model.attention", attention, "gpt_oss", ATTENDING)
    reasons += _unfit_biases("model.attention", attention.bias)
    reasons += unfit_settings("model.attention.rope", attention.rope, "gpt_oss", WHOLE_HEADS)
    return reasons + unfit_softmax_scale(attention, "gpt_oss")


def _unfit_window(config: ModelConfig, options: WindowOptions) -> Iterator[str]:
    """What windows have else, and in what they differ from attention: the class has one set of heads and rotations."""
    key, attention = "model.mixers.window", config.attention
    yield from _unfit_biases(key, options.bias)
    wanted = {"gate": ("none", "attention has no gate"), "softmax_scale": (None, "scores have the usual factor")}
    yield from unfit_settings(key, options, "gpt_oss", {**ATTENDING, **wanted})
    if attention is None or "*" not in config.letters:
        return
    if attention.rope.scaling not in ("none", "yarn"):
        rule = "gpt_oss rotates windows as attention, and ours are stretched only by yarn"
        yield f"model.attention.rope.scaling={attention.rope.scaling}: {rule}; use none or yarn, or target own"
    elif yarn_of(attention.rope) != options.yarn:
        rule = "gpt_oss rotates windows as attention, whose stretch is another or none"
        yield f"{key}.yarn: {rule}; use the numbers of model.attention.rope, or target own"
    for name, value, other in (
        ("bias", options.bias, attention.bias),
        ("num_heads", options.num_heads, attention.num_heads),
        ("num_kv_heads", options.kv_heads(), attention.num_kv_heads),
        ("head_dim", options.head_dim, attention.head_dim),
        ("rope_theta", options.rope_theta, attention.rope.theta),
    ):
        if value != other:
            shown, use = str(value).lower(), str(other).lower()
            yield f"{key}.{name}={shown}: windows of gpt_oss have that of attention; use {use}, or target own"


def _unfit_experts(config: ModelConfig, moe: MoeConfig) -> Iterator[str]:
    yield from unfit_settings("model.moe", moe, "gpt_oss", ROUTING)
    if moe.activation_limit is None:
        yield "model.moe.activation_limit=none: gpt_oss limits gate and up; use 7.0, or target own"
    yield from unfit_expert_sizes(config, moe)


def gpt_oss_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    mixers, moe = config.letters[0::2], config.moe
    assert moe is not None, "every layer of gpt_oss has experts"
    fields: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": len(mixers),
        "layer_types": [LAYER_TYPES[letter] for letter in mixers],
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": moe.expert_hidden_size,
        "swiglu_alpha": ALPHA,
        "swiglu_limit": moe.activation_limit,
        # The class asks for one without any windows, too.
        "sliding_window": 128,
    }
    if "W" in mixers:
        window = window_options(config)
        fields |= {
            "attention_bias": window.bias,
            "sliding_window": window.window,
            "num_attention_heads": window.num_heads,
            "num_key_value_heads": window.kv_heads(),
            "head_dim": window.head_dim,
            "rope_parameters": parameters_of(window.rope(), window.head_dim),
        }
    if "*" in mixers:
        assert config.attention is not None, "the pattern has *, the configuration no attention section"
        fields |= {
            "attention_bias": config.attention.bias,
            "num_attention_heads": config.attention.num_heads,
            "num_key_value_heads": config.attention.num_kv_heads,
            "head_dim": config.attention.head_dim,
            "rope_parameters": rope_parameters(config.attention),
        }
    return fields | flat_rope_fields(fields["rope_parameters"])


def model_config_from_gpt_oss(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    Raises ValueError if the class uses something that our model does not have, such as windows stretched as in Llama 3.
    """
    require_fields(fields, {"swiglu_alpha": ALPHA, "hidden_act": "silu"})
    pattern = "".join(LETTERS[kind] + "E" for kind in fields["layer_types"])
    rope = rope_from_parameters(fields.get("rope_parameters") or {})
    if "W" in pattern and rope.scaling not in ("none", "yarn"):
        raise ValueError(
            f"config.json: rope_type={rope.scaling} cannot be imported with sliding_attention: our windows are stretched only "
            "by yarn"
        )
    heads = {
        "num_heads": fields["num_attention_heads"],
        "num_kv_heads": fields["num_key_value_heads"],
        "head_dim": fields["head_dim"],
        "bias": fields["attention_bias"],
        "sinks": True,
    }
    turned = {"positions": "rope", "rope_theta": rope.theta, "yarn": yarn_of(rope)}
    window = {"window": fields["sliding_window"], **turned, **heads}
    return ModelConfig.model_validate(
        {
            "pattern": pattern,
            **read_sizes(fields),
            "attention": {"positions": "rope", "rope": rope, **heads} if "*" in pattern else None,
            "mixers": {"window": window} if "W" in pattern else {},
            "moe": MoeConfig(
                num_experts=fields["num_local_experts"],
                top_k=fields["num_experts_per_tok"],
                expert_hidden_size=fields["intermediate_size"],
                activation="swiglu_oai",
                activation_limit=fields["swiglu_limit"],
                bias=True,
                router="softmax",
            ),
        }
    )


def gpt_oss_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    return paired_map(config, _BLOCKS, zeros={"E": _biases})


def _attention_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    assert config.attention is not None, "the pattern has *, the configuration no attention section"
    for name in [f"{each}_proj.{kind}" for each in "qkvo" for kind in _kinds(config.attention.bias)] + ["sinks"]:
        yield WeightEntry(ours + name, (f"{layer}self_attn.{name}",))


def _kinds(bias: bool | str) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _window_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    window = window_options(config)
    keys = window.kv_heads() * window.head_dim
    for kind in _kinds(window.bias):
        names = tuple(f"{layer}self_attn.{name}_proj.{kind}" for name in "qkv")
        yield StackedEntry(f"{ours}in_proj.{kind}", names, sizes=(window.num_heads * window.head_dim, keys, keys))
        yield WeightEntry(f"{ours}out_proj.{kind}", (f"{layer}self_attn.o_proj.{kind}",))
    yield WeightEntry(f"{ours}sinks", (f"{layer}self_attn.sinks",))


def _expert_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    yield WeightEntry(f"{ours}router.weight", (f"{layer}mlp.router.weight",))
    up, down = f"{layer}mlp.experts.gate_up_proj", f"{layer}mlp.experts.down_proj"
    if config.moe is not None and config.moe.bias:
        yield WeightEntry(f"{ours}router.bias", (f"{layer}mlp.router.bias",))
        yield BiasedEntry(f"{ours}experts.up", (up, f"{up}_bias"))
        yield WidenedEntry(f"{ours}experts.down", (down,))
        yield WeightEntry(f"{ours}down_bias", (f"{down}_bias",))
    else:
        yield TurnedEntry(f"{ours}experts.up", (up,))
        yield TransposedEntry(f"{ours}experts.down", (down,))


def _biases(config: ModelConfig, layer: str) -> Zeros:
    """Biases that the class always has, for a model without them."""
    assert config.moe is not None, "the pattern has E, the configuration no moe section"
    if config.moe.bias:
        return {}
    theirs, experts = f"{layer}mlp.", config.moe.num_experts
    return {
        f"{theirs}router.bias": (experts,),
        f"{theirs}experts.gate_up_proj_bias": (experts, 2 * config.moe.expert_hidden_size),
        f"{theirs}experts.down_proj_bias": (experts, config.hidden_size),
    }


_BLOCKS = {"W": _window_entries, "*": _attention_entries, "E": _expert_entries}


def limits(config: ModelConfig) -> list[str]:
    """What the class does not do."""
    return [
        "PyTorch's `sdpa` does not serve its sinks: the class takes `eager`, or FlashAttention 3 and 4 if they are installed.",
        IGNORED_ARGUMENTS,
    ]


def gpt_oss_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    rule = (
        'it reads experts in MXFP4, which an export has unquantized, and ends with "parameters not in model"; use another '
        "program"
    )
    found = [*misses_sentencepiece("gpt_oss", tokenizer_kind), Refusal("mlx-lm", rule)]
    rope = gpt_oss_fields(config)["rope_parameters"]
    if rope["rope_type"] != "yarn":
        rule = "it supports only positions stretched by yarn and ends with \"KeyError: 'factor'\"; train with yarn for vLLM"
        found.append(Refusal("vllm", rule))
    elif not rope.get("truncate", True):
        rule = (
            "yarn_truncate: false silently produces different values, because it rounds the ends of the ramp; train with true for "
            "llama.cpp"
        )
        found.append(Refusal("llama.cpp", rule, misreads=True))
    return found


CLASS = HfTarget(
    name="gpt_oss",
    model_type="gpt_oss",
    class_name="GptOssForCausalLM",
    unfit=unfit_for_gpt_oss,
    fields=gpt_oss_fields,
    read=model_config_from_gpt_oss,
    weights=gpt_oss_map,
    refusals=gpt_oss_refusals,
    limits=limits,
    holds=frozenset(("sinks", "activation_limit", "bias")),
)


@dataclass(frozen=True)
class StackedEntry(WeightEntry):
    """Matrices one above the other, `sizes` rows each, stored as a tensor each."""

    sizes: tuple[int, ...] = ()

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """As in the base class, matrix by matrix."""
        begin = 0
        for size, name in zip(self.sizes, self.theirs, strict=True):
            yield from part_pieces(WeightEntry(self.ours, (name,)), shapes, size, begin, 0)
            begin += size

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        parts = (part.contiguous() for part in tensor.split(list(self.sizes)))
        return dict(zip(self.theirs, parts, strict=True))

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return torch.cat([tensors[name] for name in self.theirs])


@dataclass(frozen=True)
class TransposedEntry(WeightEntry):
    """A stack of matrices, [E, A, B] <-> [E, B, A]."""

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        return {self.theirs[0]: tensor.transpose(1, 2).contiguous()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return tensors[self.theirs[0]].transpose(1, 2).contiguous()


@dataclass(frozen=True)
class TurnedEntry(WeightEntry):
    """Gate rows above up rows [E, 2 F, D], stored as columns that are gate's and up's, alternating, [E, D, 2 F]."""

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        turned = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
        return {self.theirs[0]: turned.transpose(1, 2).contiguous()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        rows = tensors[self.theirs[0]].transpose(1, 2)
        return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)


@dataclass(frozen=True)
class BiasedEntry(TurnedEntry):
    """The same with a bias as a column after those of the rows, [E, 2 F, D + BIAS_CHANNELS], which is a tensor of its own there."""

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """Expert by expert, both tensors."""
        shape = shapes[self.ours]
        for run in cut_rows(shape[0], shape):
            yield Piece(self, {self.ours: run}, dict.fromkeys(self.theirs, run))

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        (turned,) = super().split(tensor[:, :, : 1 - BIAS_CHANNELS]).values()
        matrix, bias = turned.split([turned.shape[1] - 1, 1], dim=1)
        return {self.theirs[0]: matrix.contiguous(), self.theirs[1]: bias.squeeze(1).contiguous()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        matrix, bias = (tensors[name] for name in self.theirs)
        rows = super().join({self.theirs[0]: torch.cat([matrix, bias.unsqueeze(1)], dim=1)})
        return pad(rows, (0, BIAS_CHANNELS - 1))


@dataclass(frozen=True)
class WidenedEntry(TransposedEntry):
    """The stack of matrices after those, [E, D + BIAS_CHANNELS, F]: its last rows are zeros, and not there."""

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        return super().split(tensor[:, :-BIAS_CHANNELS])

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return pad(super().join(tensors), (0, 0, 0, BIAS_CHANNELS))
