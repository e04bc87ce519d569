"""What ranks report at the end of a step: sums over all of them, read in one copy."""

from __future__ import annotations

import signal

import pytest
import torch

from amfm.model.config.schema import ModelConfig
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.step_sums import RankNews, StepReport, empty_sums
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL


def report_of_rank(tensor: int) -> tuple[StepReport, dict[int, list[int]]]:
    """Each rank adds sums of its own; with tensor ranks both have seen the same tokens."""
    parallel = initialize_parallel(ParallelConfig(tensor=tensor), timeout_seconds=60, num_threads=1)
    sums = empty_sums(ModelConfig.model_validate(MODEL), parallel.device)
    part = 1 if tensor == 2 else 1 + parallel.rank
    sums.nll += 0.1 * part
    sums.z_loss += 2.0 * part
    for name in sums.auxiliary:
        sums.auxiliary[name] += part
    for counts_E in sums.expert_counts.values():
        counts_E += torch.tensor([1, 2, 3, 2**40]) * part
    news = [RankNews(signal.SIGUSR1, False, 2), RankNews(signal.SIGTERM, True, 5)][parallel.rank]
    report = sums.reduce(parallel, torch.tensor([10, 0]), news)
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
    assert report.news.signal == max(signal.SIGUSR1, signal.SIGTERM) and report.news.is_saving
    # Tensor ranks read the same samples.
    assert report.news.damaged_samples == (7 if tensor == 1 else 2)
