"""Saving in the background: the values of the call, one save at a time, failures on every rank."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.pretrain.checkpoint.background import BackgroundSaver
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import IDENTITIES, load, make_engine, run_steps, save, toy_config


def arguments(step: int) -> dict[str, Any]:
    """The same as `save` of the toys gives."""
    state = {"cursor": step, "seen": {"tokens": 10 * step}}
    return {"state": state, "config": toy_config(), "identities": IDENTITIES, "keep_last": 9}


def save_while_training(place: str) -> tuple[int, list[str | None], str]:
    """Save in the background at steps 1 to 3 while the steps continue; then make rank 1 fail."""
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    engine = make_engine(parallel, stage=2, precision="bf16")
    saver = BackgroundSaver(engine, timeout_seconds=PATIENCE_SECONDS)
    finished = []
    for step in (1, 2, 3):
        run_steps(engine, step - 1, step)
        save(Path(place, "waiting"), step, engine)
        finished.append(saver.save(Path(place, "background"), step, **arguments(step)))
        with torch.no_grad():
            engine.module.expert_bias += 0.125  # undone below; a save that still looked at it would show it
        run_steps(engine, 7, 8)
        load(Path(place, "waiting"), engine)
    finished.append(saver.wait())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if parallel.rank == parallel.world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    saver.save(Path(place, "background"), 4, **arguments(4))
    try:
        saver.wait()
        text = "saved"
    except RuntimeError as error:
        text = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    saver.close()
    loaded = load(Path(place, "background"), engine)
    assert loaded is not None
    return loaded.step, [path and path.name for path in finished], text


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_background_save_holds_the_values_of_its_call(tmp_path: Path, num_ranks: int) -> None:
    names = ["step-00000001", "step-00000002", "step-00000003"]
    for step, finished, text in run_ranks(save_while_training, str(tmp_path), num_ranks=num_ranks):
        assert finished == [None, *names]
        assert f"was not saved: rank {num_ranks - 1}: File too large ({tmp_path / 'background'}" in text
        assert step == 3
    for name in names:
        difference = diff_checkpoints(tmp_path / "waiting" / name, tmp_path / "background" / name)
        assert difference["same"], difference
    assert sorted(path.name for path in (tmp_path / "background").iterdir()) == ["latest", *names]
