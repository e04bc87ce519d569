"""Causes in the lines of ranks, as real terminals and launchers hand them on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from amfm.launch.cluster.node_logs import Follower, copy_labelled, find_message, last_words, node_log

MESSAGE = "amfm: rank 0 on node1: no progress for 21 s"


@pytest.mark.parametrize(
    "line", [MESSAGE, f"\x1b[2K╰────╯{MESSAGE}", f"\x1b]0;title\x07\x1b[31m{MESSAGE}", f"0: {MESSAGE}"]
)
def test_a_message_is_found_behind_a_panel_s_border_and_control_sequences(line: str) -> None:
    assert find_message(line) == MESSAGE


def test_a_launcher_s_own_words_are_no_message_of_a_rank() -> None:
    assert find_message("amfm launch: attempt 0 failed") == ""


def test_a_rule_is_never_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("RuntimeError: peer gone\n\x1b[1m============\x1b[0m\n────\n")
    assert last_words(log, 3) == "RuntimeError: peer gone"


def test_the_ranks_of_a_node_share_a_log_and_stay_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = node_log(str(tmp_path), 0, 0)
    log.parent.mkdir(parents=True)
    shown = Follower(log)
    with log.open("ab", buffering=0) as file:
        copy_labelled(11, io.BytesIO(b"Traceback\namfm: no memory"), file)
        copy_labelled(0, io.BytesIO(b"step 1: loss 2\n\n"), file)
        file.write(b" 1: aligned by srun\n 0: amfm: it ends\n0: half a")
    shown.show()
    assert capsys.readouterr().err == "step 1: loss 2\n\namfm: it ends\n"
    assert last_words(log, 3, rank=11) == "amfm: no memory"
    assert last_words(log, 3, rank=1) == "aligned by srun"
