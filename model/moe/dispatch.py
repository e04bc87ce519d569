"""Expert parallelism: sends tokens to the ranks that hold their experts and back, over `groups.ep` and `groups.expt_tp`.

Every rank comes with its own tokens and their choices. Rows travel to the ranks of `groups.ep` that hold the experts,
where each rank of `groups.expt_tp` with the same experts gets the rows of all, computes its part of the inner width,
and gives back sums; then home. Without a capacity a row goes to each rank that a token has chosen an expert of
(`by_rank.py`), and nothing is dropped or computed in vain; under a capacity factor rows lie in slots whose number is
known, and nothing waits (`by_slot.py`). An expert, or a rank, that gets nothing is not an exception. Results do not
depend on the order of arrival.

What runs meanwhile: the caller's work `while_out` is done while rows are on their way out, `while_home` while results
come home. With `groups.overlap_experts` tokens, or slots, are cut in two halves: experts compute the first while the
second travels out, and the second while the first comes home. And a caller may do other work wherever rows have set out
(`dispatch_steps`; model/turns.py lets the other half of a micro-batch's rows pass blocks there). Backward mirrors it,
because a transfer's gradient starts where the transfer ended.

The module is left out of compiled graphs: the number of rows differs at each call. Every rank of both groups must call, forward
and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NotRequired, TypedDict, Unpack

from torch import Tensor

from amfm.kernels.runtime.compiling import disable_compile
from amfm.model.moe.by_rank import RowsByRank
from amfm.model.moe.by_slot import RowsBySlot
from amfm.model.moe.transfer import HeldExperts


class Dispatched(TypedDict):
    """What travels and what is done meanwhile.

    x [R, D], of this rank alone; expert ids [R, K] in the numbering of all experts, where the number of experts itself marks a
    lost choice, which sends nothing; weights [R, K]. `while_home` gets what `while_out` gave. `slots`: of each rank for each
    expert, at least as many as it has choices of one; None: rows go by rank.
    """

    x_RD: Tensor
    expert_ids_RK: Tensor
    weights_RK: Tensor
    experts: HeldExperts
    while_out: Callable[[], Any]
    while_home: Callable[[Any], Any]
    slots: NotRequired[int | None]


@disable_compile
def dispatch_feed_forward(**way: Unpack[Dispatched]) -> tuple[Tensor, Any]:
    """Sum weight times expert over each token's choices, [R, D], and call the other work while rows travel; returns both.

    Sums are in float32 at least. Four all-to-alls of rows at most, each once more in backward: out over `ep`, over `expt_tp` and
    back, home over `ep`.
    """
    steps = dispatch_steps(**way)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            done: tuple[Tensor, Any] = end.value
            return done


def dispatch_steps(
    x_RD: Tensor,
    expert_ids_RK: Tensor,
    weights_RK: Tensor,
    experts: HeldExperts,
    while_out: Callable[[], Any],
    while_home: Callable[[Any], Any],
    slots: int | None = None,
) -> Generator[None, None, tuple[Tensor, Any]]:
    """The same, pausing when rows have set out, and when sums have set out home: whoever calls may do more there."""
    num_parts = 2 if experts.groups.overlap_experts else 1
    given = x_RD, expert_ids_RK, weights_RK, experts, num_parts
    rows: RowsByRank | RowsBySlot = RowsByRank(*given) if slots is None else RowsBySlot(*given, slots)
    half = while_out()
    yield
    for part in rows.parts:
        part.compute()
    other = while_home(half)
    yield
    return rows.collect(), other
