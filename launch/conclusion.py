"""The last lines of `amfm train`: what the run came to, whether it is well, and what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path

from amfm.data_pipeline.terminal import printable
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name, newest_saved_step
from amfm.pretrain.launcher_protocol import NEXT_LAYOUT
from amfm.pretrain.monitor.follow import FollowedRun
from amfm.pretrain.report.data import RunRecord, read_run
from amfm.pretrain.report.goodput import measure_goodput
from amfm.pretrain.report.numbers import count, duration
from amfm.pretrain.report.verdict import judge_run


def conclude(run_dir: Path, code: int) -> list[str]:
    """Lines that end a training; none where it continues with other ranks, or before the first step."""
    followed = FollowedRun(run_dir)
    seen = followed.poll()
    if code == NEXT_LAYOUT or not followed.has_steps:
        return []
    record = read_run(run_dir)
    lines = [sum_up(record), judge_run(followed, seen, record).words()]
    saved = newest_saved_step(run_dir)
    place = shlex.quote(str(run_dir))
    if saved >= 0:
        lines.append(f"checkpoint: {run_dir / 'checkpoints' / checkpoint_name(saved)}")
        lines += [f"next: amfm report {place}", f"next: amfm export {place} {shlex.quote(f'{run_dir}-export')}"]
    return [printable(line) for line in lines]


def sum_up(record: RunRecord) -> str:
    """Steps, tokens, time, and the lowest validation loss."""
    use, tokens = measure_goodput(record), record.last("tokens")
    parts = [f"{record.last_step():,} of {record.num_steps:,} steps"]
    if tokens is not None:
        parts.append(f"{count(tokens)} tokens")
    text = ", ".join(parts)
    if use is not None:
        text += f" in {duration(use.held())} ({use.share():.0%} in steps)"
    steps, losses = record.series("validation_loss")
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        text += f"; validation {losses[-1]:.4f}"
        text += ", its best" if losses[best] == losses[-1] else f", best {losses[best]:.4f} at step {steps[best]:,}"
    return text
