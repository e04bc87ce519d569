"""`python -m benchmarks.checkouts`: turns of two checkouts, their ratio by pairs, and folders that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmarks.checkouts
from benchmarks.checkouts import bench_checkouts, checkouts, print_checkouts
from benchmarks.command import run

HARDWARE = {"processor": "one", "threads": 1}


def make_checkout(folder: Path, seconds: float, loss: float, *, exit_code: int = 0) -> Path:
    """A folder whose `python -m launch bench step`, as older ones have it, answers as ours does, with these figures."""
    (folder / "launch").mkdir(parents=True)
    variant = {"first_loss": loss, "as_trained": {"seconds": seconds}, "memory": {}}
    answer = {"hardware": HARDWARE, "variants": {"ours_fp32": variant}}
    (folder / "launch" / "__main__.py").write_text(
        f"import sys\n"
        f"assert sys.argv[1:] == ['bench', 'step', '--rounds', '2', '--json', '--threads', '1'], sys.argv\n"
        f"open({str(folder.parent / 'turns')!r}, 'a').write({folder.name!r} + ' ')\n"
        f"print({json.dumps(answer)!r})\n"
        f"sys.exit('no room' if {exit_code} else 0)\n"
    )
    return folder


def test_checkouts_take_turns_and_a_ratio_is_of_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarks.checkouts, "HERE", make_checkout(tmp_path / "new", 2.0, 4.5))
    other = make_checkout(tmp_path / "old", 3.0, 4.25)
    result = bench_checkouts(other, pairs=3, rounds=2, num_threads=1, report=lambda _: None)
    assert (tmp_path / "turns").read_text().split() == ["new", "old", "old", "new", "new", "old"]
    found = result["variants"]["ours_fp32"]
    assert (found["rate"], found["rate_min"], found["same_loss"]) == (1.5, 1.5, False)
    assert found["seconds"] == {"here": [2.0] * 3, "there": [3.0] * 3}
    print_checkouts(json.loads(json.dumps(result)))
    assert "1.500 (1.500 to 1.500)" in capsys.readouterr().out


def test_a_checkout_that_fails_and_a_folder_that_is_none_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarks.checkouts, "HERE", make_checkout(tmp_path / "new", 2.0, 4.5, exit_code=1))
    with pytest.raises(RuntimeError, match=r"`launch bench step` failed in .*new: no room"):
        bench_checkouts(tmp_path / "new", pairs=1, rounds=2, num_threads=1, report=lambda _: None)
    assert run(checkouts, [str(tmp_path)]) == 2
    assert "is not a checkout of amfm" in capsys.readouterr().err
