"""What a step reports: summed on the device over micro-batches, then over all ranks, and read in one copy.

The host reads the device once for all of it, because each read waits until the device has done what was queued before.
So the counts of valid tokens, by which losses are divided, stay on the device too until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import ModelOutput
from amfm.pretrain.monitor.anomalies import StepAnomaly
from amfm.pretrain.monitor.signals import WATCHED
from amfm.pretrain.parallel import Parallel


@dataclass(frozen=True)
class RankStatus:
    """What only one rank knows at the end of a step.

    A signal's number (0 for none), whether it saves, samples it found damaged.
    """

    signal: int = 0
    is_saving: bool = False
    damaged_samples: int = 0


@dataclass(frozen=True)
class StepReport:
    """The sums of a step over all ranks, as numbers of the host; the same on every rank.

    tokens: valid ones, of the main loss and then of each MTP layer, at least 1. expert_counts: choices by expert
    of each MoE block. status: the largest signal of any rank, whether some rank saves, the damaged samples of all data
    ranks. missed: times that rows of spread experts had no place (`RowCapacity`).
    """

    nll: float
    z_loss: float
    auxiliary: dict[str, float]
    mtp_nll: list[float]
    tokens: list[int]
    expert_counts: dict[int, list[int]]
    status: RankStatus
    missed: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood a token."""
        return self.nll / self.tokens[0]

    def mean_auxiliary(self, model: ModelConfig, num_micro_batches: int) -> dict[str, float]:
        """Auxiliary losses as a step reports them: means over micro-batches, the logits' z-loss over tokens."""
        means = {name: value / num_micro_batches for name, value in self.auxiliary.items()}
        return means | ({"logits_z": self.z_loss / self.tokens[0]} if model.logits_z_loss_weight > 0 else {})

    def depth_losses(self) -> tuple[float, ...]:
        """Mean negative log-likelihood a token of each MTP layer."""
        return tuple(nll / tokens for nll, tokens in zip(self.mtp_nll, self.tokens[1:]))


