"""What a difference between two settings is worth: by seed, with a t interval, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev

# Student's t at 97.5%, by degrees of freedom from 1; beyond these the normal distribution's.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
T_NORMAL = 1.960


@dataclass(frozen=True)
class Difference:
    """A setting against the first one, over the seeds that both have: differences by seed, mean and a 95% interval.

    The interval is None for fewer than two seeds.
    """

    label: str
    against: str
    by_seed: dict[int, float]
    mean: float
    interval: tuple[float, float] | None
    verdict: str


def compare(
    label: str, against: str, values: Mapping[int, float], others: Mapping[int, float], *, lower_is_better: bool
) -> Difference | None:
    """Compare what two settings measured, by seed; None without a common seed."""
    by_seed = {seed: values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())}
    if not by_seed:
        return None
    found, middle, interval = list(by_seed.values()), mean(by_seed.values()), None
    if len(found) > 1:
        t = T[len(found) - 2] if len(found) - 2 < len(T) else T_NORMAL
        half = t * stdev(found) / math.sqrt(len(found))
        interval = middle - half, middle + half
    return Difference(
        label, against, by_seed, middle, interval, judge(found, interval, lower_is_better=lower_is_better)
    )


def judge(found: list[float], interval: tuple[float, float] | None, *, lower_is_better: bool) -> str:
    """The difference in words; it is shown only where the interval leaves 0 out."""
    if interval is None:
        return "one seed: no verdict"
    word = "better" if (mean(found) < 0) == lower_is_better else "worse"
    if interval[0] > 0 or interval[1] < 0:
        return word
    if all(each < 0 for each in found) or all(each > 0 for each in found):
        return f"{word} with each of {len(found)} seeds, but the interval has 0: not shown"
    return "no difference shown"
