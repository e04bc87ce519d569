"""Where the time of a run went: what resumes cut out, loading, failed starts and restarts by hand are counted."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from amfm.data_pipeline.terminal import silent
from amfm.pretrain.monitor.held import Starting, extend_held, holding, overlap, read_failed, read_held
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.goodput import measure_goodput
from amfm.pretrain.report.report import write_report
from tests.pretrain.report.test_report import brief, make_run

ORIGIN = 1_800_000_000


def at(seconds: float) -> str:
    return datetime.fromtimestamp(ORIGIN + seconds, UTC).isoformat(timespec="milliseconds")


def write_events(run_dir: Path, *events: dict[str, object]) -> None:
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_what_releases_before_recorded_counts_restarts_and_no_pause_between_two_calls(tmp_path: Path) -> None:
    run = make_run(tmp_path, [brief(step, seconds=0.25) for step in range(1, 101)])
    assert measure_goodput(read_run(run)) is None
    seconds = {"start": 0, "checkpoint": 20, "again": 100, "restarted": 101, "signal": 110, "later": 5000, "end": 5010}
    names = {"again": "start", "later": "start"}
    write_events(run, *({"time": at(when), "event": names.get(name, name)} for name, when in seconds.items()))
    use = measure_goodput(read_run(run))
    # The first attempt and the wait for the second, the second until its signal, the third, of a later call.
    assert use is not None and (use.steps, use.waiting, use.held(), use.restarts) == (25.0, 80.0, 120.0, 1)
    assert use.away == 4890
    page = write_report([run]).read_text()
    assert "20.8 %" in page and "in steps that count, of 2 min, 1 restart<" in page


def test_a_run_that_was_killed_and_restarted_by_hand_shows_all_that_it_lost(tmp_path: Path) -> None:
    """Killed after 20 steps without a checkpoint, and after 40 with one of step 25; one start failed while it loaded."""
    times = {step: 111.0 + step for step in range(1, 26)} | {step: 186.0 + step for step in range(26, 61)}
    run = make_run(
        tmp_path, [brief(step, seconds=1.0, time=ORIGIN + when + 0.5 * (step > 50)) for step, when in times.items()]
    )
    failed = [{"began_at": at(160), "seconds": 12.0, "at": "opening the data"}]
    write_events(
        run,
        {"event": "start", "step": 0, "time": at(10), "began_at": at(0)},
        {"event": "start", "step": 0, "time": at(110), "began_at": at(100), "discarded_seconds": 20.0, "last_line_at": ORIGIN + 31.0},
        {"event": "checkpoint", "step": 25, "time": at(137)},
        {"event": "start", "step": 25, "time": at(210), "began_at": at(200), "discarded_seconds": 15.0, "last_line_at": ORIGIN + 151.0, "failed_starts": failed},
        {"event": "checkpoint", "step": 50, "time": at(240)},
        {"event": "end", "step": 60, "time": at(247)},
    )  # fmt: skip
    use = measure_goodput(read_run(run))
    assert use is not None and use.held() == pytest.approx(31 + 51 + 12 + 47)
    assert (use.steps, use.again, use.restarts, use.waiting) == (60.0, 35.0, 3, 0.0)
    # Four loads, and from the log to the first step of the two starts whose lines are left.
    assert use.starting == pytest.approx(10 + 10 + 12 + 10 + 1 + 1)
    assert use.saving == pytest.approx(0.5) and use.away == pytest.approx(69 + 37)
    assert use.share() == pytest.approx(60 / 141)
    page = write_report([run]).read_text()
    assert "steps done again <b>35.0 s, 24.8 %" in page and "2 min between commands, when it did not run" in page


def test_what_a_launcher_held_is_counted_before_between_and_after_the_starts_of_its_ranks(tmp_path: Path) -> None:
    """The first launcher lost a rank and then its host, 40 s of queue later another one finished the run."""
    times = {step: 20.0 + step for step in range(1, 11)} | {step: 80.0 + step for step in range(11, 31)}
    lines = [brief(step, seconds=1.0, time=ORIGIN + when) for step, when in times.items()]
    lines[10]["seconds"] = 3.5  # graphs were recorded in it
    run = make_run(tmp_path, lines)
    (run / "launch").mkdir()
    launchers = [
        {"began_at": ORIGIN + 0.0, "before_until": None},
        {"began_at": ORIGIN + 150.0, "before_until": ORIGIN + 110.0},
    ]
    (run / "launch/held.jsonl").write_text("".join(json.dumps(each) + "\n" for each in launchers))
    extend_held(run, ORIGIN + 175.0)
    events = [
        {"event": "start", "step": 0, "time": at(20), "began_at": at(10)},
        {"event": "checkpoint", "step": 10, "time": at(30)},
        {"event": "start", "step": 10, "time": at(90), "began_at": at(50), "last_line_at": ORIGIN + 30.0},
        {"event": "restarted", "step": 10, "time": at(90), "cause": "rank 1 was killed"},
        {"event": "start", "step": 30, "time": at(165), "began_at": at(160), "last_line_at": ORIGIN + 110.0},
        {"event": "end", "step": 30, "time": at(170)},
    ]  # fmt: skip
    write_events(run, *events)
    use = measure_goodput(read_run(run))
    assert use is not None and use.held() == pytest.approx(110 + 25) and use.away == pytest.approx(40)
    assert use.waiting == pytest.approx(20) and use.share() == pytest.approx(30 / 135)
    # Loads, the second launcher until its ranks began, and what the first step of a start took beyond the others.
    assert use.starting == pytest.approx((20 + 40 + 5) + 10 + 2.5)


def test_a_launcher_s_last_sign_stays_where_it_is_killed_and_the_next_one_begins_its_own(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    with holding(tmp_path):
        extend_held(tmp_path, ORIGIN + 5.0)
        ((_, seen),) = read_held(tmp_path)
        with holding(tmp_path):
            pass
    (_, first_end), (begin, _) = read_held(tmp_path)
    assert seen == first_end == begin == ORIGIN + 5.0, "the second waited for the first"
    assert overlap([(0.0, 10.0), (20.0, 30.0)], 5.0, 22.0) == 7.0


def test_rollbacks_are_lost_time_until_they_are_taken_back(tmp_path: Path) -> None:
    run = make_run(tmp_path, [brief(step, seconds=1.0) for step in range(1, 11)])
    events = [
        {"event": "start", "step": 0, "time": at(0)},
        {"event": "end", "step": 10, "time": at(20)},
        {"event": "rolled_back_to", "step": 4, "time": at(900), "number": 1, "discarded_seconds": 6.0},
        {"event": "rolled_forward", "step": 10, "time": at(950), "number": 1},
    ]
    for count, lost in ((3, 6.0), (4, 0.0)):
        write_events(run, *events[:count])
        use = measure_goodput(read_run(run))
        assert use is not None and use.again == lost and use.held() == pytest.approx(20.0)


def test_a_start_that_fails_before_its_log_is_in_the_next_ones_event(tmp_path: Path) -> None:
    failed = Starting(tmp_path)
    failed.hearing(silent)("opening the data")
    (before,) = read_failed(tmp_path / "starting.jsonl")
    (tmp_path / "starting.jsonl").open("a").write('{"torn": ')
    start = Starting(tmp_path)
    (found,) = start.facts()["failed_starts"]
    assert found["began_at"][:19] == datetime.fromtimestamp(before["began_at"], UTC).isoformat()[:19]
    assert found["seconds"] == before["time"] - before["began_at"] >= 0 and start.began > failed.began
    start.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "begins_at", "note"),
    [
        (range(15, 21), 0, "metrics.jsonl has no lines of 14 of the steps 1 to 20, the first is 1"),
        ([*range(1, 8), *range(11, 21)], 0, "metrics.jsonl has no lines of 3 of the steps 1 to 20, the first is 8"),
        (range(1, 21), 12, "events.jsonl has no start that trained steps 1 to 12"),
    ],
)
def test_a_log_that_was_renamed_or_emptied_is_named_and_hides_the_goodput(
    tmp_path: Path, steps: Sequence[int], begins_at: int, note: str
) -> None:
    run = make_run(tmp_path, [brief(step, seconds=1.0, time=ORIGIN + step) for step in steps])
    write_events(
        run,
        {"event": "start", "step": begins_at, "time": at(begins_at), "began_at": at(begins_at)},
        {"event": "end", "step": 20, "time": at(21)},
    )
    record = read_run(run)
    assert record.gap is not None and note in record.gap and measure_goodput(record) is None
    page = write_report([run]).read_text()
    assert note in page and "Goodput" not in page
    # Of an unharmed run, and of one whose first steps another folder has (the state was imported).
    whole = [brief(step, seconds=1.0, time=ORIGIN + step) for step in range(13, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in whole))
    assert (read_run(run).gap is None) == (begins_at == 12)
