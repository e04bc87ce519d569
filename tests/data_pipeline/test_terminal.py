"""What a long piece of work says of itself, and that a short one says nothing."""

import time

from amfm.data_pipeline.terminal import Waiting, format_bytes, format_seconds
from tests.helpers.patience import PATIENCE_SECONDS


def test_short_work_says_nothing_and_long_work_what_it_does_and_how_long_it_takes(capsys):
    with Waiting("amfm export", quiet_seconds=PATIENCE_SECONDS) as report:
        report("reading", 10**9, 2 * 10**9)
    assert capsys.readouterr().err == ""
    said = ""
    with Waiting("amfm export", quiet_seconds=0.01, every_seconds=0.01) as report:
        report("verifying step-00000003", 10**9, 4 * 10**9)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
            said = capsys.readouterr().err
    assert said.startswith("amfm export: verifying step-00000003: 25% of 4.0 GB, ")
    report.began -= 60
    assert report.describe() == "verifying step-00000003: 25% of 4.0 GB, 3 min to go"
    capsys.readouterr()  # it may have been said again
    with Waiting("amfm train", speaks=False, quiet_seconds=0.0) as report:
        report("building the model")
        time.sleep(0.02)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_counted_is_named_with_the_time_so_far():
    report = Waiting("amfm train", speaks=False)
    report("building the model")
    report.began -= 20
    report("building the model")  # the same work continues
    assert report.describe() == "building the model (20 s so far)"


def test_a_small_file_has_no_time_left():
    report = Waiting("amfm train", speaks=False)
    report("reading step-00000080", 10**6, 42 * 10**6)
    assert report.describe() == "reading step-00000080 (0 s so far)"


def test_durations_and_sizes_are_said_as_people_say_them():
    assert [format_seconds(n) for n in (3.4, 89, 300, 7500)] == ["3 s", "89 s", "5 min", "2 h 05 min"]
    assert [format_seconds(n, exact=True) for n in (3.4, 119.8, 7500)] == ["3 s", "2 min 00 s", "2 h 05 min"]
    assert [format_bytes(n) for n in (12, 1_500_000, 2 * 10**12)] == ["12 bytes", "1.5 MB", "2.0 TB"]
