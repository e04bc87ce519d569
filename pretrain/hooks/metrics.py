"""The log of a step: its line of metrics.jsonl, the display, and the event of a step that was skipped.

Now and then, the MoE blocks in which the same experts take nearly every token (monitor/anomalies.py).

Now and then, the ranks that compute much longer than the others (monitor/stragglers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from amfm.data_pipeline.loader.loader import SourceUse
from amfm.model.config.moe import MoeConfig
from amfm.model.flops import flops_per_token, mean_auxiliary, megatron_flops_per_token
from amfm.pretrain.hook import Hook
from amfm.pretrain.launcher_protocol import log_time
from amfm.pretrain.monitor.anomalies import EXPERT_STEPS, find_collapsed
from amfm.pretrain.monitor.environment import describe_allocator, read_peak_memory
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.monitor.stragglers import STRAGGLER_STEPS, StepTimes
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult


class Stragglers(Hook):
    """Compares the ranks' own work of the last steps."""

    def __init__(self, run: Run) -> None:
        self.run, self.times = run, StepTimes()

    def after_step(self, result: StepResult) -> None:
        """Record the step's busy seconds, and compare ranks when that is due."""
        self.times.add(result.busy_seconds)
        if not is_due(self.run.progress.step, STRAGGLER_STEPS):
            return
        slow = self.times.find(self.run.parallel, self.run.config.health.straggler_percent)
        if slow:
            names = ", ".join(str(entry) for entry in slow)
            text = f"step {self.run.progress.step}: slower than the median: {names}"
            self.run.tell("stragglers", text, ranks=[asdict(entry) for entry in slow])


class Experts(Hook):
    """Reports a block that collapsed, once until it recovers."""

    def __init__(self, run: Run) -> None:
        self.run, self.num_retired = run, 0
        self.collapsed: frozenset[int] = frozenset()

    def before_update(self) -> None:
        """Ask how many experts of a block could get no token in this step by design: equally many in all blocks."""
        if self.run.config.model.expert_sections() and is_due(self.run.progress.step + 1, EXPERT_STEPS):
            retired = max((block.mixer.num_retired() for _, block in self.run.model.all_blocks()), default=0)
            (self.num_retired,) = self.run.parallel.max_over_all([retired])  # a pipeline rank may hold no such block

    def after_step(self, result: StepResult) -> None:
        """Compare the loads when that is due; retired experts get no tokens, and are left out."""
        model = self.run.config.model
        if not model.expert_sections() or not is_due(self.run.progress.step, EXPERT_STEPS):
            return
        living = {block: sorted(counts)[self.num_retired :] for block, counts in result.expert_counts.items()}
        shares: dict[int, float] = {}
        for block, counts in living.items():
            moe = model.block_options(model.built_letters[block])
            shares |= find_collapsed({block: counts}, moe.top_k) if isinstance(moe, MoeConfig) else {}
        if shares.keys() - self.collapsed:
            blocks = ", ".join(f"{block} ({share:.0%} of tokens)" for block, share in shares.items())
            self.run.tell(
                "experts_collapsed",
                f"warning: step {self.run.progress.step}: routing has collapsed: the same experts receive nearly all tokens in block {blocks}; "
                "see model.moe.expert_bias, bias_update_rate (2e-2 for runs below about 1,000 steps) and "
                "auxiliary_loss_weight",
                token_share={str(block): share for block, share in shares.items()},
            )
        self.collapsed = frozenset(shares)


class Metrics(Hook):
    """Logs every step, including one that ends the run; comes after all hooks that find something for its line."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def after_step(self, result: StepResult) -> None:
        """Log the step."""
        run, files = self.run, self.run.files
        metrics = describe_step(run, result)
        if files.log is not None:
            files.log.write_metrics(metrics)
            for hook in run.hooks:
                hook.after_log(metrics)
        if files.display is not None:
            files.display.show(metrics)
        if result.skip is not None and result.anomaly is not None:
            first = result.skip.get("first_nonfinite")
            where = f", first in {first}" if first else ""
            run.tell(
                "skipped_step",
                f"step {run.progress.step}: {result.anomaly.text}{where}; the step was skipped on every rank",
                cause=result.anomaly.text,
                in_row=run.progress.skipped_in_row,
                **result.skip,
            )


def describe_step(run: Run, result: StepResult) -> dict[str, Any]:
    """Build the step's line of metrics.jsonl; NaN and infinities become null, because JSON has no word for them.

    `mfu`: model FLOPs, without those of recomputation, over the peak of all ranks; `tflops_per_gpu`: per rank and second. `expert_load`: tokens of the most loaded
    expert over the mean, for each MoE block. `mtp_loss`: of each MTP layer. `memory_bytes`: the
    main rank's peak so far; `allocator`: what else its allocator says, on a GPU. `damaged_samples`: of the run so far, if there are any.
    """
    tokens_per_second = result.tokens / result.seconds
    per_rank = tokens_per_second / run.parallel.world_size
    flops = sum(flops_per_token(run.model.config, result.sequence_length).values())
    metrics: dict[str, Any] = {
        "step": run.progress.step,
        "time": round(log_time(), 3),
        "loss": finite(result.loss),
        "grad_norm": finite(result.grad_norm),
        "lr": result.learning_rate,
        "tokens": run.progress.tokens,
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_gpu": per_rank,
        "tflops_per_gpu": per_rank * flops / 1e12,
        "mfu": tokens_per_second * flops / run.peak.flops_per_second,
        "seconds": result.seconds,
        "auxiliary": {name: finite(value) for name, value in result.auxiliary.items()},
        "expert_load": {
            str(block): max(counts) * len(counts) / max(1, sum(counts))
            for block, counts in result.expert_counts.items()
        },
        "memory_bytes": read_peak_memory(run.parallel.device),
        "data": describe_data(run.loader.ledger()),
        "skipped": not result.applied,
    }
    if (theirs := megatron_flops_per_token(run.model.config, result.sequence_length)) is not None:
        metrics["megatron_tflops_per_gpu"] = per_rank * theirs / 1e12
    if means := mean_auxiliary(run.model.config, result.auxiliary, len(result.expert_counts)):
        metrics["auxiliary_mean"] = {name: finite(value) for name, value in means.items()}
    if result.mtp_losses:
        metrics["mtp_loss"] = [finite(loss) for loss in result.mtp_losses]
    if result.damaged_samples:
        metrics["damaged_samples"] = result.damaged_samples
    if run.parallel.device.type == "cuda":
        metrics["allocator"] = describe_allocator(torch.cuda.memory_stats(run.parallel.device))
    metrics |= result.found
    if run.config.stages:
        metrics["stage"] = run.stage.name
    return metrics


def describe_data(ledger: Sequence[SourceUse]) -> dict[str, Any]:
    """Summarise data use for the log: tokens of each source in the newest phase, and its epochs since the run began."""
    newest = [line for line in ledger if line.phase == ledger[-1].phase]
    return {
        "phase": ledger[-1].phase,
        "tokens": {line.source: line.tokens for line in newest},
        "epochs": {line.source: line.epochs for line in newest},
    }
