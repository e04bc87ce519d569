"""`max_tokens` of a source: the shortest run of its units, in the order of the plan, that has this many tokens.

How many tokens a text has is known when it is tokenized. So units are written a few at a time: first half of what four
bytes per token would need, then as many as the rate so far says are missing. Which units stay depends on their tokens
alone and not on these guesses, so the store is the same whatever number of actors wrote it and however often it was
stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from amfm.data_pipeline.prepare.plan import BYTES_A_TOKEN, Unit
from amfm.data_pipeline.prepare.unit import UnitReport

FIRST_SHARE = 0.5  # of the first guess, so that a language of few tokens per byte wastes no work


def take_tokens(
    units: Sequence[Unit],
    max_tokens: int,
    find: Callable[[Unit], UnitReport | None],
    write: Callable[[Sequence[Unit]], None],
) -> list[Unit]:
    """Choose the shortest prefix of `units` with `max_tokens` tokens, or all of them if there are fewer; writes what is missing.

    find: the report of a unit that is done. write: does units, and raises where it can't.
    """
    asked = 0
    while True:
        reports = [report for unit in units[:asked] if (report := find(unit)) is not None]
        assert len(reports) == asked, "every unit that was asked for is written"
        totals = list(accumulate(report.tokens for report in reports))
        enough = next((number for number, total in enumerate(totals, 1) if total >= max_tokens), None)
        if enough is not None or asked == len(units):
            return list(units[:enough])
        done = totals[-1] if totals else 0
        if done:
            wanted = (max_tokens - done) * sum(unit.text_bytes for unit in units[:asked]) / done
        else:
            wanted = max_tokens * BYTES_A_TOKEN * FIRST_SHARE
        more = accumulate(unit.text_bytes for unit in units[asked:])
        stop = next((number for number, total in enumerate(more, 1) if total >= wanted), len(units) - asked)
        write([unit for unit in units[asked : asked + stop] if find(unit) is None])
        asked += stop
