"""A rank without progress ends itself and names who holds it up."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from amfm.pretrain.monitor.beats import (
    Beat,
    Neighbours,
    NodeBoard,
    clear_beats,
    describe_lost,
    name_laggards,
    read_beats,
)
from amfm.pretrain.monitor.heartbeat import HUNG, Heartbeat, Stall
from tests.helpers.full_disk import largest_file
from tests.helpers.patience import PATIENCE_SECONDS

HANG = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from amfm.pretrain.monitor.heartbeat import Heartbeat\n"
    "heartbeat = Heartbeat(Path(sys.argv[1]), rank=1, timeout_seconds=0.8)\n"  # short: it must end
    "heartbeat.start()\n"
    "heartbeat.at(5, 'reduce')\n"
    "time.sleep(3000)\n"
)
WITHOUT_FOLDER = (
    "import shutil, sys, time\n"
    "from pathlib import Path\n"
    "from amfm.pretrain.monitor.heartbeat import Heartbeat\n"
    "heartbeat = Heartbeat(Path(sys.argv[1]), rank=1, timeout_seconds=0.8)\n"  # short: it must end
    "heartbeat.start()\n"
    "shutil.rmtree(sys.argv[1])\n"
    "Path(sys.argv[1]).write_text('no folder any more')\n"
    "assert heartbeat.find_lost(2) == []\n"
    "heartbeat.at(5, 'reduce')\n"
    "time.sleep(3000)\n"
)


def beat(rank: int, step: int, phase: str, *, unseen_seconds: float = 0.0) -> Beat:
    return Beat(rank, f"host{rank}", step, phase, seen=time.time() - unseen_seconds)


def test_a_first_beat_that_the_disk_does_not_take_is_named(tmp_path: Path) -> None:
    with largest_file(1), pytest.raises(OSError) as caught:
        Heartbeat(tmp_path, rank=0, timeout_seconds=None).start()
    assert caught.value.filename == str(tmp_path / "heartbeats/rank-0.tmp")


def test_a_rank_without_progress_ends_with_its_place_and_its_stack(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANG, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == HUNG
    assert "rank 1 on " in done.stderr
    assert "(launch.heartbeat_seconds=0.8) at step 5, reduce" in done.stderr
    assert "time.sleep" in done.stderr or "<string>" in done.stderr


def test_the_watchdog_outlives_the_loss_of_its_folder(tmp_path: Path) -> None:
    place = str(tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", WITHOUT_FOLDER, place], capture_output=True, text=True, check=False)
    assert done.returncode == HUNG, done.stderr
    assert "at step 5, reduce" in done.stderr


def test_beats_that_no_rank_wrote_are_left_out(tmp_path: Path) -> None:
    good = asdict(beat(2, 7, "reduce"))
    texts = [
        "",
        "null",
        "[]",
        '{"rank": 1}',
        "{",
        json.dumps({**good, "phase": "x"}),
        json.dumps({**good, "step": None}),
    ]
    for number, text in enumerate([*texts, json.dumps(good)]):
        (tmp_path / f"rank-{number}.json").write_text(text)
    assert [found.rank for found in read_beats(tmp_path)] == [2]


def test_the_watch_counts_from_the_last_progress_and_not_while_the_rank_itself_was_stopped() -> None:
    stall = Stall(interval=0.5, now=10.0)
    assert [stall.measure(10.5 + tick / 2, moved=9.0) for tick in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert [stall.measure(12.5, moved=12.25), stall.measure(13.0, moved=12.25)] == [0.25, 0.75]
    assert [stall.measure(16.0, moved=12.25), stall.measure(16.5, moved=12.25)] == [0.0, 0.5], "stopped for 3 s"


WAITS = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from amfm.pretrain.monitor import heartbeat\n"
    "heartbeat.NEIGHBOUR_SECONDS = 0.2\n"
    "beating = heartbeat.Heartbeat(Path(sys.argv[1]), rank=1, timeout_seconds=600.0)\n"
    "beating.start()\n"
    "beating.at(5, 'reduce')\n"
    "print('waits', flush=True)\n"
    "sys.stdin.readline()\n"
    "heartbeat.SILENT_SECONDS = 1.0\n"
    "time.sleep(3000)\n"
)


def test_a_neighbour_without_a_sign_of_life_ends_the_wait_long_before_a_phase_may_take_no_longer(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    alive, gone = (folder / f"rank-{rank}.json" for rank in (2, 3))
    gone.write_text(json.dumps(asdict(beat(3, 5, "forward"))))
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stdin is not None and waiting.stdout is not None and waiting.stdout.readline() == "waits\n"
    # The next node of the ring beats, with a clock of its own; that the one after is silent is for its neighbour to see.
    for number in range(4):
        alive.with_suffix(".tmp").write_text(json.dumps(asdict(beat(2, 5, "forward", unseen_seconds=1e6 - number))))
        alive.with_suffix(".tmp").rename(alive)
        time.sleep(0.3)
    alive.unlink()  # it ended in order; now rank 3 is the next
    waiting.stdin.write("soon\n")
    waiting.stdin.flush()
    assert waiting.wait(timeout=PATIENCE_SECONDS) == HUNG
    said = waiting.communicate()[1]
    assert "at step 5, reduce; not seen any more: rank 3 on host3 (for " in said


def test_a_neighbour_is_silent_since_its_beat_changed_by_whatever_clock_it_has(tmp_path: Path) -> None:
    neighbours, own, mate = Neighbours(tmp_path), beat(0, 5, "reduce"), beat(1, 5, "reduce", unseen_seconds=1e6)
    file = tmp_path / "rank-2.json"
    other = beat(2, 5, "forward", unseen_seconds=-1e6)
    file.write_text(json.dumps(asdict(other)))
    assert neighbours.poll(0, [own, mate]) == [(mate, 0.0), (other, 0.0)]
    time.sleep(0.01)
    newer = replace(other, seen=other.seen + 2)
    file.write_text(json.dumps(asdict(newer)))
    (first, second) = neighbours.poll(0, [own, mate])
    assert first[0] == mate and first[1] >= 0.01 and second == (newer, 0.0)
    file.unlink()
    assert [found.rank for found, _ in neighbours.poll(0, [own, mate])] == [1], "it ended in good order"


def unwatched(run_dir: Path, rank: int) -> Heartbeat:
    """One that beats often and ends no process: a stall of a busy machine would end that of the tests."""
    heartbeat = Heartbeat(run_dir, rank, timeout_seconds=None)
    heartbeat.interval = 0.4
    return heartbeat


def await_places(folder: Path, places: list[tuple[int, int, str]]) -> None:
    """Until the published beats are of these ranks, steps and phases; the longest wait is for a busy machine."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := [(beat.rank, beat.step, beat.phase) for beat in read_beats(folder)]) != places:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_a_rank_that_moves_and_closes_leaves_nothing(tmp_path: Path) -> None:
    heartbeat = unwatched(tmp_path, rank=0)
    heartbeat.start()
    heartbeat.at(1, "forward")
    await_places(tmp_path / "heartbeats", [(0, 1, "forward")])
    heartbeat.close()
    assert not read_beats(tmp_path / "heartbeats")


