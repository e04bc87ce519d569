"""A small model with every core kind of block that takes real steps in any layout, without a run around it.

Byte counts and memory depend only on sizes, so a laptop with gloo verifies the formulas that are used for a cluster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from amfm.data_pipeline.batch import Batch
from amfm.model.hybrid import ModelOutput
from amfm.model.parallel.groups import opened
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.engine import ZeroEngine, build_engine
from amfm.pretrain.micro_batch import LossShare, MicroBatches
from amfm.pretrain.parallel import Parallel, initialize_parallel, set_determinism
from amfm.pretrain.pipeline import Pipeline
from amfm.pretrain.startup.model import build_model, build_pipeline
from amfm.pretrain.step import count_valid_tokens
from amfm.pretrain.step_sums import StepSums, empty_sums

# Every core kind of block, small enough for a moment on a laptop, and with sizes that up to eight ranks divide.
DEFAULTS: dict[str, Any] = {
    "run": {"dir": "unused", "tensorboard": False},
    "model": {
        "pattern": "ME*-ME",
        "vocab_size": 512,
        "hidden_size": 64,
        "mamba": {"num_heads": 8, "head_dim": 16, "state_size": 16, "num_groups": 8, "chunk_size": 16},
        "attention": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 8},
        "feed_forward": {"hidden_size": 128, "activation": "swiglu"},
        "moe": {
            "num_experts": 8,
            "top_k": 2,
            "expert_hidden_size": 32,
            "shared_expert_hidden_size": 64,
            "activation": "swiglu",
        },
    },
    "data": {"store": "none", "tokenizer": {"vocab_size": 512}, "sources": [{"name": "none", "paths": ["none.txt"]}]},
    "train": {
        "steps": 10,
        "sequence_length": 128,
        "micro_batch_size": 2,
        "global_batch_size": 16,
        "precision": "float32",
        "num_threads": 1,
        "timeout_seconds": 120,
    },
    "optimizer": {"learning_rate": 1e-4},
    "kernels": {"backend": "torch"},
}


def random_batches(config: RunConfig, parallel: Parallel) -> list[Batch]:
    """Micro-batches of this data rank for one step: random tokens in documents of a quarter of a row."""
    train = config.train
    number = train.global_batch_size // train.micro_batch_size // parallel.data_world_size
    generator = torch.Generator().manual_seed(parallel.data_rank)
    rows, tokens, length = train.micro_batch_size, train.sequence_length, train.sequence_length // 4
    place_T = torch.arange(tokens)
    batches = []
    for _ in range(number):
        tokens_BT = torch.randint(config.model.vocab_size, (rows, tokens), generator=generator)
        batches.append(
            Batch(
                tokens_BT=tokens_BT,
                labels_BT=tokens_BT.roll(-1, dims=1),
                loss_mask_BT=torch.ones_like(tokens_BT, dtype=torch.bool),
                positions_BT=(place_T % length).int().repeat(rows, 1),
                document_ids_BT=(place_T // length).int().repeat(rows, 1),
                cu_seqlens=torch.arange(0, rows * tokens + 1, length, dtype=torch.int32),
                sample_ids=tuple(range(rows)),
                source_ids=(0,) * rows,
            )
        )
    return batches


def load_small(overrides: Sequence[str], world_size: int) -> RunConfig:
    """Load the configuration of a small model with overrides. Raises ConfigError with every problem."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.yaml")
        path.write_text(yaml.safe_dump(DEFAULTS), encoding="utf-8")
        return load_checked(path, overrides, world_size=world_size)


def begin_ranks(config: RunConfig) -> Parallel:
    """Let the ranks of a configuration meet, as a run does. Every rank must call this."""
    train = config.train
    parallel = initialize_parallel(
        config.parallel, timeout_seconds=train.timeout_seconds, num_threads=train.num_threads
    )
    set_determinism(train.seed, train.deterministic)
    return parallel


def build_for_steps(config: RunConfig, parallel: Parallel) -> tuple[ZeroEngine, Pipeline | None]:
    """Engine of a configuration without a run around it, and its pipeline where it has stages. Every rank must call this."""
    engine = build_engine(
        build_model(config, parallel),
        optimizer=config.optimizer,
        precision=config.train.precision,
        zero_stage=config.parallel.zero_stage,
        parallel=parallel,
        sums_in_products=config.train.sums_in_products(),
    )
    return engine, build_pipeline(config, parallel, engine)


def take_step(config: RunConfig, parallel: Parallel, engine: ZeroEngine, pipeline: Pipeline | None) -> None:
    """Take one training step without a run around it, sending what `amfm.pretrain.step.train_step` sends.

    Every rank must call this.
    """
    sums = accumulate_gradients(config, parallel, engine, pipeline)
    engine.step(config.optimizer.learning_rate)
    engine.module.update_expert_bias(sums.expert_counts)


def accumulate_gradients(
    config: RunConfig,
    parallel: Parallel,
    engine: ZeroEngine,
    pipeline: Pipeline | None,
    batches: Sequence[Batch] | None = None,
) -> StepSums:
    """Run the passes of one step over these micro-batches, else random ones, and reduce gradients. Every rank must call this."""
    batches = batches or random_batches(config, parallel)
    counts = count_valid_tokens(batches, parallel, config.model)
    share = LossShare.of_counts(counts, len(batches) * parallel.data_world_size, config.model)
    sums = empty_sums(config.model, parallel.device)
    inputs = MicroBatches(batches, parallel, config.model)[:]
    engine.module.train()
    with engine.accumulate(len(inputs)), opened(parallel.groups.row_capacity):
        if pipeline is not None:
            for output in pipeline.train(inputs, lambda output: scaled_share(share, engine, output)):
                sums.add(output)
        else:
            for given in inputs:
                output = engine.forward(given.tokens_BT, given.meta, given.labels_BT, ahead=given.ahead)
                loss = share.apply(output)
                assert loss is not None, "a batch has labels"
                engine.backward(loss)
                sums.add(output)
    sums.reduce(parallel, counts)
    return sums


def scaled_share(share: LossShare, engine: ZeroEngine, output: ModelOutput) -> torch.Tensor | None:
    """This output's share of the step's loss, scaled for backward; None on a stage without a loss."""
    part = share.apply(output)
    return None if part is None else engine.scale(part)
