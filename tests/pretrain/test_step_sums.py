"""What ranks report at the end of a step: sums over all of them, read in one copy."""

from __future__ import annotations

import signal

import pytest
import torch

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import ModelOutput
from amfm.model.loss import CrossEntropy
from amfm.model.parallel.groups import RowCapacity
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.step_sums import RankStatus, StepReport, empty_sums
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL


def report_of_rank(tensor: int) -> tuple[StepReport, dict[int, list[int]]]:
    """Each rank adds sums of its own; with tensor ranks both have seen the same tokens."""
    parallel = initialize_parallel(ParallelConfig(tensor=tensor), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    sums = empty_sums(ModelConfig.model_validate(MODEL), parallel.device)
    part = 1 if tensor == 2 else 1 + parallel.rank
    capacity = parallel.groups.row_capacity = RowCapacity(1.0, parallel.device)
    capacity.missed += part
    sums.nll += 0.1 * part
    sums.z_loss += 2.0 * part
    for name in sums.auxiliary:
        sums.auxiliary[name] += part
    for counts_E in sums.expert_counts.values():
        counts_E += torch.tensor([1, 2, 3, 2**40]) * part
    status = [RankStatus(signal.SIGUSR1, False, 2), RankStatus(signal.SIGTERM, True, 5)][parallel.rank]
    report = sums.reduce(parallel, torch.tensor([10, 0]), status)
    return report, {block: counts_E.tolist() for block, counts_E in sums.expert_counts.items()}


@pytest.mark.parametrize(("tensor", "times"), [(1, 3), (2, 1)])
def test_all_ranks_read_the_sums_and_the_news_of_all(tensor: int, times: int) -> None:
    (report, counts), (other, other_counts) = run_ranks(report_of_rank, tensor)
    assert report == other and counts == other_counts
    assert report.nll == pytest.approx(0.1 * times, rel=1e-6) and report.z_loss == 2.0 * times
    assert report.loss == report.nll / 10
    assert report.tokens == [10, 1]
    assert set(report.auxiliary.values()) == {float(times)} and len(report.auxiliary) == 2
    assert report.expert_counts == counts == {1: [times, 2 * times, 3 * times, 2**40 * times]}
    assert report.status.signal == max(signal.SIGUSR1, signal.SIGTERM) and report.status.is_saving
    assert report.missed == (3 if tensor == 1 else 2), "of each rank its own"
    # Tensor ranks read the same samples.
    assert report.status.damaged_samples == (7 if tensor == 1 else 2)


def test_micro_batches_add_up_by_hand_one_without_a_loss_among_them() -> None:
    """Two with a loss, as the last pipeline stage has, and one without, as the others have."""
    config = ModelConfig.model_validate(MODEL | {"pattern": "ME*-/*-", "mtp": {}, "logits_z_loss_weight": 0.5})
    parallel = initialize_parallel(ParallelConfig(), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    sums = empty_sums(config, parallel.device, extra=("extra",))
    names = list(sums.auxiliary)
    assert len(names) == 3 and len(sums.mtp_nll) == 1
    for nll, total in ((3.0, 3.5), (4.0, 6.0), (None, 0.0)):
        loss, depths = None, ()
        if nll is not None:
            loss = CrossEntropy(torch.tensor(total), torch.tensor(nll), torch.zeros(4))
            depths = (CrossEntropy(torch.tensor(9.0), torch.tensor(2 * nll), torch.zeros(4)),)
        auxiliary = {name: torch.tensor(float(place + 1)) for place, name in enumerate(names)}
        sums.add(ModelOutput(None, loss, auxiliary, {1: torch.tensor([1, 2, 0, 3])}, mtp=depths))
    assert [float(loss) for loss in sums.micro_losses] == [3.5, 6.0]
    report = sums.reduce(parallel, torch.tensor([20, 7]))
    assert (report.loss, report.z_loss, report.depth_losses()) == (7.0 / 20, 2.5, (2.0,))
    assert report.expert_counts == {1: [3, 6, 0, 9]} and report.status == RankStatus(0, False, 0) and report.missed == 0
    means = report.mean_auxiliary(config, 3)
    assert means == dict(zip(names, (1.0, 2.0, 3.0))) | {"logits_z": 2.5 / 20}
    assert "logits_z" not in report.mean_auxiliary(ModelConfig.model_validate(MODEL), 3)
