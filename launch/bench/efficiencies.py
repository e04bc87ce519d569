"""Fit a machine's efficiencies, so that planned seconds come nearest to measured ones.

One efficiency after the other by golden sections of its logarithm (Kiefer 1953), several times over: planned seconds only
fall with each, so that every one has a single valley.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from amfm.launch.plan.hardware import Hardware

LEAST = 1e-3  # of an efficiency
SWEEPS, SECTIONS = 12, 24  # at most, over all efficiencies, and of the range of one
SETTLED = 1e-3  # change of each efficiency in a sweep, as a part of it, after which another one is not worth it


def fit_efficiencies(hardware: Hardware, fields: Sequence[str], loss: Callable[[Hardware], float]) -> Hardware:
    """The hardware with `fields` (each in (0, 1]) set so that `loss` is least along each of them."""
    for _ in range(SWEEPS):
        before = [getattr(hardware, field) for field in fields]
        for field in fields:

            def loss_at(power: float, hardware: Hardware = hardware, field: str = field) -> float:
                return loss(hardware.model_copy(update={field: LEAST**power}))

            hardware = hardware.model_copy(update={field: LEAST ** find_valley(loss_at)})
        if all(abs(getattr(hardware, field) / old - 1) < SETTLED for field, old in zip(fields, before)):
            break
    return hardware


def find_valley(loss: Callable[[float], float]) -> float:
    """Where in [0, 1] a function with a single valley is least, by golden sections."""
    ratio = (5**0.5 - 1) / 2
    low, high, left, right = 0.0, 1.0, 1.0 - ratio, ratio
    at_left, at_right = loss(left), loss(right)
    for _ in range(SECTIONS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return low if low < 1e-3 else (low + high) / 2
