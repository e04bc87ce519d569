"""Faults that are planted in our training, each of which the comparison with the plain loop must see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from amfm.data_pipeline.batch import Batch
from amfm.model.mixers import delta
from amfm.model.moe.block import MoeMixer
from amfm.pretrain.engine import engine, optimizer
from amfm.pretrain.micro_batch import LossShare
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.stages import RunStage

Plant = Callable[[ExitStack], None]


def put(planted: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set what a module or class has under a name, until the stack closes."""
    planted.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def decay_on_norms(planted: ExitStack) -> None:
    """Vectors decay as matrices do."""
    put(planted, optimizer, "decays", lambda name, shape: True)


def clip_after_update(planted: ExitStack) -> None:
    """The update has the gradients as they were before clipping."""
    put(planted, DeepSpeedZeroOptimizer, "unscale_and_clip_grads", lambda wrapper, gradients, norm: None)


def bias_towards_the_load(planted: ExitStack) -> None:
    """The balancing bias of a busy expert rises."""
    balance = MoeMixer.balance_experts
    put(planted, MoeMixer, "balance_experts", lambda mixer, counts: balance(mixer, -counts))


def router_losses_of_each_micro_batch(planted: ExitStack) -> None:
    """Router losses of micro-batches are summed and not averaged."""
    of_counts = LossShare.of_counts
    put(planted, LossShare, "of_counts", lambda counts, number, model: of_counts(counts, 1, model))


def rate_of_the_step_before(planted: ExitStack) -> None:
    """The schedule is one step late."""
    rate = RunStage.rate
    put(planted, RunStage, "rate", lambda stage, step: rate(stage, max(1, step - 1)))


def one_document_a_row(planted: ExitStack) -> None:
    """Tokens see the documents before theirs."""
    put(planted, Batch, "num_documents", property(lambda batch: len(batch.tokens_BT)))


def partial_gradients_not_summed(planted: ExitStack) -> None:
    """Ranks keep their parts of the gradients of what they hold alike."""
    put(planted, engine, "sum_partial_gradients", lambda *given, **named: None)


def partial_gradients_summed_twice(planted: ExitStack) -> None:
    """And the other way round."""
    add = engine.sum_partial_gradients

    def twice(*given: Any, **named: Any) -> None:
        add(*given, **named)
        add(*given, **named)

    put(planted, engine, "sum_partial_gradients", twice)


def labels_of_one_rank(planted: ExitStack) -> None:
    """A rank divides by its own labels, and by the number of ranks."""

    def estimate(parallel: Parallel, values: Tensor) -> Tensor:
        return values * parallel.data_world_size

    put(planted, Parallel, "sum_over_data", estimate)


def keys_of_any_length(planted: ExitStack) -> None:
    """Queries and keys of Gated DeltaNet keep their lengths."""
    put(planted, delta, "unit_length", lambda x: x)


FAULTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        decay_on_norms,
        clip_after_update,
        bias_towards_the_load,
        router_losses_of_each_micro_batch,
        rate_of_the_step_before,
        one_document_a_row,
        partial_gradients_not_summed,
        partial_gradients_summed_twice,
        labels_of_one_rank,
        keys_of_any_length,
    )
}
# The class, and the ranks and layout under which each is planted.
PLANTED: list[tuple[str, str, int, dict[str, Any]]] = [
    ("decay_on_norms", "lfm2_moe", 1, {}),
    ("clip_after_update", "lfm2_moe", 1, {}),
    ("bias_towards_the_load", "lfm2_moe", 1, {}),
    ("router_losses_of_each_micro_batch", "gpt_oss", 1, {}),
    ("rate_of_the_step_before", "gpt_oss", 1, {}),
    ("one_document_a_row", "gpt_oss", 1, {}),
    ("partial_gradients_not_summed", "lfm2_moe", 2, {"tensor": 2, "sequence_parallel": True}),
    ("partial_gradients_summed_twice", "lfm2_moe", 2, {"tensor": 2, "sequence_parallel": True}),
    ("partial_gradients_not_summed", "granitemoehybrid", 2, {"pipeline": 2}),
    ("keys_of_any_length", "qwen3_next", 1, {}),
    ("labels_of_one_rank", "gpt_oss", 2, {"zero_stage": 2}),
]
