"""Which faults strike when: an endless list for each round, drawn only from the seed and the number of the round.

A seed puts the kinds in an order, and rounds go around it, each some places further than the one before: a soak of a few
rounds strikes every kind, where as many draws at random would leave some out.

A fault waits until its start of the run has made some new steps, then some part of a second more, so that it falls into
any phase of a step or of a save. The machine's speed moves the moment inside the step, nothing else: the same seed
strikes the same ranks in the same way at the same steps.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

KILLED = -9
MAX_NEW_STEPS = 12
MAX_DELAY_SECONDS = 0.6
FAULTS_A_ROUND = 5  # about as many as a round of 60 steps meets


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `codes`: exit codes of which the start must end with one; none: it must continue.

    `new_start`: ranks are started again by the launcher itself, which continues.
    """

    name: str
    codes: tuple[int, ...] = ()
    new_start: bool = False


FAILED = (3,)
# Ray ends a driver whose raylet is gone, in its own ways.
ANY_FAILURE = (*range(1, 256), *range(-64, 0))
LOCAL_KINDS = (
    Kind("kill a rank", FAILED),
    Kind("kill the launcher", (KILLED,)),
    Kind("kill all at once", (KILLED,)),
    Kind("stop signal", (0,)),
    Kind("pause a rank"),
    Kind("hang a rank", FAILED),
    Kind("slow disk"),
    Kind("full disk", FAILED),
    Kind("damage the newest checkpoint", (KILLED,)),
    Kind("NaN on a rank", FAILED),
    Kind("flip a bit in memory", FAILED),
)
RAY_KINDS = (
    Kind("kill a rank", new_start=True),
    Kind("kill the launcher", (KILLED,)),
    Kind("kill the raylet", ANY_FAILURE),
    Kind("stop signal", (0,)),
)


@dataclass(frozen=True)
class Fault:
    """One strike: after `new_steps` of the start and a delay. `draw`: in [0, 1), for what else must be chosen."""

    kind: Kind
    new_steps: int
    delay_seconds: float
    rank: int
    draw: float


def draw_faults(seed: int, round_number: int, kinds: tuple[Kind, ...], num_ranks: int) -> Iterator[Fault]:
    """Draw the faults of a round, without end."""
    order = random.Random(f"soak {seed}").sample(kinds, len(kinds))
    source = random.Random(f"soak {seed} {round_number}")
    for place in itertools.count(FAULTS_A_ROUND * round_number):
        yield Fault(
            kind=order[place % len(order)],
            new_steps=source.randint(1, MAX_NEW_STEPS),
            delay_seconds=source.random() * MAX_DELAY_SECONDS,
            rank=source.randrange(num_ranks),
            draw=source.random(),
        )
