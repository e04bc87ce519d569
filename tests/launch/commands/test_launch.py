"""The dry run of a launch, as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.launch.cli import run

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize(("name", "fits"), [("ladder_20m", True), ("ladder_8b_a1b", False)])
def test_a_dry_run_says_when_the_run_does_not_fit(name: str, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", str(CONFIGS / f"{name}.yaml"), "--on", "torchrun", "--nproc-per-node", "1", "--dry-run"]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert "torch.distributed.run" in captured.out
    assert ("warning: on 1 x " in captured.err) != fits
    assert ("--gpus 1 --gpu h100 --search" in captured.err) != fits
