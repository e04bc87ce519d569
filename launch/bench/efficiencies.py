"""Fit a machine's efficiencies, so that planned seconds come nearest to measured ones.

One efficiency after the other by golden sections of its logarithm (Kiefer 1953), several times over: planned seconds only
fall with each, so that every one has a single valley.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from amfm.launch.plan.hardware import Hardware

LEAST = 1e-3  # of an efficiency
SWEEPS, HALVINGS = 12, 24  # over all efficiencies, and of the range of one


def fit_efficiencies(hardware: Hardware, fields: Sequence[str], loss: Callable[[Hardware], float]) -> Hardware:
    """The hardware with `fields` (each in (0, 1]) set so that `loss` is least along each of them."""
    ratio = (5**0.5 - 1) / 2
    for _ in range(SWEEPS):
        for field in fields:

            def at(power: float, hardware: Hardware = hardware, field: str = field) -> Hardware:
                return hardware.model_copy(update={field: LEAST**power})

            low, high = 0.0, 1.0
            for _ in range(HALVINGS):
                left, right = high - ratio * (high - low), low + ratio * (high - low)
                low, high = (low, right) if loss(at(left)) < loss(at(right)) else (left, high)
            hardware = at(low if low < 1e-3 else (low + high) / 2)
    return hardware
