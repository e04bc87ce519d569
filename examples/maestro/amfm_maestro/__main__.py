"""`python -m amfm_maestro CHECKPOINT OUT [cut | dense]`: a trained model without the components that ended.

Writes a weights folder and model.yaml whose `ranks` say what each matrix keeps, to train on, evaluate and generate with;
as dense the products in feed-forwards of the core, which `amfm export` takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from amfm.model.config.core_options import FeedForwardConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters
from amfm.pretrain.export.export import RELATIVE_TOLERANCE, check_free, logit_difference, proof_text
from amfm.pretrain.export.import_huggingface import write_model
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm_maestro.block import MATRICES
from amfm_maestro.spec import SPEC, MaestroOptions


def places(model: ModelConfig) -> Iterator[str]:
    """Begin the names of each block's factors, in order. Raises ValueError for a model without such blocks."""
    if SPEC.symbol not in model.letters:
        raise ValueError(f"model.pattern={model.pattern} has no block {SPEC.symbol}; give a model that has")
    yield from (f"blocks.{index}.mixer." for index, letter in enumerate(model.letters) if letter == SPEC.symbol)


def rank_of(first: Tensor, second: Tensor) -> int:
    """Components up to the last that is not zero, at least one."""
    alive = ((first.norm(dim=1) > 0) & (second.norm(dim=0) > 0)).nonzero()
    return 1 + int(alive.max()) if len(alive) else 1


def cut(weights: Weights) -> Weights:
    """Leave out what ended: each matrix has the rank that it needs."""
    state, ranks = dict(weights.state), []
    for place in places(weights.model):
        pair = []
        for which in MATRICES:
            names = f"{place}{which}_first", f"{place}{which}_second"
            rank = rank_of(*(state[name] for name in names))
            state[names[0]] = state[names[0]][:rank].contiguous()
            state[names[1]] = state[names[1]][:, :rank].contiguous()
            pair.append(rank)
        ranks.append((pair[0], pair[1]))
    options = options_of(weights.model).model_copy(update={"ranks": tuple(ranks)})
    return replace(weights, model=weights.model.with_options(SPEC, options), state=state)


def multiply_out(weights: Weights) -> Weights:
    """Put dense feed-forwards of the core instead of factors. Raises ValueError if others are in the way."""
    model, options = weights.model, options_of(weights.model)
    section = FeedForwardConfig(hidden_size=options.hidden_size, activation=options.activation)
    if model.feed_forward not in (None, section) and "-" in model.letters:
        raise ValueError("model.feed_forward has other sizes than model.mixers.maestro, and a model has one of them")
    state = dict(weights.state)
    for place in places(model):
        for which in MATRICES:
            first, second = state.pop(f"{place}{which}_first"), state.pop(f"{place}{which}_second")
            state[f"{place}{which}_proj.weight"] = (second.double() @ first.double()).float()
    pattern = model.pattern.replace(SPEC.symbol, "-")
    mixers = model.mixers.model_copy(update={SPEC.name: None})
    dense = model.model_copy(update={"pattern": pattern, "feed_forward": section, "mixers": mixers})
    return replace(weights, model=dense, state=state)


def compare(weights: Weights, smaller: Weights) -> tuple[float, str]:
    """Compare logits: the largest difference, and the text. Raises RuntimeError if they differ."""
    tokens_BT, _, compared = proof_text(weights)
    difference = logit_difference(weights, smaller, tokens_BT)
    if not difference <= RELATIVE_TOLERANCE:  # NaN fails too
        raise RuntimeError(f"logits differ by {difference:.1e} of the largest; nothing was written")
    return difference, compared


def options_of(model: ModelConfig) -> MaestroOptions:
    """The section of such blocks."""
    options = model.block_options(SPEC.symbol)
    assert isinstance(options, MaestroOptions), "the pattern has such blocks"
    return options


def main(arguments: list[str]) -> int:
    """Cut, compare logits, write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m amfm_maestro", description=__doc__)
    parser.add_argument("checkpoint", help="run, checkpoint or weights folder")
    parser.add_argument("out", help="weights folder to write")
    parser.add_argument("form", nargs="?", choices=("cut", "dense"), default="cut", help="dense: for amfm export")
    given = parser.parse_args(arguments)
    try:
        check_free(Path(given.out))
        weights = read_weights(given.checkpoint)
        smaller = multiply_out(weights) if given.form == "dense" else cut(weights)
        difference, compared = compare(weights, smaller)
        write_model(Path(given.out), smaller)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    before, after = (count_parameters(each.model).total for each in (weights, smaller))
    if given.form == "cut":
        print(f"ranks of up and down by block: {options_of(smaller.model).ranks}")
    print(f"{before:,} parameters before, {after:,} in {given.out}; logits differ by {difference:.0e} on {compared}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
