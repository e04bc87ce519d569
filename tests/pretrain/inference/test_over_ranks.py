"""A model that is read over ranks: its layout follows from memory, and the results are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.store.store import TokenStore
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.inference.evaluate import Evaluation, evaluate_checkpoint, measure_store
from amfm.pretrain.inference.over_ranks import Layout, RowPasses, Work, choose_layout
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.tasks.scoring import Scorer
from amfm.pretrain.tasks.suite import TaskChoice, evaluate_tasks, measure_together, open_on_first
from amfm.pretrain.train import train
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tasks.task_files import CHOICE, WEIGH, WRITE, write_task
from tests.pretrain.tiny_run import tiny_config

GB = 1e9


def axes(layout: Layout) -> tuple[int, int]:
    return layout.section.tensor, layout.section.expert


NANO = load_config(Path("configs/nemotron3_nano_30b.yaml"), []).model


def test_experts_are_spread_before_blocks_are_cut_and_only_as_memory_asks() -> None:
    work = Work(8 * 4096)
    assert axes(choose_layout(NANO, 4, 80 * GB, work, "bf16")) == (1, 1)
    assert axes(choose_layout(NANO, 4, 48 * GB, work, "bf16")) == (1, 2)
    tight = choose_layout(NANO, 8, 24 * GB, work, "bf16")
    assert axes(tight) == (1, 8) and "the 27.8 GB of tensor 1, expert 4 do not fit" in tight.reason
    assert axes(choose_layout(NANO, 4, 80 * GB, work, "float32")) == (1, 4)
    message = (
        r"--nproc 2: in float32 the smallest layout, tensor 2, expert 1, needs 80.6 of the 40.0 GB .* --precision bf16"
    )
    with pytest.raises(ValueError, match=message):
        choose_layout(NANO, 2, 40 * GB, work, "float32")


def test_tasks_that_generate_keep_rows_whole() -> None:
    assert axes(choose_layout(NANO, 8, 10 * GB, Work(64), "bf16")) == (4, 8)
    assert axes(choose_layout(NANO, 8, 10 * GB, Work(64, whole_rows=True), "bf16")) == (8, 1)
    with pytest.raises(ValueError, match="tasks that generate need whole sequences on each rank"):
        choose_layout(NANO, 8, 8 * GB, Work(64, whole_rows=True), "bf16")


def train_and_write_tasks(data: DataConfig, folder: Path) -> None:
    pytest.importorskip("lm_eval")
    assert train(tiny_config(data, folder / "run", train__steps=2, schedule__warmup_steps=1)) == 0
    for name, kind in zip(("choice", "weigh", "write"), (CHOICE, WEIGH, WRITE)):
        write_task(folder / "tasks", name, kind)


def measure(folder: str, num_ranks: int) -> tuple[Evaluation, Evaluation, dict[str, float], list[str]]:
    run, said = Path(folder, "run"), []
    choice = TaskChoice(("choice", "weigh", "write"), str(Path(folder, "tasks")))
    text = evaluate_checkpoint(run, sequence_length=23, num_ranks=num_ranks, announce=said.append)
    part = evaluate_checkpoint(run, max_tokens=200, num_ranks=num_ranks, precision="bf16")
    return text, part, evaluate_tasks(run, choice, num_ranks=num_ranks), said


def measure_layouts(folder: str, layouts: tuple[dict[str, int], ...]) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Text and tasks in each of these layouts, which two ranks of this machine have no need of."""
    weights, found = read_weights(Path(folder, "run")), []
    assert weights.run is not None
    choice = TaskChoice(("choice", "weigh"), str(Path(folder, "tasks")))
    for layout in layouts:
        parallel = initialize_parallel(ParallelConfig.model_validate(layout), timeout_seconds=PATIENCE_SECONDS)
        model = weights.build(groups=parallel.groups)
        passes = RowPasses.of_model(model, 8, parallel=parallel, predicts=True)
        store = TokenStore.open(weights.run.data.store)
        sums = measure_store(passes, store, "validation", sequence_length=23, isolated=True)
        store.close()
        scorer = Scorer(passes, model, model.empty_state, weights.tokenizer, max_length=48)
        suite = open_on_first(choice, "--tasks", RankGroup(parallel.rank, parallel.world_size))
        found.append((sums, measure_together(suite, scorer).values))
    return found


def measure_all(folder: str, layouts: tuple[dict[str, int], ...]) -> tuple[Any, Any]:
    return measure(folder, 2), measure_layouts(folder, layouts)


@pytest.mark.parametrize(
    "layouts",
    [({"tensor": 2, "expert": 2},), pytest.param(({"expert": 2}, {"tensor": 2}), marks=pytest.mark.slow)],
    ids=["both", "each"],
)
def test_two_ranks_of_any_layout_find_what_one_rank_finds(
    data: DataConfig, tmp_path: Path, layouts: tuple[dict[str, int], ...]
) -> None:
    train_and_write_tasks(data, tmp_path)
    text, part, tasks, said = measure(str(tmp_path), 1)
    assert not said
    both, in_layouts = zip(*run_ranks(measure_all, str(tmp_path), layouts, num_ranks=2))
    assert both[0][3][0].startswith("2 ranks in float32: tensor 1, expert 1, data 2, because") and not both[1][3]
    for own in both:
        assert (own[0].tokens, own[1].tokens) == (text.tokens, part.tokens)
        assert own[0].loss == pytest.approx(text.loss, rel=1e-5)
        assert own[1].loss == pytest.approx(part.loss, rel=2e-3)  # bf16: rows pass in other batches
        assert own[2] == pytest.approx(tasks, rel=1e-5)
    for ranks in in_layouts:
        for layout, (sums, values) in zip(layouts, ranks, strict=True):
            assert {name: tokens for name, (_, tokens) in sums.items()} == {
                name: source.tokens for name, source in text.by_source.items()
            }, layout
            loss = sum(nll for nll, _ in sums.values()) / text.tokens
            assert loss == pytest.approx(text.loss, rel=1e-5), layout
            assert values == pytest.approx({name: tasks[name] for name in values}, rel=1e-5), layout
            assert values["choice/acc"] == tasks["choice/acc"], layout
