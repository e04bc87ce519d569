"""Fields of config.json that several transformers classes share: rotary parameters, expert sizes, rejected fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amfm.model.config.core_options import AttentionConfig, Mamba2Config
from amfm.model.config.kinds import kind_of
from amfm.model.config.moe import MoeConfig
from amfm.model.config.rope import Llama3Stretch, RopeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.config.section import Section

# transformers multiplies experts with torch's grouped product, whose rows must be whole 16 bytes, in bf16 too.
EXPERT_SIZE_MULTIPLE = 8
# Options, none unless set, that few classes have: what is said of all others.
RARE_OPTIONS = {
    "activation_limit": "does not limit gate and up",
    "bias": "is written without these biases",
    "sinks": "has no sinks",
    "indexer": "has no indexer",
}
# What a class wants of settings, by name, and why.
Wanted = Mapping[str, tuple[object, str]]
GATED: Wanted = {"activation": ("swiglu", "the feed-forward is gated")}
NORMED_ROTARY: Wanted = {
    "qk_norm": (True, "queries and keys are normed"),
    "positions": ("rope", "attention is rotary"),
}
NO_QK_NORM: Wanted = {"qk_norm": (False, "queries and keys are not normed")}
WHOLE_HEADS: Wanted = {"fraction": (1.0, "whole heads are rotated")}
MAMBA_NAMES = {
    "num_heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "state_size": "mamba_d_state",
    "num_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias",
    "chunk_size": "mamba_chunk_size",
}
LAYER_NAMES = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
LETTERS_OF_NAMES = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}


def unfit_expert_sizes(config: ModelConfig, moe: MoeConfig) -> list[str]:
    """List expert sizes with which the native classes raise an error at their first forward pass."""
    sizes = {"model.hidden_size": config.hidden_size, "model.moe.expert_hidden_size": moe.expert_hidden_size}
    if moe.latent_size is not None:
        sizes["model.moe.latent_size"] = moe.latent_size
    return [
        f"{name}={size}: experts in transformers need multiples of {EXPERT_SIZE_MULTIPLE} (rows of 16 bytes in bf16); "
        f"use {-(-size // EXPERT_SIZE_MULTIPLE) * EXPERT_SIZE_MULTIPLE}, or target own"
        for name, size in sizes.items()
        if size % EXPERT_SIZE_MULTIPLE
    ]


def unfit_settings(key: str, options: object, target: str, wanted: Wanted, other: str = "own") -> list[str]:
    """List settings of a section that are not as a class wants them; none for a section that is not there."""
    reasons = []
    for name, (value, rule) in wanted.items() if options is not None else ():
        found = getattr(options, name)
        if found != value:
            shown, use = (str(each).lower() if isinstance(each, bool) else each for each in (found, value))
            remedy = "leave it out" if value is None else f"use {use}"
            reasons.append(f"{key}.{name}={shown}: in {target}, {rule}; {remedy}, or target {other}")
    return reasons


def unfit_softmax_scale(attention: AttentionConfig, target: str, other: str = "own") -> list[str]:
    """Report that a class scales by the size of a head, where the attention does not."""
    scale, usual = attention.softmax_scale, attention.head_dim**-0.5
    if scale in (None, usual):
        return []
    rule = f"{target} scales by head_dim ** -0.5 = {usual:.6g}"
    return [f"model.attention.softmax_scale={scale}: {rule}; leave it out, or target {other}"]


def unfit_multipliers(config: ModelConfig, target: str, *, other: str = "own") -> list[str]:
    """List the constant factors in the forward pass, which most classes have not."""
    return [
        f"model.multipliers.{name}={value}: {target} has no such factor; use 1.0, or target {other}"
        for name, value in config.multipliers
        if value != 1.0
    ]


def unfit_gates(config: ModelConfig, target: str) -> list[str]:
    """List gates on the outputs of attention and of the shared expert, in blocks that the pattern has."""
    letters = config.letters
    reasons = []
    if "*" in letters and config.attention is not None and config.attention.gate != "none":
        reasons.append(
            f"model.attention.gate={config.attention.gate}: attention of {target} has no gate; use none, or target own"
        )
    if "E" in letters and config.moe is not None and config.moe.shared_expert_gate:
        reasons.append(
            f"model.moe.shared_expert_gate=true: the shared expert of {target} has no gate; use false, or target own"
        )
    return reasons


def unfit_rare_options(config: ModelConfig, target: str, holds: frozenset[str]) -> list[str]:
    """List options of RARE_OPTIONS that blocks of the pattern set and the class does not hold."""
    reasons = []
    used = {part.name: part for letter in config.built_letters for part in kind_of(letter).parts}
    for kind in used.values():
        options = config.options_of(kind)
        for name, rule in RARE_OPTIONS.items():
            value = getattr(options, name, None)
            if name not in holds and value not in (None, False):
                said = "" if isinstance(value, Section) else f"={str(value).lower() if value is True else value}"
                reasons.append(f"model.{kind.section}.{name}{said}: {target} {rule}; leave it out, or target own")
    return reasons


def require_fields(fields: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Reject fields that our model cannot follow; an absent field has the expected value."""
    for name, value in expected.items():
        if fields.get(name, value) not in (value, None):
            raise ValueError(
                f"config.json: {name}={fields[name]} cannot be imported; our model has {name}={value} only"
            )