def test_a_rank_that_stopped_beating_is_found_and_one_that_beats_or_ended_is_not(tmp_path: Path) -> None:
    own, living, ended = (unwatched(tmp_path, rank) for rank in (0, 1, 3))
    for heartbeat in (own, living, ended):
        heartbeat.start()
    gone = beat(2, 7, "reduce")
    for number in (2, 9):  # rank 9 is of an earlier start with more ranks
        text = json.dumps(asdict(replace(gone, rank=number)))
        (tmp_path / "heartbeats" / f"rank-{number}.json").write_text(text)
    ended.close()
    lost = own.find_lost(4)
    assert describe_lost(lost) == "rank 2 on host2 is lost (last seen at step 7, reduce)"
    living.close()
    own.close()
    assert Heartbeat(tmp_path, rank=0, timeout_seconds=None).find_lost(4) == []


def test_looking_for_lost_ranks_counts_as_progress(tmp_path: Path) -> None:
    own = unwatched(tmp_path, rank=0)
    own.start()
    own.at(7, "reduce")
    (tmp_path / "heartbeats" / "rank-2.json").write_text(json.dumps(asdict(beat(2, 7, "reduce"))))
    entered = time.monotonic()
    assert describe_lost(own.find_lost(4)) == "rank 2 on host2 is lost (last seen at step 7, reduce)"
    step, phase, moved = own._place
    assert (step, phase) == (7, "reduce") and moved > entered, "or the watch would cut the search short"
    own.close()


