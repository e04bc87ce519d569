"""Choice of the transformers class that can hold a model exactly, and reasons why another one cannot.

Rules were read from transformers 5.24: `models/nemotron_h` and `models/granitemoehybrid`; those of other classes are in
`qwen3_next.py` and `latent_attention.py`. A class holds a configuration when the function from tokens to logits is the same; names,
shapes and fields are in `weights.py` and `config.py`. This module imports no transformers.
"""

from __future__ import annotations

from typing import Literal, get_args

from amfm.model.config.mixer_registry import BUILT_IN
from amfm.model.config.mup import without_mup
from amfm.model.config.pattern import mixer_name
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.dense import DenseClass
from amfm.model.huggingface.depths import explain_left_out
from amfm.model.huggingface.fields import unfit_expert_sizes, unfit_gates, unfit_multipliers
from amfm.model.huggingface.latent_attention import LATENT_TARGETS, unfit_for_latent
from amfm.model.huggingface.qwen3_next import unfit_for_qwen3_5_moe, unfit_for_qwen3_next

Target = Literal["nemotron_h", "granitemoehybrid", "qwen3_next", "qwen3_5_moe", "kimi_linear", "deepseek_v3", "own"]
# Classes that are read: those, and teachers of conversions (dense.py).
Source = Target | DenseClass
NATIVE_TARGETS: tuple[Target, ...] = (
    "nemotron_h",
    "granitemoehybrid",
    "qwen3_next",
    "qwen3_5_moe",
    "kimi_linear",
    "deepseek_v3",
)
TARGETS: tuple[Target, ...] = get_args(Target)


def explain_unfit(config: ModelConfig, target: str) -> list[str]:
    """List every choice of `config` that `target` cannot hold, each as value, rule and remedy; empty: it fits.

    `own` holds all but mixers of other packages, `auto` what `choose_target` finds. Raises ValueError for an unknown target.
    """
    config = without_mup(config)
    if target == "auto":
        return []
    if target in TARGETS and config.lora_mixer is not None:
        return [
            "model.lora_mixer has low-rank updates that a router chooses among by token: no class holds them; convert without "
            "tune.routing, whose one update is merged into the weights"
        ]
    if target == "own":
        return _unfit_for_own(config)
    if target == "nemotron_h":
        return _unfit_for_nemotron_h(config)
    if target == "granitemoehybrid":
        return _unfit_for_granite(config)
    if target == "qwen3_next":
        return unfit_for_qwen3_next(config)
    if target == "qwen3_5_moe":
        return unfit_for_qwen3_5_moe(config)
    if target in LATENT_TARGETS:
        return unfit_for_latent(config, target)
    raise ValueError(f"export target {target!r} is unknown; use auto, {', '.join(TARGETS)}")


def choose_target(config: ModelConfig) -> Target:
    """Choose the first native class that holds the configuration exactly, else `own`.

    Raises ValueError for a model with mixers of other packages, which none of them has.
    """
    for target in NATIVE_TARGETS:
        if not explain_unfit(config, target):
            return target
    reasons = explain_unfit(config, "own")
    if reasons:
        raise ValueError("; ".join(reasons))
    return "own"


def left_out_depths(config: ModelConfig, target: Target) -> str | None:
    """Say why an export leaves the depths of multi-token prediction out; None where it does not, or there are none."""
    return explain_left_out(config, target, lambda alone: explain_unfit(alone, target))


def registered_mixers(config: ModelConfig) -> dict[str, str]:
    """Find the names of the registered mixers that a model uses, wrapped ones too, by their symbol in the pattern."""
    found: dict[str, str] = {}
    for symbol in dict.fromkeys(config.built_letters):
        name = mixer_name(symbol)
        if name is None:
            continue
        found[symbol] = name
        inside = getattr(config.mixers, name).wraps()
        if inside is not None:
            found[f"{symbol} over {inside}"] = inside
    return found


def _unfit_for_own(config: ModelConfig) -> list[str]:
    ours = {spec.name for spec in BUILT_IN}
    return [
        f"model.pattern has {symbol}: the mixer {name} of another package is not in our modelling file; "
        "use a mixer of ours where the model must leave amfm"
        for symbol, name in registered_mixers(config).items()
        if name not in ours
    ]


def _unfit_mixers(config: ModelConfig, target: str) -> list[str]:
    """Registered mixers, which a class of Mamba2 and attention has not."""
    symbols = " ".join(symbol for symbol in config.parsed_pattern.counts() if mixer_name(symbol) is not None)
    return [f"model.pattern has {symbols}: {target} has no such block; use target own"] if symbols else []


