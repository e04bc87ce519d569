"""Limits of time that a busy machine would meet are found, in code and in child programs, and those with a reason are not."""

import pytest

from tests.limits import find_limits


@pytest.mark.parametrize(
    "line",
    [
        "process.communicate(timeout=60)",
        'settings = {"timeout_seconds": 60}',
        "config = tiny_config(data, folder, train__timeout_seconds=4)",
        "def start(patience_seconds: float = 60.0) -> None: ...",
        "PATIENCE_SECONDS = 60",
        "deadline = time.monotonic() + 20",
        "assert process.wait(120) == 0",
        "start_process_group(60.0)",
        "_, alive = psutil.wait_procs([child], timeout=10)",
        'CHILD = "Heartbeat(folder, rank=1, timeout_seconds=0.8)"',
    ],
)
def test_a_short_limit_is_found_once_unless_it_has_a_reason(line: str) -> None:
    assert [number for number, _ in find_limits(f"\n{line}\n")] == [2]
    assert list(find_limits(f"{line}  # short: it must end")) == []


@pytest.mark.parametrize(
    "line",
    [
        "process.communicate(timeout=PATIENCE_SECONDS)",
        "deadline = time.monotonic() + 900",
        "pytestmark = pytest.mark.timeout(2000)",
        "end = time.monotonic() + 60 * minutes",
        '", ".join(words)',
        "time.sleep(0.05)",
    ],
)
def test_long_limits_and_what_is_none_pass(line: str) -> None:
    assert list(find_limits(line)) == []
