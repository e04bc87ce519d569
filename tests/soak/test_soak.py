"""A run under random faults ends like an undisturbed one; the seed decides them; a difference is found."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.disk import ROOT
from tests.soak.__main__ import check_options, summarize
from tests.soak.compare import compare_logs
from tests.soak.faults import FAULTS_A_ROUND, LOCAL_KINDS, draw_faults
from tests.soak.picture import draw_soak
from tests.soak.processes import descendants, find_ranks, wait_until_gone
from tests.soak.settings import LAYOUTS
from tests.soak.soak import Round, Strike, look_back
from tests.soak.start import read_place

SLEEP = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


def draw(seed: int, number: int) -> list[object]:
    return list(itertools.islice(draw_faults(seed, number, LOCAL_KINDS, 4), 200))


def test_the_seed_and_the_round_alone_decide_the_faults() -> None:
    assert draw(3, 1) == draw(3, 1)
    assert draw(3, 1) != draw(3, 2) and draw(3, 1) != draw(4, 1)
    assert {fault.kind for fault in draw(3, 1)} == set(LOCAL_KINDS) and {fault.rank for fault in draw(3, 1)} == set(
        range(4)
    )


def test_three_rounds_strike_every_kind() -> None:
    def kinds(number: int) -> list[object]:
        faults = itertools.islice(draw_faults(7, number, LOCAL_KINDS, 4), FAULTS_A_ROUND)
        return [fault.kind for fault in faults]

    assert {*kinds(0), *kinds(1), *kinds(2)} == set(LOCAL_KINDS) and not set(kinds(0)) & set(kinds(1))


def test_ranks_are_found_below_their_launcher() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEP], env={**os.environ, "RANK": "3"})
    while len(descendants(process.pid)) < 1:
        assert process.poll() is None
    (child,) = descendants(process.pid)
    assert find_ranks([child]) == {3: child}
    assert wait_until_gone([child], 0.1) == [child]
    os.kill(child.pid, 9)
    process.wait()
    assert wait_until_gone([child], 5) == []


def write_log(run_dir: Path, losses: list[float]) -> None:
    run_dir.mkdir()
    line = {"grad_norm": 1.0, "lr": 0.1, "tokens": 1, "auxiliary": {}, "data": {}, "skipped": False}
    lines = [json.dumps({"step": step, "loss": loss, **line}) for step, loss in enumerate(losses, 1)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "lo')
    (run_dir / "events.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "start", "step": 1}\n')


def test_the_first_step_that_differs_is_named(tmp_path: Path) -> None:
    write_log(tmp_path / "a", [3.0, 2.0, 1.0])
    write_log(tmp_path / "b", [3.0, 2.0 + 2**-50, 1.0])
    assert compare_logs(tmp_path / "a", tmp_path / "a") == []
    (difference,) = compare_logs(tmp_path / "a", tmp_path / "b")
    assert difference.startswith("step 2: {'loss': 2.0, ") and "2.000000000000001" in difference
    place = read_place(tmp_path / "a")
    assert (place.starts, place.began_at, place.step) == (2, 1, 3)


def test_the_table_says_how_each_kind_ended_and_what_was_done_again(tmp_path: Path) -> None:
    write_log(tmp_path / "run", [3.0, 2.0, 1.0])  # started at step 0, and again at step 1
    found = Round(0, LAYOUTS[0].name, ended=True)
    found.strikes = [
        Strike("pause a rank", "rank 1", 1.0, 1, 1),
        Strike("kill a rank", "rank 0", 2.0, 4, 1, code=3),
        Strike("kill a rank", "rank 0", 3.0, 5, 2, code=0),  # too late to hurt
    ]
    look_back(found, LAYOUTS[0], tmp_path / "run")
    result = summarize([found], 7, "")
    assert result["faults"] == {
        "kill a rank": {"count": 2, "exit_codes": {"0": 1, "3": 1}, "most_steps_again": 3},
        "pause a rank": {"count": 1, "exit_codes": {}, "most_steps_again": None},
    }
    assert result["equal"] and result["verdict"] == "1 round, 3 faults, bitwise equal"
    assert not summarize([found], 7, "rank 1 stayed")["equal"]
    draw_soak([found], "Soak", tmp_path / "soak.svg")
    assert "kill a rank (2)" in (tmp_path / "soak.svg").read_text()


def test_options_that_cannot_take_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--round 2 is a round of a seed; name it: --seed N"):
        check_options(None, None, 2, None, None)
    with pytest.raises(ValueError, match="leave --minutes out"):
        check_options(3, 7, 2, None, None)
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="must be new or empty"):
        check_options(3, 7, None, tmp_path, None)


@pytest.mark.slow
def test_three_minutes_of_faults_end_with_the_losses_of_an_undisturbed_run(tmp_path: Path) -> None:
    options = ["--minutes", "3", "--seed", "20", "--json", "--folder", str(tmp_path / "s")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *options],
        check=False,
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["equal"] and result["num_faults"] >= 3
    assert {found["layout"] for found in result["rounds"]} <= {layout.name for layout in LAYOUTS}
