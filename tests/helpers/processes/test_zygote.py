"""A program that is forked does what a fresh interpreter does, and ends when nothing waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.processes.zygote import ADDRESS, BARE, call, run_program
from tests.helpers.spawn import RankFailedError, run_ranks

SHOWN = """
import atexit, os, sys, threading, time
print(__name__, sys.argv, sys.path[0], os.getcwd(), os.environ["SHOWN"], sys.stdin.read(), "\\u00e9")
print("amfm" in sys.modules, "shown_package" in sys.modules, sys.modules["__main__"].__dict__ is globals())
import shown_package
atexit.register(print, "the end")
threading.Thread(target=lambda: (time.sleep(0.1), print("of a thread"))).start()
print("wrong", file=sys.stderr)
sys.exit(EXIT)
"""


@pytest.mark.parametrize("words", [["-c"], ["-P", "-W", "ignore", "-m", "shown"], ["shown.py"]])
def test_a_program_does_in_a_fork_what_it_does_in_a_fresh_interpreter(words: list[str], tmp_path: Path) -> None:
    package, folder = tmp_path / "package", tmp_path / "folder"
    for place in (package, folder):
        place.mkdir()
    (package / "shown_package.py").touch()
    code = SHOWN.replace("EXIT", {"-c": "'no'", "-P": "3"}.get(words[0], "None"))
    (package / "shown.py").write_text(code)
    (folder / "shown.py").write_text(code)
    command = [sys.executable, *words, *([code] if words[0] == "-c" else []), "a", "b c"]
    environment = {**os.environ, "SHOWN": "1", "PYTHONPATH": str(package)}
    fresh = subprocess.run(
        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    forked = run_program(command, env=environment, cwd=folder, zygote=BARE)
    assert (forked.stdout, forked.stderr, forked.returncode) == (fresh.stdout, fresh.stderr, fresh.returncode)
    assert fresh.returncode == {"-c": 1, "-P": 3}.get(words[0], 0) and "of a thread\nthe end" in fresh.stdout


def test_an_error_a_signal_and_variables_that_come_too_late_are_reported() -> None:
    failed = run_program([sys.executable, "-c", "1 / 0"])
    assert failed.returncode == 1 and failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    killed = run_program([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])
    assert killed.returncode == -signal.SIGTERM
    with pytest.raises(ValueError, match="OMP_NUM_THREADS is read before a fork begins; start a fresh interpreter"):
        run_program([sys.executable, "-c", ""], env={**os.environ, "OMP_NUM_THREADS": "7"})


def test_variables_that_a_run_sets_need_no_other_processes_to_fork_from(monkeypatch: pytest.MonkeyPatch) -> None:
    before = call(time.sleep, 0)
    assert before.folder == os.environ.get(ADDRESS, before.folder), "another pair than that of the first process"
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/nowhere")
    after = call(time.sleep, 0)
    assert after.folder == before.folder
    assert before.wait() == after.wait() == 0
    shown = run_program([sys.executable, "-c", "import os; print(os.environ['TORCH_FR_BUFFER_SIZE'])"])
    assert shown.stdout == "1\n"


def waits(folder: str) -> None:
    Path(folder, "begun").touch()
    time.sleep(PATIENCE_SECONDS)


def test_what_nothing_waits_for_ends(tmp_path: Path) -> None:
    process = call(waits, str(tmp_path))
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    process.kill()
    while Path(f"/proc/{process.pid}").exists():
        time.sleep(0.01)


def fails_on_the_second(signals: bool) -> str:
    if os.environ["RANK"] == "0":
        return os.environ["GIVEN"]
    if signals:
        os.kill(os.getpid(), signal.SIGKILL)
    raise LookupError("nothing there")


def test_ranks_have_the_variables_of_their_test_and_a_failed_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "by the test")
    assert run_ranks(fails_on_the_second, False, num_ranks=1) == ["by the test"]
    with pytest.raises(RankFailedError, match=r"(?s)^rank 1 ended with 1\n.*LookupError: nothing there"):
        run_ranks(fails_on_the_second, False)
    with pytest.raises(RankFailedError, match=r"^rank 1 was ended by SIGKILL"):
        run_ranks(fails_on_the_second, True)


COLLECTS = """
import sys
from tests.helpers.processes.zygote_server import collect
found = collect([sys.argv[1]])
print(found and sorted(found), [name for name in sys.modules if name.endswith("test_collected")])
"""


@pytest.mark.parametrize("starts_a_thread", [False, True])
def test_workers_are_forked_from_what_has_collected_the_tests_if_it_has_one_thread(
    starts_a_thread: bool, tmp_path: Path
) -> None:
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    text = "import os\nos.environ['OF_AN_IMPORT'] = '1'\n\ndef test_one():\n    pass\n"
    (tmp_path / "test_collected.py").write_text(text + (thread if starts_a_thread else ""))
    done = run_program([sys.executable, "-c", COLLECTS, str(tmp_path / "test_collected.py")])
    expected = None if starts_a_thread else ["OF_AN_IMPORT"]
    assert done.stdout.splitlines()[-1] == f"{expected} ['test_collected']", done.stdout + done.stderr
    assert ("each worker imports the tests" in done.stderr) == starts_a_thread
