"""The passes before the first step: each rank on its own, with nothing of the run changed, and nothing left to
compile.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.startup import first_passes
from amfm.pretrain.startup.alike_group import alike_groups, destroy
from amfm.pretrain.startup.first_passes import Part, compile_first
from amfm.pretrain.step import train_step
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import tiny_config, tiny_data


def pass_in_turn(folder: str) -> dict[str, Any]:
    """Rank 0 takes the passes of both its pipeline's and its tensor group's blocks while all others wait for it to say so."""
    config = tiny_config(
        tiny_data(Path(folder) / f"data-{os.environ['RANK']}"),
        Path(folder) / "run",
        parallel__tensor=2,
        parallel__expert=2,
        parallel__pipeline=2,
        train__recompute="full",
    )
    first_passes.compiles_anything = lambda *_: True
    with SignalWatch() as signals:
        parallel = initialize_parallel(config.parallel, timeout_seconds=PATIENCE_SECONDS)
        model = first_passes.build_kinds(config, parallel)
        for weight in model.parameters():
            weight.gradient_sum = None  # there is one, as in buckets: those of the run must not be asked
        store = dist.distributed_c10d._get_default_store()
        if parallel.rank > 0:
            store.wait([f"done {parallel.rank - 1}"])
        random = torch.get_rng_state()
        before = digest(model)
        heard: list[str] = []
        groups = alike_groups(parallel.groups)
        first_passes.pass_once(config, first_passes.replace(parallel, groups=groups), model, (2, 48), heard.append)
        destroy(groups)
        store.set(f"done {parallel.rank}", "")
        first_passes.meet(parallel)
    assert signals.received == 0
    assert torch.equal(torch.get_rng_state(), random) and digest(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    return {"heard": [words.rpartition("kernels of ")[2] for words in heard]}


def digest(model: torch.nn.Module) -> str:
    """Of all numbers of a model."""
    content = b"".join(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()


def test_a_rank_passes_its_blocks_while_all_others_wait_and_touches_nothing_of_the_run(tmp_path: Path) -> None:
    """Tensor, expert and pipeline ranks one after the other: a collective would wait for ever."""
    first, _, last, _ = run_ranks(pass_in_turn, str(tmp_path), num_ranks=4)
    assert [words for words in first["heard"] if "several documents" not in words] == [
        "block M",
        "block E",
        "block *",
        "the embedding",
    ]
    assert [words for words in last["heard"] if "several documents" not in words] == ["block -", "the head"]


def test_weights_and_their_sums_are_laid_as_those_of_the_run() -> None:
    """Behind three others in a flat tensor: Triton compiles otherwise for what does not begin at 16 bytes."""
    flat, real, model = torch.zeros(100, dtype=torch.bfloat16), torch.nn.Linear(4, 6), torch.nn.Linear(4, 6).bfloat16()
    real.weight.data, real.bias.data = flat[3:27].view(6, 4), flat[32:38]
    values = model.weight.detach().clone()
    part = Part("both", torch.sum, "", ["", ""])
    assert part.find_offsets(real) == [{"weight": 3, "bias": 0}]
    part.lay(model, {"weight": 3, "bias": 0}, has_sums=True)
    assert (model.weight.storage_offset(), model.bias.storage_offset()) == (3, 0)
    assert torch.equal(model.weight, values)
    total = model.weight.gradient_sum
    (place, adds), (again, adds_now) = total.take(), total.take()
    assert place is again and (adds, adds_now) == (False, True)
    assert (place.shape, place.dtype, place.storage_offset()) == (values.shape, torch.float32, 3)


@pytest.mark.slow
def test_after_the_first_passes_a_step_compiles_nothing(tmp_path: Path) -> None:
    """torch.compile refuses to compile in the steps: what the passes compiled serves the blocks of the run."""
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run", train__compile=True, model__pattern="MEM*-E")
    with SignalWatch() as signals:
        run = start_run(config, signals)
        with torch.compiler.set_stance("fail_on_recompile"):
            losses = [train_step(run).loss for _ in range(2)]
        close_run(run)
    assert all(0 < loss < 10 for loss in losses)


def test_a_run_that_compiles_nothing_takes_no_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run")
    parallel = initialize_parallel(config.parallel, timeout_seconds=PATIENCE_SECONDS)
    monkeypatch.setattr(first_passes, "pass_once", None)
    compile_first(config, parallel, torch.nn.Identity(), (2, 48), pytest.fail)
