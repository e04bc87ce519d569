"""Loss on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.run import Run
from pretrain.step import count_valid_tokens, empty_sums, pass_forward


@dataclass(frozen=True)
class Validation:
    """Mean negative log-likelihood a token in nats, and how many tokens it was measured on."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def validate(run: Run) -> Validation:
    """Measure the loss on the same first `train.validation_batches` global batches of the validation split each time.

    Leaves weights, gradients, random state and the training data's cursor alone. Every rank must call this.
    """
    assert run.validation is not None, "data.validation_fraction is 0, so there is nothing to validate on"
    run.validation.seek(0)
    sums = empty_sums(run.config.model, run.parallel.device)
    tokens = 0
    run.engine.module.eval()
    for _ in range(run.config.train.validation_batches):
        batches = run.validation.take(run.stage.global_batch_size, run.stage.micro_batch_size)
        tokens += count_valid_tokens(batches, run.parallel)
        for output in pass_forward(run, batches):
            sums.add(output)
    run.engine.module.train()
    sums.reduce(run.parallel, signal=0)
    return Validation(float(sums.nll) / max(1, tokens), tokens)