WRITER = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from amfm.pretrain.monitor.heartbeat import Heartbeat\n"
    "from amfm.pretrain.monitor.beats import NodeBoard\n"
    "heartbeat = Heartbeat(Path(sys.argv[1]), rank=0, timeout_seconds=None)\n"
    "heartbeat.interval, heartbeat.board = 0.4, NodeBoard.of_start(Path(sys.argv[1]), 'token', 0, 3)\n"
    "heartbeat.start()\n"
    "heartbeat.at(7, 'tasks')\n"
    "time.sleep(3000)\n"
)


def on_node(run_dir: Path, rank: int) -> Heartbeat:
    heartbeat = unwatched(run_dir, rank)
    heartbeat.board = NodeBoard.of_start(run_dir, "token", rank, 3)
    return heartbeat


def test_one_rank_writes_for_its_node_and_another_one_after_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    await_places(folder, [(0, 7, "tasks")])
    others = [on_node(tmp_path, rank) for rank in (1, 2)]
    for heartbeat in others:
        heartbeat.start()
        heartbeat.at(7, "reduce")
    await_places(folder, [(0, 7, "tasks"), (1, 7, "reduce"), (2, 7, "reduce")])
    assert [path.name for path in folder.iterdir() if path.suffix == ".json"] == ["rank-0.json"]
    writer.kill()
    writer.wait()
    lost = others[0].find_lost(3)
    assert [beat.rank for beat in lost] == [0], "the others still beat, through another writer"
    for heartbeat in others:
        heartbeat.close()
    # What is left is the place of the rank that did not end in order.
    assert [beat.rank for beat in read_beats(folder)] == [0]
    clear_beats(tmp_path)
    assert not read_beats(folder)
    others[0].board.remove()


def test_a_rank_is_lost_also_where_its_last_beat_was_not_yet_published(tmp_path: Path) -> None:
    own, mate = on_node(tmp_path, 0), on_node(tmp_path, 1)
    own.start()
    mate.board.note(7, 3, time.time())  # and dies: `own` publishes it at its next beat
    assert [beat.rank for beat in read_beats(tmp_path / "heartbeats")] == [0]
    assert [beat.rank for beat in own.find_lost(2)] == [1]
    assert [beat.rank for beat in read_beats(tmp_path / "heartbeats")] == [0, 1]
    elsewhere = beat(2, 7, "reduce")
    file = tmp_path / "heartbeats" / "rank-2.json"
    file.write_text(json.dumps(asdict(elsewhere)))
    late = json.dumps(asdict(replace(elsewhere, seen=elsewhere.seen + own.interval)))
    publisher = threading.Timer(own.interval, lambda: file.write_text(late))
    publisher.start()
    assert [beat.rank for beat in own.find_lost(3)] == [1, 2]
    publisher.join()
    own.close()
    own.board.remove()


def test_ranks_of_a_node_that_end_in_order_leave_nothing(tmp_path: Path) -> None:
    ranks = [on_node(tmp_path, rank) for rank in (2, 0, 1)]
    for heartbeat in ranks:
        heartbeat.start()
    board = ranks[0].board.path
    assert board is not None and board.exists()
    time.sleep(0.5)
    for heartbeat in ranks[1:] + ranks[:1]:
        heartbeat.close()
    assert not list((tmp_path / "heartbeats").glob("*.json")) and not board.exists()


def test_a_heartbeat_that_never_started_closes_without_a_trace(tmp_path: Path) -> None:
    Heartbeat(tmp_path, rank=0, timeout_seconds=None).close()
    assert not list(tmp_path.iterdir())


def test_who_is_not_seen_is_named_before_who_is_behind() -> None:
    beats = [beat(0, 7, "reduce"), beat(1, 7, "data", unseen_seconds=20), beat(2, 7, "data")]
    assert name_laggards(beats, 0, 6.0).startswith(
        "not seen any more: rank 1 on host1 (for 20 s, last at step 7, data)"
    )
    assert name_laggards([beats[0], beats[2]], 0, 6.0) == "behind the others: rank 2 on host2 (at step 7, data)"
    for exchange in ("count", "reduce"):
        same = [beat(0, 7, exchange), beat(1, 7, exchange)]
        assert name_laggards(same, 0, 6.0) == (
            "all ranks are at the same place, so the network between host0 and host1 is the suspect"
        )