def read_sizes(fields: Mapping[str, Any], epsilon: str = "rms_norm_eps") -> dict[str, Any]:
    """Read what classes say alike of a model around its blocks; `epsilon`: the name of the norms' own."""
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "norm_epsilon": fields[epsilon],
        "tie_embeddings": fields["tie_word_embeddings"],
        "initializer_range": fields["initializer_range"],
    }


def mamba_fields(mamba: Mamba2Config) -> dict[str, Any]:
    """Build the fields of Mamba2 that granitemoehybrid and falcon_h1 name alike."""
    return {theirs: getattr(mamba, ours) for ours, theirs in MAMBA_NAMES.items()}


def read_mamba(fields: Mapping[str, Any]) -> Mamba2Config:
    """Read what `mamba_fields` builds."""
    return Mamba2Config.model_validate({ours: fields[theirs] for ours, theirs in MAMBA_NAMES.items()})


def rope_parameters(attention: AttentionConfig) -> dict[str, Any]:
    """Build `rope_parameters` of an attention with rotary positions; each class places the rotated part of a head."""
    return parameters_of(attention.rope, attention.head_dim)


def parameters_of(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """The same of a rotary section and heads of so many channels."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling == "ntk":
        # NTK-aware scaling is plain RoPE of a larger base (see kernels/rope).
        size = int(head_dim * rope.fraction)
        parameters["rope_theta"] = rope.theta * (rope.ntk_alpha or 1.0) ** (size / (size - 2))
    elif rope.scaling == "yarn":
        parameters |= {
            "rope_type": "yarn",
            "factor": rope.yarn_factor,
            "original_max_position_embeddings": rope.yarn_original_length,
            "beta_fast": rope.yarn_beta_fast,
            "beta_slow": rope.yarn_beta_slow,
        }
        if not rope.yarn_truncate:
            parameters["truncate"] = False
    elif rope.scaling == "linear":
        parameters |= {"rope_type": "linear", "factor": rope.linear_factor}
    elif rope.llama3 is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": rope.llama3.factor,
            "original_max_position_embeddings": rope.llama3.original_length,
            "low_freq_factor": rope.llama3.slow_turns,
            "high_freq_factor": rope.llama3.fast_turns,
        }
    return parameters


def flat_rope_fields(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Build the spelling of `rope_parameters` from before transformers 5, the only one that mlx-lm reads.

    A scaled rotation needs `rope_scaling` too: without it such a reader would leave the scaling out and say nothing. The
    newer readers let it replace `rope_parameters`, so it holds the same.
    """
    flat = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    return flat if parameters["rope_type"] == "default" else flat | {"rope_scaling": dict(parameters)}


def rope_from_parameters(parameters: Mapping[str, Any]) -> RopeConfig:
    """Build our rotary section from `rope_parameters`. Raises ValueError for a kind that we lack."""
    theta = float(parameters.get("rope_theta", 10_000.0))
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", linear_factor=parameters["factor"])
    if kind == "yarn":
        require_fields(parameters, {"attention_factor": None, "mscale": None, "mscale_all_dim": None})
        return RopeConfig(
            theta=theta,
            scaling="yarn",
            yarn_factor=parameters["factor"],
            yarn_original_length=parameters["original_max_position_embeddings"],
            yarn_beta_fast=parameters.get("beta_fast") or 32.0,
            yarn_beta_slow=parameters.get("beta_slow") or 1.0,
            yarn_truncate=parameters.get("truncate") is not False,
        )
    if kind == "llama3":
        stretch = Llama3Stretch(
            factor=parameters["factor"],
            original_length=parameters["original_max_position_embeddings"],
            slow_turns=parameters["low_freq_factor"],
            fast_turns=parameters["high_freq_factor"],
        )
        return RopeConfig(theta=theta, scaling="llama3", llama3=stretch)
    raise ValueError(f"config.json: rope_type={kind} cannot be imported; use default, linear, yarn or llama3")


def letters_of(names: list[str]) -> list[str]:
    """Translate layer names, older or newer, to our letters. Raises ValueError for a kind that we have not."""
    unknown = sorted(set(names) - set(LETTERS_OF_NAMES))
    if unknown:
        raise ValueError(f"config.json: layer kinds {unknown} cannot be imported; known are {sorted(LETTERS_OF_NAMES)}")
    return [LETTERS_OF_NAMES[name] for name in names]


def registered_mixers(config: ModelConfig) -> dict[str, str]:
    """Find the names of the registered mixers that a model uses, wrapped ones too, by their symbol in the pattern."""
    found: dict[str, str] = {}
    for symbol in dict.fromkeys(config.built_letters):
        for kind in kind_of(symbol).parts:
            if kind.is_core:
                continue
            found[kind.symbol] = kind.name
            options = config.options_of(kind)
            inside = None if options is None else options.wraps()
            if inside is not None:
                found[f"{kind.symbol} over {inside}"] = inside
    return found


def unfit_mixers(config: ModelConfig, target: str) -> list[str]:
    """List registered mixers, which a class of Mamba2 and attention has not."""
    symbols = " ".join(symbol for symbol in config.parsed_pattern.counts() if not kind_of(symbol).is_core)
    return [f"model.pattern has {symbols}: {target} has no such block; use target own"] if symbols else []
