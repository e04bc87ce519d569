"""How long a step takes on this machine's CPU: passes of the model itself are timed, in seconds of the processor.

Seconds of the processor and not of the clock: what else runs on the machine takes its cores, not the run's later ones. A
product of matrices would take a tenth of the time and say less: small blocks reach an eighth to a half of its rate.
"""

from __future__ import annotations

import time
from typing import Any

from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters, flops_per_token

TIMED_PARAMETERS = 50e6  # a larger model would take a minute, and a machine's memory
TIMED_TOKENS = 1_024  # of a pass: more rows than that cost more and say the same
PASSES = 3  # after one that is not counted, which starts threads and fills caches


def cpu_seconds_per_token(model: ModelConfig, tokens: int, smaller: ModelConfig) -> float:
    """Seconds of one core for a forward and a backward pass of one token, in rows of `tokens`.

    A model above TIMED_PARAMETERS is judged by a `smaller` one of its kind, at the same rate of operations.
    """
    timed = model if count_parameters(model).total <= TIMED_PARAMETERS else smaller
    of_all, of_timed = (sum(flops_per_token(config, tokens).values()) for config in (model, timed))
    return time_passes(timed, tokens) * of_all / of_timed


def time_passes(config: ModelConfig, tokens: int) -> float:
    """The fastest of some passes, on one thread, in seconds of the processor per token."""
    import torch

    from amfm.model.hybrid import HybridModel
    from amfm.model.packing import PackMeta
    from amfm.model.parallel.groups import single_rank_groups

    rows, threads = max(1, TIMED_TOKENS // tokens), torch.get_num_threads()
    model = HybridModel(config, single_rank_groups(), seed=0)
    tokens_BT = torch.arange(rows * tokens).remainder(config.vocab_size).view(rows, tokens)
    meta = PackMeta.one_document_a_row(rows, tokens)

    def run() -> float:
        began = time.process_time()
        loss: Any = model(tokens_BT, meta, labels=tokens_BT).loss
        loss.total.backward()
        return time.process_time() - began

    torch.set_num_threads(1)
    try:
        return min(run() for _ in range(1 + PASSES)) / tokens_BT.numel()
    finally:
        torch.set_num_threads(threads)
