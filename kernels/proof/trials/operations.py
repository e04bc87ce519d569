"""The trials of every operation, by its name in `amfm.kernels.proof.cases.operations`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from amfm.kernels.proof.cases.operations import OPERATIONS
from amfm.kernels.proof.trials import blocks, mixers, scans
from amfm.kernels.proof.trials.trial import Kind, Sized, trials_of_problems

TRIALS: dict[str, Callable[[], Iterator[Sized]]] = {
    "decay_scan": scans.decay_scan_trials,
    "mamba2": mixers.mixer_trials,
    "decay_scan_vector": scans.vector_scan_trials,
    "diag_scan": scans.diag_scan_trials,
    "delta_scan": scans.delta_scan_trials,
    "causal_conv1d": blocks.convolution_trials,
    "norm": blocks.norm_trials,
    "attention": blocks.attention_trials,
    "linear_cross_entropy": blocks.head_trials,
    "moe": blocks.expert_trials,
    "router": blocks.router_trials,
    "swiglu": blocks.activation_trials,
    "rope": blocks.rope_trials,
}


def trials_of(operation: str, *kinds: Kind) -> list[Sized]:
    """Trials of an operation, of all kinds where none is named; those of its timed problems where it lists none."""
    trials = TRIALS.get(operation)
    sized = [*trials()] if trials is not None else [*trials_of_problems(OPERATIONS[operation].on_card)]
    return [each for each in sized if not kinds or each.kind in kinds]
