"""Exports are verified in forks here: transformers is imported for each, PyTorch is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amfm.pretrain.export import export
from tests.helpers.processes.zygote import BARE, run_program


@pytest.fixture(autouse=True)
def verify_in_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of which nothing of ours is on the path, as the fresh one; `test_export.py` has slow tests with that."""

    def run(command: list[str], *, cwd: Path, **_: Any) -> object:
        return run_program(command, cwd=cwd, zygote=BARE)

    monkeypatch.setattr(export, "subprocess", SimpleNamespace(run=run))
