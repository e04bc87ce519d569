"""What a step's loss is divided by: tokens of the whole global batch, of each depth its own, and all micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import ModelOutput
from amfm.model.loss import CrossEntropy
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.micro_batch import LossShare
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.step import count_valid_tokens
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.test_micro_batch import make_batch
from tests.pretrain.tiny_run import MODEL

CONFIG = ModelConfig.model_validate(MODEL | {"pattern": "M*/*E/*E", "mtp": {"loss_weight": 0.3}})


def output_of(nll: Tensor, depths: list[Tensor], auxiliary: Tensor) -> ModelOutput:
    """An output whose losses are sums over these tokens."""
    losses = [CrossEntropy(each.sum(), each.sum().detach(), each.detach()) for each in (nll, *depths)]
    return ModelOutput(None, losses[0], {"balance": auxiliary}, {}, mtp=tuple(losses[1:]))


def test_each_token_and_each_micro_batch_has_its_share_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    # Two micro-batches with unlike numbers of labels; a depth further ahead has fewer.
    tokens = [
        [torch.rand(count, generator=generator, dtype=torch.float64) for count in row] for row in ((7, 5, 2), (3, 2, 1))
    ]
    auxiliary = [torch.tensor(value, dtype=torch.float64) for value in (1.5, 0.5)]
    leaves = [leaf.requires_grad_() for leaf in (*tokens[0], *tokens[1], *auxiliary)]
    counts = torch.tensor([10, 7, 3])
    share = LossShare.of_counts(counts, 2, CONFIG)
    parts = [share.apply(output_of(row[0], row[1:], loss)) for row, loss in zip(tokens, auxiliary)]
    assert parts[0] is not None and parts[1] is not None
    total = parts[0] + parts[1]
    # By definition: means over all tokens of the step, and the mean of the auxiliary losses.
    means = [torch.cat([row[place] for row in tokens]).mean() for place in range(3)]
    expected = means[0] + 0.3 * (means[1] + means[2]) / 2 + sum(auxiliary) / 2
    # Factors of depths are float32.
    torch.testing.assert_close(total, expected, rtol=1e-7, atol=0)
    for found, wanted in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)


# Rows of two ranks by the starts of documents: whole ones, and documents of two tokens and of one.
ROWS = ([[0], [0]], [[*range(0, 24, 2)], [*range(24)]])


def count_on_rank() -> list[int]:
    parallel = initialize_parallel(ParallelConfig(), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    return count_valid_tokens([make_batch(ROWS[parallel.rank])], parallel, CONFIG).tolist()


def test_tokens_of_each_depth_are_counted_over_all_data_ranks() -> None:
    assert run_ranks(count_on_rank, num_ranks=2) == [[48 + 14, 46 + 1, 44]] * 2