def _unfit_for_nemotron_h(config: ModelConfig) -> list[str]:
    letters = config.letters
    reasons = _unfit_mixers(config, "nemotron_h") + unfit_gates(config, "nemotron_h")
    reasons += unfit_multipliers(config, "nemotron_h")
    if "E" in letters and config.moe is not None:
        moe = config.moe
        if moe.activation != "squared_relu":
            reasons.append(
                f"model.moe.activation={moe.activation}: experts of nemotron_h are not gated; "
                "use squared_relu, or target granitemoehybrid or own"
            )
        if moe.router != "sigmoid":
            reasons.append(
                f"model.moe.router={moe.router}: nemotron_h scores experts with a sigmoid; "
                "use sigmoid, or target granitemoehybrid or own"
            )
        if moe.num_experts < 2 * moe.num_router_groups:
            reasons.append(
                f"model.moe.num_experts={moe.num_experts} in num_router_groups={moe.num_router_groups}: nemotron_h ranks "
                "groups by their two best experts and needs two in each; use fewer groups or more experts, or target own"
            )
        reasons += unfit_expert_sizes(config, moe)
    if "-" in letters and config.feed_forward is not None and config.feed_forward.activation != "squared_relu":
        reasons.append(
            f"model.feed_forward.activation={config.feed_forward.activation}: the feed-forward of nemotron_h is not "
            "gated; use squared_relu, or target own"
        )
    if "*" in letters and config.attention is not None:
        attention = config.attention
        if attention.positions != "none":
            reasons.append(
                f"model.attention.positions={attention.positions}: attention of nemotron_h has no positions; "
                "use none, or target granitemoehybrid or own"
            )
        if attention.qk_norm:
            reasons.append(_qk_norm_reason("nemotron_h"))
        scale = attention.softmax_scale
        if scale is not None and scale != attention.head_dim**-0.5:
            reasons.append(
                f"model.attention.softmax_scale={scale}: nemotron_h scales by head_dim ** -0.5 = "
                f"{attention.head_dim**-0.5:.6g}; leave it out, or target granitemoehybrid or own"
            )
    return reasons


def _unfit_for_granite(config: ModelConfig) -> list[str]:
    letters = config.letters
    reasons = _unfit_mixers(config, "granitemoehybrid") or _unfit_pairs(letters)
    reasons += unfit_gates(config, "granitemoehybrid")
    if "E" in letters:
        reasons += _unfit_granite_experts(config)
    if "-" in letters and config.feed_forward is not None and config.feed_forward.activation != "swiglu":
        reasons.append(
            f"model.feed_forward.activation={config.feed_forward.activation}: the feed-forward of granitemoehybrid is "
            "gated; use swiglu, or target nemotron_h or own"
        )
    if "*" in letters:
        reasons += _unfit_granite_attention(config)
    if "M" in letters and config.mamba is not None and config.mamba.inner_size() % config.hidden_size:
        reasons.append(
            f"model.mamba.num_heads={config.mamba.num_heads} x head_dim={config.mamba.head_dim} = "
            f"{config.mamba.inner_size()}: granitemoehybrid needs a whole multiple of model.hidden_size="
            f"{config.hidden_size}; change either, or target nemotron_h or own"
        )
    return reasons


def _unfit_pairs(letters: tuple[str, ...]) -> list[str]:
    """granitemoehybrid: every layer is a mixer and then a feed-forward, the same kind of feed-forward in all of them."""
    mixers, seconds = letters[0::2], letters[1::2]
    paired = len(mixers) == len(seconds) and all(letter in "M*" for letter in mixers)
    if paired and (all(letter == "E" for letter in seconds) or all(letter == "-" for letter in seconds)):
        return []
    return [
        f"model.pattern={''.join(letters)}: layers of granitemoehybrid are pairs, M or * and then E (or - in every pair); "
        "use such a pattern, or target nemotron_h or own"
    ]


def _unfit_granite_experts(config: ModelConfig) -> list[str]:
    moe = config.moe
    if moe is None:
        return []
    other = "target nemotron_h or own"
    reasons: list[str] = []
    if moe.activation != "swiglu":
        reasons.append(
            f"model.moe.activation={moe.activation}: experts of granitemoehybrid are gated; use swiglu, or {other}"
        )
    if moe.router != "softmax":
        reasons.append(
            f"model.moe.router={moe.router}: granitemoehybrid scores experts with a softmax; use softmax, or {other}"
        )
    if not moe.normalize_probabilities:
        reasons.append(
            "model.moe.normalize_probabilities=false: granitemoehybrid takes the softmax over the chosen experts, which "
            f"is the normalised one; use true, or {other}"
        )
    if moe.routed_scaling != 1.0:
        reasons.append(
            f"model.moe.routed_scaling={moe.routed_scaling}: granitemoehybrid has no such factor; use 1.0, or {other}"
        )
    if moe.num_router_groups != 1:
        reasons.append(
            f"model.moe.num_router_groups={moe.num_router_groups}: granitemoehybrid does not group experts; "
            f"use 1, or {other}"
        )
    if moe.expert_bias:
        reasons.append(f"model.moe.expert_bias=true: the router of granitemoehybrid has no bias; use false, or {other}")
    if moe.latent_size is not None:
        reasons.append(
            f"model.moe.latent_size={moe.latent_size}: experts of granitemoehybrid read the full width; "
            f"leave it out, or {other}"
        )
    return reasons + unfit_expert_sizes(config, moe)


def _unfit_granite_attention(config: ModelConfig) -> list[str]:
    attention = config.attention
    if attention is None:
        return []
    reasons: list[str] = []
    if attention.head_dim * attention.num_heads != config.hidden_size:
        reasons.append(
            f"model.attention.num_heads={attention.num_heads} x head_dim={attention.head_dim} = "
            f"{attention.num_heads * attention.head_dim}: granitemoehybrid has no field for the head size and takes "
            f"model.hidden_size={config.hidden_size} over num_heads; make the product equal, or target nemotron_h or own"
        )
    if attention.qk_norm:
        reasons.append(_qk_norm_reason("granitemoehybrid"))
    if attention.positions == "rope" and attention.rope.fraction != 1.0:
        reasons.append(
            f"model.attention.rope.fraction={attention.rope.fraction}: granitemoehybrid rotates whole heads; "
            "use 1.0, or target own"
        )
    return reasons


def _qk_norm_reason(target: str) -> str:
    return f"model.attention.qk_norm=true: {target} has no norm on queries and keys; use false, or target own"
