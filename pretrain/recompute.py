"""Activation recomputation: which blocks are computed again in the backward pass instead of keeping activations.

A recomputed block keeps only its input and runs its forward pass again before its backward pass (Chen et al. 2016,
arXiv 1604.06174): memory for about a third more arithmetic in that block. The choice is by kind of block, because kinds
differ in what they keep. The numbers of a step do not depend on it, so a resumed run may choose again.
"""

from __future__ import annotations

from collections.abc import Iterator

from amfm.model.config.pattern import parse_letters
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import RunConfig


def recomputed_letters(config: RunConfig) -> frozenset[str]:
    """Symbols of the kinds of block that recompute; the configuration must have passed `recompute_problems`."""
    if config.train.recompute == "none":
        return frozenset()
    if config.train.recompute == "full":
        return frozenset(config.model.built_letters)
    return parse_letters(config.train.recompute_blocks)


def recompute_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that `recompute_blocks` has an effect and that the pipeline schedule can recompute at all."""
    train, schedule, key = config.train, config.parallel.schedule, "train.recompute_blocks"
    if schedule == "zero_bubble" and train.recompute != "none":
        # torch's checkpoints hand copies of saved parameters to a backward pass, whose gradients no one would collect.
        rule = (
            "does not go with parallel.schedule=zero_bubble, which puts gradients off to parameters that it "
            "no longer has"
        )
        yield Problem("train.recompute", rule, "use none, or another schedule", train.recompute)
    if train.recompute != "selective":
        if train.recompute_blocks:
            rule = f"has no effect with train.recompute={train.recompute}"
            yield Problem(key, rule, "remove it, or use train.recompute=selective", train.recompute_blocks)
        return
    try:
        present = set(config.model.built_letters)
    except ValueError:
        return  # the model's own rules report it
    try:
        chosen = parse_letters(train.recompute_blocks)
    except ValueError as error:
        yield Problem(key, str(error), f"the pattern has {' '.join(sorted(present))}", train.recompute_blocks)
        return
    if not chosen:
        remedy = f"name some of {' '.join(sorted(present))}, or use train.recompute=full"
        yield Problem("train.recompute", "needs letters in train.recompute_blocks", remedy, "selective")
    for symbol in sorted(chosen - present):
        rule = f"names {symbol}, and model.pattern has no such block"
        yield Problem(key, rule, f"use some of {' '.join(sorted(present))}", train.recompute_blocks)
