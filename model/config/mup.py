"""Maximal update parametrization (muP): by how much a parameter's first values and learning rate shrink with the width.

Trained alike, a wider model changes its activations more in each step, so the best learning rate falls as it grows. muP
(Yang et al. 2022, arXiv 2203.03466, table 8, for Adam) scales both with m = hidden_size / base_hidden_size:

    reads a width that grows, writes one (projections, experts)      deviation / sqrt(m), rate / m, epsilon / m
    reads a width that grows, writes fixed numbers (head, router)    deviation / m,       rate / m
    everything else (embedding, norms, convolutions, decays)         as at the base width

A separate head and a router could as well keep deviation and rate and divide their output by m: under Adam the two
forms are one (section B of the paper). This one leaves nothing to the forward pass, so a trained model is a plain model
to its readers. A head that is tied to the embedding is one matrix in two classes: it has the embedding's deviation and
rate, and the logits are divided by m.

What grows: heads, groups, and the inner widths of feed-forwards and experts, in step with hidden_size. What stays: head_dim,
state sizes, numbers of experts and top_k. That theory covers attention and feed-forwards; for the other kinds of block a
measurement decides (`Kind.has_mup`, docs/mup.md), and `check_mup` rejects the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from amfm.model.config.kinds import all_kinds, kind_of
from amfm.model.config.schema import ModelConfig, has_indexer
from amfm.model.config.structure import DENSE

_FEW_OUTPUTS = ("head.weight", ".router.weight", ".shared_gate.weight")
# Own parameters of mixers that read a head's width, which does not grow, and vectors in the shape of a matrix.
_FIXED_INPUTS = (".decay_proj", ".gate_proj", ".conv.weight")


@dataclass(frozen=True)
class WidthScales:
    """Factors on a parameter's first deviation, on its learning rate and on AdamW's epsilon."""

    deviation: float = 1.0
    rate: float = 1.0
    epsilon: float = 1.0


def width_scales(name: str, config: ModelConfig) -> WidthScales:
    """Return the factors of a parameter by its name in the model; all 1 without `model.mup` and at the base width.

    An expert's own name (`...experts.up.3`) is as good as its stack's.
    """
    ratio = width_ratio(config)
    if ratio == 1.0:
        return WidthScales()
    if name.endswith(_FEW_OUTPUTS):
        return WidthScales(1.0 / ratio, 1.0 / ratio)
    is_matrix = name.endswith((".weight", "_proj")) or ".experts." in name
    if not name.startswith("blocks.") or not is_matrix or name.endswith((*_FIXED_INPUTS, "norm.weight")):
        return WidthScales()
    return WidthScales(ratio**-0.5, 1.0 / ratio, 1.0 / ratio)


def logits_multiplier(config: ModelConfig) -> float:
    """Return the factor on the logits: the configuration's own, divided by the width's ratio where the head is tied."""
    ratio = width_ratio(config) if config.tie_embeddings else 1.0
    return config.multipliers.logits / ratio


def without_mup(config: ModelConfig) -> ModelConfig:
    """Return the plain configuration of the same function, for those who read trained weights and do not train on."""
    multipliers = config.multipliers.model_copy(update={"logits": logits_multiplier(config)})
    return config.model_copy(update={"mup": None, "multipliers": multipliers})


def check_mup(config: ModelConfig) -> None:
    """Raise ValueError for a block or a form of matrices that muP's rules were not measured on."""
    assert config.mup is not None, "the caller has seen model.mup"
    if config.num_depths:
        raise ValueError(
            "model.mup was not shown to hold for the MTP layers after '/' of model.pattern (docs/mup.md); remove one "
            "of the two"
        )
    unchecked = [symbol for symbol in config.parsed_pattern.counts() if not kind_of(symbol).has_mup]
    if unchecked:
        # Activations of the checked kinds change alike at widths 64 to 512 (tests/pretrain/engine/test_mup.py).
        checked = [kind.symbol for kind in all_kinds().values() if kind.has_mup]
        raise ValueError(
            f"model.mup was not shown to hold for blocks {', '.join(map(repr, unchecked))} of model.pattern, only for "
            f"{', '.join(map(repr, checked))} (docs/mup.md); remove model.mup, or use blocks of these kinds"
        )
    if config.stream is not None:
        raise ValueError(f"model.mup has no rule for the weights of model.{config.stream_name}; remove one of the two")
    if has_indexer(config):
        raise ValueError("model.mup has no rule for an indexer; remove the indexer, or model.mup")
    for kind, options in config.sections():
        for part in options.feed_forwards():
            if part.structure != DENSE:
                key = f"model.{kind.section}.{part.prefix}linear_kind"
                raise ValueError(f"{key}={part.structure.kind} has no muP rule; use dense, or remove model.mup")


def width_ratio(config: ModelConfig) -> float:
    """Return m, hidden_size by base_hidden_size; 1 without `model.mup`."""
    return 1.0 if config.mup is None else config.hidden_size / config.mup.base_hidden_size
