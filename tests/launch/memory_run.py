"""A rank that trains a small model for three steps and prints how far its memory rose: the other side of the plan.

Started by tests as `python -m tests.launch.memory_run FILE`; the file is a configuration, the tokens are random. The
loader, the log and the checkpoints of a run are left out: the plan counts none of them.
"""

from __future__ import annotations

import json
import resource
import sys

import torch

from launch.plan_layout import Layout
from launch.plan_memory import estimate_memory, storage_of
from model.groups import ProcessGroupCollection
from model.hybrid import HybridModel
from model.packing import PackMeta
from pretrain.checks import load_checked
from pretrain.config import RunConfig
from pretrain.engine import build_engine
from pretrain.parallel import initialize_parallel, shutdown


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(config: RunConfig) -> tuple[int, int, int]:
    """(ranks, peak before the model is built, peak after three steps), bytes. Every rank must call this."""
    parallel = initialize_parallel(timeout_seconds=300, num_threads=1)
    train = config.train
    warm_up(config, parallel.groups)
    before = peak_bytes()
    engine = build_engine(
        HybridModel(config.model, parallel.groups, seed=0),
        optimizer=config.optimizer,
        precision=train.precision,
        zero_stage=config.parallel.zero_stage,
        parallel=parallel,
    )
    shape = (train.micro_batch_size, train.sequence_length)
    num_passes = train.global_batch_size // (train.micro_batch_size * parallel.data_world_size)
    meta = PackMeta.one_document_a_row(*shape)
    for _ in range(3):
        with engine.accumulate(num_passes):
            for _ in range(num_passes):
                tokens_BT = torch.randint(config.model.vocab_size, shape)
                output = engine.forward(tokens_BT, meta, tokens_BT)
                engine.backward(output.loss.total / tokens_BT.numel())
                del output
        engine.step(1e-4)
    ranks = parallel.data_world_size
    peak = int(parallel.max_over_all(peak_bytes()))
    shutdown(parallel)
    return ranks, before, peak


def warm_up(config: RunConfig, groups: ProcessGroupCollection) -> None:
    """A pass of one short row, forward and backward, through a narrow model: loads what libraries load late."""
    narrow = config.model.model_copy(update={"hidden_size": 64, "vocab_size": 64})
    tokens_BT = torch.randint(64, (1, 64))
    output = HybridModel(narrow, groups, seed=0)(tokens_BT, PackMeta.one_document_a_row(1, 64), tokens_BT)
    output.loss.total.backward()


def main() -> None:
    """Print one JSON object on the main rank: layout, predicted and measured bytes."""
    config = load_checked(sys.argv[1], sys.argv[2:])
    ranks, before, peak = measure(config)
    layout = Layout.of(config, ranks)
    memory = estimate_memory(config, layout, storage_of(config, on_gpu=False), margin=0.0)
    print(
        json.dumps(
            {
                "ranks": ranks,
                "zero_stage": layout.zero_stage,
                "precision": config.train.precision,
                "predicted": memory.total(),
                "measured": peak - before,
                "phase": memory.phase,
                "parts": {name: round(size / 1e6) for name, size in memory.parts.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
