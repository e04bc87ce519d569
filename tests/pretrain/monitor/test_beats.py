"""The page of memory in which ranks of a node say where they are."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from amfm.pretrain.monitor.beats import NodeBoard


def test_ranks_see_each_other_and_whoever_published_goes_on_until_it_stops(tmp_path: Path) -> None:
    first, second, third = (NodeBoard(rank, 8, tmp_path / "board") for rank in (6, 2, 3))
    first.note(4, 2, 10.5)
    second.note(5, 1, 11.5)
    assert first.read() == second.read() == third.read() == [(2, 5, 1, 11.5), (6, 4, 2, 10.5)]
    hour = 3600.0
    assert first.claim(hour) and first.claim(hour)
    assert not second.claim(hour) and not third.claim(hour)
    time.sleep(0.001)
    assert second.claim(0.0), "the writer is late"
    assert second.claim(hour) and not first.claim(hour) and not third.claim(hour), "and the new one continues"
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


@pytest.mark.parametrize("trap", ["link", "hard link", "another user's"])
def test_what_others_put_in_the_place_of_a_board_is_not_written_to(trap: str, tmp_path: Path) -> None:
    precious, board = tmp_path / "precious", tmp_path / "board"
    precious.write_bytes(b"mine")
    if trap == "link":
        board.symlink_to(precious)
    elif trap == "hard link":
        board.hardlink_to(precious)
    else:
        if os.geteuid() != 0:
            pytest.skip("NOT TESTED: only root gives a file to another user")
        precious.rename(board)
        os.chown(board, 65534, 65534)
    with pytest.raises(OSError, match="board"):
        NodeBoard(0, 2, board)
    assert (board if trap == "another user's" else precious).read_bytes() == b"mine"


def test_without_a_token_a_board_is_private() -> None:
    one, other = NodeBoard(3), NodeBoard(3)
    one.note(1, 1, 1.0)
    assert one.read() == [(3, 1, 1, 1.0)] and other.read() == []
    assert one.claim(2.0) and other.claim(2.0)


def test_the_board_s_memory_is_there_before_it_is_written_to(tmp_path: Path) -> None:
    """A file with holes in full memory is a SIGBUS at the first note; an error at the start gives a private board."""
    board = NodeBoard(0, 1000, tmp_path / "board")
    assert (tmp_path / "board").stat().st_blocks * 512 >= len(board.memory)
