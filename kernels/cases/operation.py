"""An operation's case: `case.py` in its folder has one as `CASE`, and commands that speak of every kernel find it there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from amfm.kernels.cases.problem import CardSizes, CountedProblem, HostSizes, Inputs, Problem
from amfm.kernels.cases.trial import Kind, Sized


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel as production launches it: arguments of `amfm.kernels.proof.ahead_of_time.compile_ahead`, and a name.

    `first_architecture`: the oldest that has what it needs, 90 for products of 8-bit numbers.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    multiplies: bool = False
    first_architecture: int = 80


@dataclass(frozen=True)
class OperationCase:
    """An operation of `kernels/`: every way in which it is compiled, counted, checked and timed.

    `launches`: its kernels in bfloat16 with documents and the tiles of a GPU. `counted`: problems of the audit.
    `trials`: what its kernels are compared with float64 at. `on_card`, `on_host`: builders of the problems that are
    timed, by the name that the benchmarks give them.
    """

    name: str
    launches: Callable[[], Iterator[KernelLaunch]]
    counted: Callable[[], Iterator[CountedProblem]]
    trials: Callable[[], Iterator[Sized]]
    on_card: Mapping[str, Callable[[Inputs, CardSizes], Problem]] = field(default_factory=dict)
    on_host: Mapping[str, Callable[[Inputs, HostSizes], Problem]] = field(default_factory=dict)

    def first_architecture(self) -> int:
        """The oldest architecture on which all of it runs; 0 without kernels."""
        return max((launch.first_architecture for launch in self.launches()), default=0)

    def trials_of(self, kinds: Collection[Kind] = ()) -> list[Sized]:
        """The trials of these kinds, all where none is named."""
        return [each for each in self.trials() if not kinds or each.kind in kinds]


def kernel_launch(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    config: Mapping[str, int] | None = None,
) -> KernelLaunch:
    """A launch with the types of those arguments that are not constants.

    `config`: one of the kernel's configurations; its warps and stages become options, the rest constants.
    """
    given = dict(config or {})
    options: dict[str, int] = {option: given.pop(option) for option in ("num_warps", "num_stages") if option in given}
    constants = {**constants, **given}
    signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
    return KernelLaunch(name, kernel, signature, constants, options, multiplies="DOT" in constants)
