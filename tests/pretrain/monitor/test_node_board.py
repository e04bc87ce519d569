"""The page of memory in which ranks of a node say where they are."""

from __future__ import annotations

import time
from pathlib import Path

from amfm.pretrain.monitor.node_board import NodeBoard


def test_ranks_see_each_other_and_whoever_published_goes_on_until_it_stops(tmp_path: Path) -> None:
    first, second, third = (NodeBoard(rank, 8, tmp_path / "board") for rank in (6, 2, 3))
    first.note(4, 2, 10.5)
    second.note(5, 1, 11.5)
    assert first.read() == second.read() == third.read() == [(2, 5, 1, 11.5), (6, 4, 2, 10.5)]
    assert first.claim(0.2) and first.claim(0.2)
    assert not second.claim(0.2) and not third.claim(0.2)
    time.sleep(0.3)
    assert second.claim(0.2), "the writer is late"
    assert second.claim(0.2) and not first.claim(0.2) and not third.claim(0.2), "and the new one goes on"
    second.clear()
    assert third.read() == [(6, 4, 2, 10.5)]


def test_a_new_start_sees_nothing_of_the_board_before_and_removes_it(tmp_path: Path) -> None:
    before = NodeBoard.of_start(tmp_path, "before", 0, 2)
    before.note(9, 1, 1.0)
    after = NodeBoard.of_start(tmp_path, "after", 1, 2)
    assert after.read() == []
    assert before.path is not None and not before.path.exists()
    after.remove()
    assert after.path is not None and not after.path.exists()


def test_without_a_token_a_board_is_private() -> None:
    one, other = NodeBoard(3), NodeBoard(3)
    one.note(1, 1, 1.0)
    assert one.read() == [(3, 1, 1, 1.0)] and other.read() == []
    assert one.claim(2.0) and other.claim(2.0)
