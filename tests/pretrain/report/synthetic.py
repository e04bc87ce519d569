"""Run directories as runs of several kinds leave them: sick, long, staged, of one step, and one that trains well.

Only their logs are made, by seeded numbers, with times as a clock would give them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.pretrain.report.test_report import line, make_run

ORIGIN = 1_796_000_000.0
MOE = ("model.moe={num_experts: 8, top_k: 2, expert_hidden_size: 8}", "model.pattern=MEME")
Event = dict[str, Any]


def at(seconds: float) -> str:
    return datetime.fromtimestamp(ORIGIN + seconds, UTC).isoformat(timespec="milliseconds")


def write_events(run: Path, events: Iterable[Event]) -> Path:
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def one_step(folder: Path) -> Path:
    """A run whose first step was just written."""
    first = line(1, time=ORIGIN + 9, seconds=2.0, expert_load={"1": 1.25}, skipped=False)
    run = make_run(folder, [first], "run.name=first_step", *MOE)
    return write_events(run, [{"time": at(5), "began_at": at(0), "event": "start", "step": 0, "world_size": 1}])


def long(folder: Path, num_steps: int, num_blocks: int) -> Path:
    """A run with noise in all curves and 149 skipped steps, whose events have no time."""
    draw = random.Random(0)
    lines = [
        line(
            step,
            loss=2.45 + 8 * step**-0.35 + draw.gauss(0, 0.04),
            grad_norm=0.3 * math.exp(draw.gauss(0, 0.4)),
            expert_load={str(block): 1.3 + draw.random() / 5 for block in range(num_blocks)},
            auxiliary={"balance": draw.random()},
            memory_bytes=7e10,
        )
        for step in range(1, num_steps + 1)
    ]
    run = make_run(folder, lines, f"train.steps={num_steps}")
    return write_events(run, [{"event": "skipped_step", "step": draw.randrange(1, num_steps)} for _ in range(149)])


def sick(folder: Path) -> Path:
    """A run of 240 steps that does all that runs do wrong, and was ended by SIGTERM after 185.

    Steps of two seconds; a rank at half speed from 100 to 120, a failure after 145 whose steps from 121 on were done again
    40 seconds later, a rollback from 165 to 160, block 9 collapsing, and a loss that rises from 170.
    """
    draw = random.Random(1)
    lines, clock = [], 14.0
    events: list[Event] = [{"time": at(12), "began_at": at(0), "event": "start", "step": 0, "world_size": 4}]

    def happen(event: str, step: int, /, **more: Any) -> None:
        events.append({"time": at(clock), "event": event, "step": step, **more})

    def do(steps: range) -> None:
        nonlocal clock
        for step in steps:
            seconds = 4.0 if 100 <= step < 120 else 2.0
            clock += seconds
            found = dict[str, Any]()
            if step % 40 == 0:
                clock += 3.0
                words = " and the".join([" lord of"] * (step // 40))
                found = {"validation_loss": 3.3 + 8 / step, "validation_seconds": 3.0, "samples": {"The king": words}}
            if step in (61, 62, 130):
                found |= {"spike": {"loss": 9.5}}
                happen("spike", step)
            if step in (61, 130):
                happen("skipped_step", step, cause="gradients are not finite")
            if step == 110:
                happen("stragglers", step)
            lines.append(
                line(
                    step,
                    time=ORIGIN + clock,
                    seconds=seconds,
                    loss=3.2 + 8 / step + draw.gauss(0, 0.03) + 4 * (step in (61, 62, 130)) + max(0, step - 170) / 20,
                    grad_norm=0.4 * math.exp(draw.gauss(0, 0.3)),
                    tokens_per_second=2000 / seconds,
                    skipped=step in (61, 130),
                    expert_load={
                        str(block): 4.0 if block == 9 and step > 140 else 1.2 + draw.random() / 5 for block in (1, 3, 9)
                    },
                    auxiliary={"balance": 0.01 + 0.01 * draw.random()},
                    **found,
                )
            )
            if step % 20 == 0:
                clock += 1.5
                happen("checkpoint", step)

    do(range(1, 121))
    clock += 25 * 2.0
    happen("failed", 145, error="NCCL timeout on rank 3")
    clock += 40
    lost = {"discarded_steps": 25, "discarded_seconds": 50.0, "last_line_at": ORIGIN + clock - 41}
    happen("start", 120, began_at=at(clock - 8), world_size=4, **lost)
    happen("restarted", 120, cause="NCCL timeout on rank 3")
    do(range(121, 161))
    happen("experts_collapsed", 150, token_share={"9": 1.0})
    clock += 10
    happen("rolled_back", 165, cause="loss is not finite", discarded_steps=5, discarded_seconds=10.0)
    do(range(161, 186))
    clock += 1.5
    happen("checkpoint", 185)
    happen("signal", 185, name="SIGTERM")
    return write_events(make_run(folder, lines, "run.name=spiky", "train.steps=240", *MOE), events)


def staged(folder: Path, num_steps: int = 6000) -> Path:
    """A run in three stages that trains well for the most part: skips, a failure and a restart, one block drifting."""
    draw = random.Random(0)
    stages = ", ".join(f'{{"name": "{name}", "tokens": {512 * num_steps // 3}}}' for name in ("warm", "main", "anneal"))
    clock, last, lines = 60.0, num_steps, []
    events: list[Event] = [{"time": at(50), "began_at": at(0), "event": "start", "step": 0, "world_size": 8}]
    failed, resumed = round(0.6917 * last), round(0.6833 * last)

    for step in range(1, last + 1):
        pace = 2.0 if last / 3 < step < 0.3667 * last else 1.0
        if step == resumed + 1:
            clock += (failed - resumed) * 0.5
            events.append({"time": at(clock), "event": "failed", "step": failed, "error": "NCCL timeout on rank 3"})
            clock += 240
            lost = {"discarded_seconds": (failed - resumed) * 0.5, "last_line_at": ORIGIN + clock - 241}
            events.append({"time": at(clock), "began_at": at(clock - 45), "event": "start", "step": resumed, **lost})
            events.append({"time": at(clock), "event": "restarted", "step": resumed, "cause": "NCCL timeout on rank 3"})
            clock += 12
        clock += 0.5 * pace
        found = dict[str, Any]()
        if step % (last // 24) == 0:
            clock += 8
            loss = 2.46 + 8 * step**-0.35
            texts = {
                "The king": " of the" + " old" * (step * 6 // last),
                "To be,": " or not to be" * (step * 4 // last),
            }
            by_source = {"web": {"loss": loss + 0.1}, "code": {"loss": loss - 0.4}, "books": {"loss": loss + 0.2}}
            found = {"validation_loss": loss, "validation_seconds": 8.0, "samples": texts}
            found["validation_by_source"] = {name: each["loss"] for name, each in by_source.items()}
        if step in (last // 4, last // 4 + 2, round(0.5555 * last), resumed):
            events.append({"time": at(clock), "event": "skipped_step", "step": step})
        lines.append(
            line(
                step,
                time=ORIGIN + clock,
                seconds=0.5 * pace,
                loss=2.45 + 8 * step**-0.35 + draw.gauss(0, 0.05) + (step in (last // 4, last // 4 + 2, resumed)),
                grad_norm=0.3 * 2 ** draw.gauss(0, 0.4),
                lr=1e-3 * min(1, 20 * step / last) * (1 - 0.9 * step / last),
                tokens_per_second=1e6 * (1 + draw.gauss(0, 0.03)) / pace,
                expert_load={
                    str(block): 1.2 + draw.random() / 5 + (block == 9) * step / last for block in range(1, 24, 2)
                },
                **found,
            )
        )
        if step % (last // 12) == 0:
            clock += 20
            events.append({"time": at(clock), "event": "checkpoint", "step": step})
        if step in (last // 3, 2 * last // 3):
            events.append({"time": at(clock), "event": "stage", "step": step})
    events.append({"time": at(clock + 2), "event": "end", "step": last, "reason": "finished"})
    run = make_run(folder, lines, "run.name=hybrid_8b", *MOE, "train.steps=null", f"stages=[{stages}]")
    return write_events(run, events)


KINDS: dict[str, Callable[[Path], Path]] = {
    "sick": sick,
    "long": lambda folder: long(folder, 3000, 4),
    "staged": lambda folder: staged(folder, 600),
    "one step": one_step,
}
