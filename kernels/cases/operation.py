"""An operation's case: `case.py` in its folder has one as `CASE`, and commands that speak of every kernel find it there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from amfm.kernels.cases.problem import CountedProblem, GpuSizes, HostSizes, Inputs, Problem
from amfm.kernels.cases.trial import Kind, Sized


@dataclass(frozen=True)
class OperationCase:
    """An operation of `kernels/`: every way in which it is compiled, counted, checked and timed.

    `counted`: problems of the audit. `trials`: what its kernels are compared with float64 at. `on_gpu`, `on_host`:
    builders of the problems that are timed, by the name that the benchmarks give them. `also`: calls on the meta device of
    kernels that no trial reaches there, such as those that only tuning chooses; with the trials they are what is compiled
    ahead of time (`amfm.kernels.proof.recorded`). `first_architecture`: the oldest that has what all of it needs.
    """

    name: str
    counted: Callable[[], Iterator[CountedProblem]]
    trials: Callable[[], Iterator[Sized]]
    on_gpu: Mapping[str, Callable[[Inputs, GpuSizes], Problem]] = field(default_factory=dict)
    on_host: Mapping[str, Callable[[Inputs, HostSizes], Problem]] = field(default_factory=dict)
    also: Callable[[], None] = lambda: None
    first_architecture: int = 80

    def trials_of(self, kinds: Collection[Kind] = ()) -> list[Sized]:
        """The trials of these kinds, all if none is named."""
        return [each for each in self.trials() if not kinds or each.kind in kinds]
