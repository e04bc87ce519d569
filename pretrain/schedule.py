"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from amfm.pretrain.config.schedules import schedule_specs
from amfm.pretrain.config.schema import ScheduleConfig


def learning_rate(step: int, config: ScheduleConfig, *, peak: float, total_steps: int) -> float:
    """Compute the learning rate of optimizer step number `step`, counted from 1 to `total_steps`.

    Warm-up rises linearly and reaches the peak at its last step; decays reach `min_ratio * peak` at the last step, or at
    `decay_end_step`.
    A schedule of a package gives the share of the peak after warm-up.
    `inverse_sqrt` (Vaswani et al. 2017, arXiv 1706.03762, section 5.3) falls no lower than `min_ratio * peak`.
    """
    assert 1 <= step <= total_steps, f"step {step} is outside 1..{total_steps}"
    warmup_steps = config.warmup_length(total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    spec = schedule_specs().get(config.kind)
    if spec is not None:
        options = getattr(config.options, config.kind) or spec.options()
        return peak * spec.load()(step, total_steps, config, options)
    if config.kind == "constant":
        return peak
    if config.kind == "inverse_sqrt":
        return peak * max(config.min_ratio, math.sqrt(warmup_steps / step))
    end = total_steps if config.decay_end_step is None else config.decay_end_step
    first_decay_step = warmup_steps if config.kind == "cosine" else end - decay_length(config, total_steps, end)
    if step <= first_decay_step:
        return peak
    progress = min(1.0, (step - first_decay_step) / (end - first_decay_step))
    shape = "cosine" if config.kind == "cosine" else config.decay_shape
    return peak * (config.min_ratio + (1 - config.min_ratio) * fall(shape, progress))


def decay_length(config: ScheduleConfig, total_steps: int, end: float) -> float:
    """Number of steps of the final decay of `wsd`, which ends at step `end`.

    As configured, else a fifth of the run, never reaching into warm-up.
    """
    asked = config.decay_steps if config.decay_steps is not None else max(1, total_steps // 5)
    return min(asked, end - config.warmup_length(total_steps))


def fall(shape: str, progress: float) -> float:
    """Decay factor between peak (1, at progress 0) and floor (0, at progress 1)."""
    if shape == "linear":
        return 1 - progress
    if shape == "sqrt":
        return 1 - math.sqrt(progress)
    if shape == "exponential":
        return float(2 * 0.5**progress - 1)
    assert shape == "cosine", f"unknown decay shape {shape}"
    return 0.5 * (1 + math.cos(math.pi * progress))
