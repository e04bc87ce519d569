"""Rules of distillation: layouts in which a teacher has not been shown to read what the model reads."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import RunConfig


def distill_problems(config: RunConfig) -> Iterator[Problem]:
    """Find what does not go with a section `distill`; the teacher itself is compared when it is read."""
    section = config.distill
    if section is None:
        return
    parallel = config.parallel
    layouts = [parallel, *(stage.parallel for stage in config.stages if stage.parallel is not None)]
    if section.store is not None and section.top_k is None:
        yield Problem(
            "distill.store", "holds the likeliest tokens alone", "set distill.top_k, such as 64", section.store
        )
    if any(each.pipeline > 1 for each in layouts):
        rule = (
            "is read whole by every rank, and with parallel.pipeline above 1 no rank reads the tokens and has the head"
        )
        yield Problem(
            "distill.teacher", rule, "use parallel.pipeline=1 with tensor, expert or ZeRO ranks", section.teacher
        )
    if section.store is None and any(each.expert_buffer_factor is not None for each in layouts):
        rule = "may have experts, whose rows would be counted as those of the model in parallel.expert_buffer_factor"
        yield Problem("distill.teacher", rule, "remove parallel.expert_buffer_factor", section.teacher)
    if config.convert is not None:
        rule = "has no place in a conversion, whose teacher is convert.teacher"
        yield Problem("distill", rule, "remove it, and distil the result")
    if config.model.head is not None:
        rule = f"compares logits, and the head {config.model.head} of a package computes its own probabilities"
        yield Problem("distill", rule, "remove it, or model.head")
    if section.top_k is not None and section.top_k >= config.model.vocab_size:
        rule = f"must be below model.vocab_size={config.model.vocab_size}"
        yield Problem("distill.top_k", rule, "lower it, or use null for all tokens", str(section.top_k))