@dataclass(frozen=True)
class StepResult:
    """What a step reports, the same on every rank but for `busy_seconds`.

    loss: mean negative log-likelihood a token, in nats. auxiliary: weighted auxiliary losses, means over micro-batches.
    expert_counts: token choices by expert, for each MoE block. grad_norm: before clipping. applied: whether the weights
    moved. signal: number of the signal that asks some rank to stop, 0 for none. is_saving: whether some rank still
    writes a checkpoint. busy_seconds: time in which this rank read data and computed, without waiting for others.
    anomaly: what went wrong, if anything; skip: what is known about a step that was not applied. damaged_samples: of
    the whole run, read as rows without labels (`data.on_corruption: quarantine`). mtp_losses: of each depth of
    multi-token prediction, as `loss`. found: what hooks add to the step's line of metrics.jsonl.
    """

    loss: float
    tokens: int
    sequence_length: int
    auxiliary: dict[str, float]
    expert_counts: dict[int, list[int]]
    grad_norm: float
    applied: bool
    learning_rate: float
    seconds: float
    signal: int
    is_saving: bool
    busy_seconds: float
    anomaly: StepAnomaly | None = None
    skip: dict[str, Any] | None = None
    damaged_samples: int = 0
    mtp_losses: tuple[float, ...] = ()
    found: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepSums:
    """Everything a step reports, summed over this rank's micro-batches and then over all ranks in one reduction.

    Every rank holds the keys of the whole model, also where a pipeline gives it only some of the blocks: a reduction
    needs tensors of equal shape everywhere. micro_losses: of each micro-batch that ends here, summed over its tokens;
    they stay.
    """

    nll: Tensor
    z_loss: Tensor
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    mtp_nll: list[Tensor] = field(default_factory=list)
    micro_losses: list[Tensor] = field(default_factory=list)

    def add(self, output: ModelOutput) -> None:
        """Add one micro-batch's output, on the device."""
        if output.loss is not None:
            self.nll += output.loss.nll_sum
            self.micro_losses.append(output.loss.total.detach())
            self.z_loss += output.loss.total.detach() - output.loss.nll_sum
        for own, loss in zip(self.mtp_nll, output.mtp):
            own += loss.nll_sum
        for name, value in output.auxiliary.items():
            self.auxiliary[name] += value.detach()
        for block, counts_E in output.expert_counts.items():
            self.expert_counts[block] += counts_E

    def reduce(self, parallel: Parallel, tokens: Tensor, status: RankStatus | None = None) -> StepReport:
        """Sum over all ranks that saw other tokens or blocks, in float64, which is exact for counts, and read it.

        What only single ranks know is sent along, so that all stop, and all learn how a save ended, at the same step.
        `tokens`: counts that the data ranks have summed already (`count_valid_tokens`); they are read in the same copy.
        `expert_counts` are those of all ranks from now on, on the device. Every rank must call this.
        """
        parts = [self.nll, self.z_loss, *self.auxiliary.values(), *self.mtp_nll]
        vectors = [torch.stack([part.double() for part in parts])]
        vectors += [counts_E.double() for counts_E in self.expert_counts.values()]
        own = encode(status or RankStatus(), parallel)
        capacity = parallel.groups.row_capacity
        of_each = own if capacity is None else torch.cat([own, capacity.missed.double().view(1)])
        summed = parallel.all_reduce_unique(torch.cat(vectors), of_each=of_each)
        sizes = [len(vector) for vector in vectors]
        counts = summed[: sum(sizes)].split(sizes)[1:]
        self.expert_counts = {block: counts_E.long() for block, counts_E in zip(self.expert_counts, counts)}
        numbers = torch.cat([summed, tokens.double()]).tolist()
        taken = iter(numbers)
        nll, z_loss = next(taken), next(taken)
        auxiliary = {name: next(taken) for name in self.auxiliary}
        mtp_nll = [next(taken) for _ in self.mtp_nll]
        by_block = {block: [int(next(taken)) for _ in counts_E] for block, counts_E in self.expert_counts.items()}
        signal = max(number if next(taken) else 0 for number in WATCHED)
        is_saving, damaged_samples = bool(next(taken)), int(next(taken))
        num_missed = 0 if capacity is None else int(next(taken))
        valid = [max(1, int(count)) for count in taken]
        status = RankStatus(int(signal), is_saving, damaged_samples)
        return StepReport(nll, z_loss, auxiliary, mtp_nll, valid, by_block, status, num_missed)


def encode(status: RankStatus, parallel: Parallel) -> Tensor:
    """News of a rank as numbers that are summed: how many got each watched signal, how many save, damaged samples."""
    groups = parallel.groups
    reads_alone = groups.tp.rank() == groups.cp.rank() == groups.pp.rank() == 0  # of the ranks with the same samples
    values = [*(status.signal == number for number in WATCHED), status.is_saving, status.damaged_samples * reads_alone]
    vector = torch.zeros(len(values), dtype=torch.float64, device=parallel.device)
    for place, value in enumerate(values):
        if value:
            vector[place] = float(value)  # a launch on a GPU, and no copy that the host waits for
    return vector


def empty_sums(config: ModelConfig, device: torch.device, *, extra: Sequence[str] = ()) -> StepSums:
    """Zero sums with the keys of the whole model.

    Every auxiliary loss, every block with a router, every MTP layer.

    extra: auxiliary losses that the run's blocks give besides those of its model section.
    """
    zero = torch.zeros((), device=device)
    sums = StepSums(zero.clone(), zero.clone(), mtp_nll=[zero.clone() for _ in range(config.num_depths)])
    sums.auxiliary = {name: zero.clone() for name in (*config.auxiliary_names(), *extra)}
    sums.expert_counts = {
        block: torch.zeros(number, dtype=torch.int64, device=device)
        for block, number in config.routed_experts().items()
    }
    return sums
