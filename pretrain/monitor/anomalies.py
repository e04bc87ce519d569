"""Anomalies of a step: gradients that are not finite, losses that jump, routers that send nearly all tokens to the same experts.

Detection uses numbers that all ranks share (the reduced loss, the global norm), so every rank comes to the same verdict
without asking the others. Description needs what only one rank knows, its samples and parameters, and gathers that
after a step was skipped, when the cost of a collective on objects does not matter. A spike is judged against the median
of recent losses, which one earlier spike does not move.

Experts collapse without a balancing loss or bias: those that are a little better early get more tokens, learn more, and get
more still; the loss falls anyway, so no one notices that most of the experts learn nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from amfm.data_pipeline.batch import Batch
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.config.schema import HealthConfig
from amfm.pretrain.engine.gradients import GradientFault
from amfm.pretrain.parallel import Parallel

LEAST_SIGMA = 1e-6  # of the mean: a curve without noise has no spikes of rounding
EXPERT_STEPS = 20
# Of the way from even loads (0) to one set of top_k experts that takes every token (1).
COLLAPSE = 0.9


def describe_skip(
    parallel: Parallel, batches: Sequence[Batch], losses: Sequence[float], fault: GradientFault | None
) -> dict[str, Any]:
    """Describe a skipped step: its samples, and per rank the first bad parameter and the bad micro-batches.

    Every rank must call this; the answer is the same on all.
    """
    own = {
        "rank": parallel.rank,
        "sample_ids": [list(batch.sample_ids) for batch in batches],
        "losses": [repr(loss) for loss in losses],
        "fault": None if fault is None else asdict(fault),
    }
    reports = parallel.gather_objects(own)
    bad_samples = [
        ids
        for report in reports
        for ids, loss in zip(report["sample_ids"], report["losses"])
        if loss in ("nan", "inf", "-inf")
    ]
    return {
        "sample_ids": sorted({sample for report in reports for ids in report["sample_ids"] for sample in ids}),
        "samples_with_bad_loss": bad_samples,
        "faults": [{"rank": report["rank"], **report["fault"]} for report in reports if report["fault"] is not None],
    }


@dataclass(frozen=True)
class StepAnomaly:
    """What went wrong in a step: its kind, and a sentence for the log."""

    kind: Literal["nonfinite", "spike"]
    text: str

    def policy(self, health: HealthConfig) -> str:
        """Look up what the configuration says to do about it."""
        return health.on_spike if self.kind == "spike" else health.on_nonfinite


def judge_loss(loss: float, recent_losses: Sequence[float], health: HealthConfig) -> StepAnomaly | None:
    """Detect a spike: a loss far above the full window of recent ones, by its median or mean (`health.spike_rule`).

    None for no spike and on_spike=ignore.
    """
    if health.on_spike == "ignore" or len(recent_losses) < health.spike_window:
        return None
    if health.spike_rule == "sigma":
        return judge_deviation("loss", loss, recent_losses, health)
    median = statistics.median(recent_losses)
    # A loss of NaN is not a spike: it comes with gradients that are not finite, which are their own anomaly.
    if not loss > health.spike_ratio * median:
        return None
    return StepAnomaly(
        "spike",
        f"loss {loss:.4f} is above {health.spike_ratio:g} x {median:.4f}, the median of {len(recent_losses)} steps",
    )


def judge_deviation(name: str, value: float, recent: Sequence[float], health: HealthConfig) -> StepAnomaly | None:
    """Detect a value that is `health.spike_sigma` standard deviations above the mean of a full window."""
    found = deviations(value, recent) if len(recent) >= health.spike_window else None
    if found is None or health.spike_sigma is None or found <= health.spike_sigma:
        return None
    text = f"{name} {value:.4g} is {found:.1f} standard deviations above the mean of {len(recent)} steps"
    return StepAnomaly("spike", text)


def deviations(value: float, recent: Sequence[float]) -> float | None:
    """How many standard deviations a value is above the mean of recent ones; None where it is not finite."""
    if not abs(value) < float("inf"):
        return None
    mean = statistics.fmean(recent)
    return (value - mean) / max(statistics.pstdev(recent, mean), LEAST_SIGMA * abs(mean), 1e-12)


def explain_refusal(reason: str | None) -> StepAnomaly:
    """The anomaly of a step that moved nothing: a spike for the reason that was given, else gradients that are not finite."""
    return StepAnomaly("nonfinite", "gradients are not finite") if reason is None else StepAnomaly("spike", reason)


def remember(value: float, recent: list[float], health: HealthConfig) -> None:
    """Add a step's loss, or gradient norm, to the window of the newest `spike_window`, in place; nothing if spikes are ignored.

    Windows are saved in checkpoints, so that a resumed run judges as an uninterrupted one.
    """
    if health.on_spike != "ignore":
        recent.append(value)
        del recent[: -health.spike_window]


def too_many_skips(skipped_in_row: int, max_skipped_steps: int) -> bool:
    """Whether the run must stop: `max_skipped_steps` in a row were skipped (with 0 the first one already)."""
    return skipped_in_row > 0 and skipped_in_row >= max_skipped_steps


def describe_unbalanced(model: ModelConfig) -> str | None:
    """Report that no setting balances the experts, and which ones would; None if one does or no token has a
    choice.
    """
    return next(
        filter(None, (_unbalanced(key, moe) for key, moe in model.expert_sections() if model.routed_experts())), None
    )


def _unbalanced(key: str, moe: MoeConfig) -> str | None:
    balances = (
        moe.top_k == moe.num_experts,
        moe.package_router() is not None,
        moe.expert_bias and moe.bias_update_rate > 0,
        moe.auxiliary_loss_weight,
        moe.sequence_loss_weight,
        moe.overflow == "recycle",
    )
    if any(balances):
        return None
    remedies = f"{key}.expert_bias=true, or " if moe.router != "softmax" else ""
    return (
        f"nothing balances the {moe.num_experts} experts: few of them may end up with all tokens; "
        f"set {remedies}for example {key}.auxiliary_loss_weight=1e-3"
    )


def find_collapsed(expert_counts: Mapping[int, Sequence[int]], top_k: int) -> dict[int, float]:
    """Find the MoE blocks that collapsed in a step, with the share of tokens (0 to 1) that chose their most loaded expert.

    expert_counts: choices by expert, for each block.
    """
    found = {}
    for block, counts in expert_counts.items():
        share, even = max(counts) * top_k / max(1, sum(counts)), top_k / len(counts)
        if even < 1 and (share - even) / (1 - even) >= COLLAPSE:
            found[block] = share
    return found
