"""One run: `python -m benchmarks.speedrun.child TASK`, TASK being JSON. Answers a point of the curve after another.

Seconds are those of this process on its processors, all threads together, in steps: reading text and measuring held-out loss
do not count, nor do imports. A schedule follows the share of the seconds that are spent, so that every way comes to the end of
its decay.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.memory import keep_freed_memory
from amfm.data_pipeline.store.store import TokenStore
from amfm.launch.cluster.child import open_answers
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.scores import bits_per_byte
from amfm.pretrain.startup.arithmetic import resolve_precision
from benchmarks.small_steps import begin_ranks
from benchmarks.speedrun.learners import Learner, build_learner, may_multiply_bf16
from benchmarks.speedrun.ways import WAYS

HELD_ROWS = 64
POINTS = 8


def learn(task: dict[str, Any], answer: Callable[[object], None]) -> None:
    """Spend the seconds and answer `{"point": [seconds, bits per byte]}` after each part of them, then what was run."""
    way = WAYS[task["way"]]
    overrides = [*task["overrides"], *way.overrides, f"train.seed={task['seed']}", "train.precision=auto"]
    config, _ = resolve_precision(load_checked(Path(task["config"]), overrides, world_size=1))
    parallel = begin_ranks(config)
    keep_freed_memory()  # as a run does
    train, held = (open_split(config, split) for split in ("train", "validation"))
    rows, budget = task["rows"], task["seconds"]
    build = build_learner(way, config, parallel, task["rate"])
    learner = build(may_multiply_bf16(way) and is_faster_in_bf16(build, train, rows))
    train.seek(0)

    def measure() -> float:
        held.seek(0)
        nats, tokens = learner.evaluate(held.take(HELD_ROWS))
        assert isinstance(held.store, TokenStore), "the text was prepared"
        found = bits_per_byte({held.source_names[0]: (nats, tokens)}, held.store, "validation")
        assert found is not None, "the store counted bytes"
        return found

    answer({"point": [0.0, measure()]})
    spent, steps, points = 0.0, 0, 0
    while spent < budget:
        spent += step_seconds(learner, train, rows, spent / budget)
        steps += 1
        if int(spent / budget * POINTS) > points:
            points = int(spent / budget * POINTS)
            answer({"point": [spent, measure()]})
    tokens = steps * rows * config.train.sequence_length
    answer({"steps": steps, "tokens": tokens, "active": learner.active, "precision": learner.precision})


def open_split(config: RunConfig, split: Any) -> PretrainLoader:
    """Rows of a split, in this process."""
    return PretrainLoader(
        config.data.model_copy(update={"num_workers": 0}),
        split=split,
        sequence_length=config.train.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.train.seed if split == "train" else 0,
    )


def step_seconds(learner: Learner, loader: PretrainLoader, rows: int, share: float) -> float:
    """Processor seconds of one step on the next rows."""
    batches = loader.take(rows)
    began = time.process_time()
    learner.step(batches, share)
    return time.process_time() - began


def is_faster_in_bf16(build: Callable[[bool], Learner], loader: PretrainLoader, rows: int) -> bool:
    """Whether a peer's second step is faster with products in bf16; on learners that are then thrown away."""
    seconds = []
    for autocast in (False, True):
        learner = build(autocast)
        seconds.append([step_seconds(learner, loader, rows, 0.0) for _ in range(3)][1:])
    return min(seconds[1]) < min(seconds[0])


if __name__ == "__main__":
    learn(json.loads(sys.argv[1]), open_answers())
