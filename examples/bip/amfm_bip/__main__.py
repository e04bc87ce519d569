"""`python -m amfm_bip start CHECKPOINT OUT --keep SHARE` and `cut CHECKPOINT OUT`: into BiP's blocks, and out of them.

start: dense feed-forwards (`-`) become blocks {bip} whose first mask is that of magnitude. cut: they become feed-forwards of
the channels that the mask left, which compute the same. Both write a weights folder with model.yaml.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from amfm.model.config.core_options import FeedForwardConfig
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.export.export import RELATIVE_TOLERANCE, check_free, logit_difference, proof_text
from amfm.pretrain.export.import_huggingface import write_model
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm_bip.block import FIRST_SCORES
from amfm_bip.spec import SPEC, BipOptions


def places(model: ModelConfig, letter: str) -> Iterator[str]:
    """Begin the names of each block of a letter. Raises ValueError if there is none."""
    if letter not in model.letters:
        raise ValueError(f"model.pattern={model.pattern} has no block {letter}; give a model that has")
    yield from (f"blocks.{index}.mixer." for index, other in enumerate(model.letters) if other == letter)


def start(weights: Weights, keep: float, gamma: float) -> Weights:
    """Put BiP's blocks instead of feed-forwards, with the norms of their channels as scores."""
    model, section, state = weights.model, weights.model.feed_forward, dict(weights.state)
    found = list(places(model, "-"))
    assert section is not None, "a model with such blocks has their section"
    if section.linear_kind != "dense" or section.activation_limit or section.activation == "swiglu_oai":
        raise ValueError("model.feed_forward has factors or a limit, which BiP's blocks have not; give dense ones")
    options = BipOptions(hidden_size=section.hidden_size, activation=section.activation, keep=keep, gamma=gamma)
    for field, rule in options.broken_rules():
        raise ValueError(f"{field}: {rule}")
    for place in found:
        up, down = (state[f"{place}{which}_proj.weight"].double() for which in ("up", "down"))
        norms = (up.square().sum(1).view(-1, down.shape[1]).sum(0) + down.square().sum(0)).sqrt()
        # As far apart as first scores are, so that an optimizer's steps reach them.
        state[f"{place}scores"] = (FIRST_SCORES * (norms - norms.mean()) / norms.std()).float()
    pattern = replace(model.parsed_pattern, letters=tuple(SPEC.symbol if x == "-" else x for x in model.letters))
    changes = {"pattern": pattern.canonical(), "feed_forward": None}
    return replace(weights, model=model.model_copy(update=changes).with_options(SPEC, options), state=state)


def cut(weights: Weights) -> Weights:
    """Put feed-forwards of the channels that compute instead of BiP's blocks."""
    model, state = weights.model, dict(weights.state)
    found, options = list(places(model, SPEC.symbol)), model.block_options(SPEC.symbol)
    assert isinstance(options, BipOptions), "the pattern has such blocks"
    section = FeedForwardConfig(hidden_size=options.num_kept(), activation=options.activation)
    if "-" in model.letters and model.feed_forward != section:
        raise ValueError("model.feed_forward has other sizes than what the mask leaves, and a model has one of them")
    for place in found:
        kept = state.pop(f"{place}scores").topk(options.num_kept()).indices.sort().values
        up, down = f"{place}up_proj.weight", f"{place}down_proj.weight"
        state[up] = state[up].view(-1, options.hidden_size, state[up].shape[1])[:, kept].flatten(0, 1).contiguous()
        state[down] = state[down][:, kept].contiguous()
    pattern = replace(model.parsed_pattern, letters=tuple("-" if x == SPEC.symbol else x for x in model.letters))
    mixers = model.mixers.model_copy(update={SPEC.name: None})
    changes = {"pattern": pattern.canonical(), "feed_forward": section, "mixers": mixers}
    return replace(weights, model=model.model_copy(update=changes), state=state)


def compare(weights: Weights, smaller: Weights) -> str:
    """Compare logits: the largest difference and the text, in words. Raises RuntimeError if they differ."""
    tokens_BT, _, compared = proof_text(weights)
    difference = logit_difference(weights, smaller, tokens_BT)
    if not difference <= RELATIVE_TOLERANCE:  # NaN fails too
        raise RuntimeError(f"logits differ by {difference:.1e} of the largest; nothing was written")
    return f"logits differ by {difference:.0e} on {compared}"


def main(arguments: list[str]) -> int:
    """Change, compare, write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m amfm_bip", description=__doc__)
    parser.add_argument("form", choices=("start", "cut"))
    parser.add_argument("checkpoint", help="run, checkpoint or weights folder")
    parser.add_argument("out", help="weights folder to write")
    parser.add_argument("--keep", type=float, default=0.5, help="of start: share of the channels that compute")
    parser.add_argument("--gamma", type=float, default=1.0, help="of start: see model.mixers.bip.gamma")
    given = parser.parse_args(arguments)
    try:
        check_free(Path(given.out))
        weights = read_weights(given.checkpoint)
        words = f"{given.keep:.0%} of the channels compute"
        if given.form == "start":
            changed = start(weights, given.keep, given.gamma)
        else:
            changed = cut(weights)
            words = compare(weights, changed)
        write_model(Path(given.out), changed)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{changed.model.pattern} in {given.out}; {words}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
