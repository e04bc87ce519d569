"""Runs at equal cost: how many steps each setting trains, so that all spend what the first one does.

FLOPs are those of the model (`amfm.model.flops`), forward and backward, as `amfm plan` and reports count them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from amfm.model.flops import count_parameters, flops_per_token
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig

Equal = Literal["flops", "tokens", "parameters", "time"]
SAME_SIZE = 0.01  # of the parameters, by which models count as equal
MOST_FITTED = 2**20
FIT_MULTIPLE = 8  # sizes are fitted in steps of it, as kernels and ranks want them


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of one optimizer step."""
    return config.train.global_batch_size * config.train.sequence_length


def flops_of_run(config: RunConfig, tokens: int) -> float:
    """Training FLOPs of a run over so many tokens."""
    return sum(flops_per_token(config.model, config.train.sequence_length).values()) * tokens


def check_equal(config: RunConfig, name: str, equal: Equal) -> None:
    """Reject runs whose steps cannot be set so. Raises ConfigError."""
    if equal == "parameters":
        return
    if config.stages or config.train.batch_ramp is not None:
        rule = f"equal: {equal} sets train.steps, and this run has stages or a batch ramp"
        raise ConfigError([Problem("", f"run {name}: {rule}", "compare runs without them")])


def equal_steps(
    config: RunConfig, first: RunConfig, equal: Equal, seconds: Mapping[str, float], names: tuple[str, str]
) -> int:
    """Steps with which a run costs what the first one does. seconds: of a step, by run, where time is what is equal."""
    if equal == "parameters":
        return config.train.steps
    if equal == "time":
        share = seconds[names[1]] / seconds[names[0]]
    else:
        own, theirs = (
            tokens_per_step(each) if equal == "tokens" else flops_of_run(each, tokens_per_step(each))
            for each in (config, first)
        )
        share = theirs / own
    return max(1, round(first.train.steps * share))


def fit_size(build: Callable[[int], RunConfig], wanted: int) -> int:
    """The multiple of FIT_MULTIPLE at which the model has nearest to `wanted` parameters, which grow with it."""

    def size(number: int) -> int:
        return count_parameters(build(number * FIT_MULTIPLE).model).total

    low, high = 1, 2
    while size(high) < wanted:
        if high * FIT_MULTIPLE > MOST_FITTED or size(high) == size(low):
            raise ValueError(
                f"no value of it up to {high * FIT_MULTIPLE} gives {wanted:,} parameters: it has {size(high):,}"
            )
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    return min((low, high), key=lambda number: abs(size(number) - wanted)) * FIT_MULTIPLE


def check_sizes(models: Mapping[str, RunConfig]) -> None:
    """Reject models of other sizes than the first. Raises ConfigError, which says of each how large it is."""
    (first, *rest) = models
    wanted = count_parameters(models[first].model).total
    problems = []
    for name in rest:
        found = count_parameters(models[name].model).total
        if abs(found - wanted) > SAME_SIZE * wanted:
            rule = f"run {name}: {found:,} parameters, and {first} has {wanted:,}: {found / wanted - 1:+.1%}"
            remedy = "name a size to fit (`fit: model.feed_forward.hidden_size`), or derive one"
            problems.append(Problem("equal", rule, remedy, "parameters"))
    if problems:
        raise ConfigError(problems)
