"""Synthetic tasks: labels that its own solver finds too, rows that depend on nothing but their numbers, and chance."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
from amfm_synthetic.rows import SyntheticReader
from amfm_synthetic.tasks import SETTINGS, build_task, group_elements

from amfm.data_pipeline.config import DataConfig, PhaseConfig, SyntheticConfig
from amfm.data_pipeline.loader.loader import PretrainLoader, row_settings
from amfm.data_pipeline.samples.packing import IGNORED_LABEL

SMALL = {
    "mqar": SyntheticConfig(task="mqar", num_pairs=3, num_keys=5, num_values=4),
    "overwriting": SyntheticConfig(task="overwriting", num_pairs=3, num_writes=3, num_keys=4, num_values=5),
    "selective_copying": SyntheticConfig(task="selective_copying", num_copied=3, num_symbols=4),
    **{task: SyntheticConfig(task=task) for task in SETTINGS if not SETTINGS[task]},
}
TASKS = list(SMALL)


def open_reader(task_config: SyntheticConfig, length: int, *, split: Any = "train", seed: int = 5) -> SyntheticReader:
    reader = row_settings(
        DataConfig(synthetic=task_config), split=split, sequence_length=length, seed=seed
    ).open_reader()
    assert isinstance(reader, SyntheticReader)
    return reader


def labels_of(row: Any) -> list[tuple[int, int]]:
    return [(place, label) for place, label in enumerate(row.labels_T.tolist()) if label != IGNORED_LABEL]


def solve_recall(task_config: SyntheticConfig, tokens: list[int]) -> list[tuple[int, int]]:
    """A key before a value writes, a key before anything else asks."""
    memory: dict[int, int] = {}
    labels = []
    for place, (token, following) in enumerate(zip(tokens, [*tokens[1:], 0])):
        is_key = 1 <= token <= task_config.num_keys
        if is_key and following > task_config.num_keys:
            memory[token] = following
        elif is_key:
            labels.append((place, memory[token]))
    return labels


def solve_copying(task_config: SyntheticConfig, tokens: list[int]) -> list[tuple[int, int]]:
    symbols = [token for token in tokens if token > 1]
    return list(zip(range(len(tokens) - task_config.num_copied, len(tokens)), symbols, strict=True))


def solve_products(task_config: SyntheticConfig, tokens: list[int]) -> list[tuple[int, int]]:
    """Products of permutation matrices, in which column i holds a one at the image of i."""
    elements = group_elements(task_config.task)  # type: ignore[arg-type]
    matrices = [np.eye(len(p), dtype=np.int64)[:, list(p)] for p in elements]
    state, labels = np.eye(len(elements[0]), dtype=np.int64), []
    for place, token in enumerate(tokens):
        state = state @ matrices[token]
        (number,) = [n for n, matrix in enumerate(matrices) if (matrix == state).all()]
        labels.append((place, number))
    return labels


def solve(task_config: SyntheticConfig, tokens: list[int]) -> list[tuple[int, int]]:
    solver = {"mqar": solve_recall, "overwriting": solve_recall, "selective_copying": solve_copying}
    return solver.get(task_config.task, solve_products)(task_config, tokens)


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_those_of_a_solver_that_reads_the_tokens(task: str) -> None:
    task_config = SMALL[task]
    built = build_task(task_config)
    for length in (max(built.shortest, 4), 37):
        reader = open_reader(task_config, length)
        for sample in range(20):
            row = reader.make_synthetic_row(sample, length)
            assert row.tokens_T.shape == row.labels_T.shape == (length,)
            assert row.tokens_T.min() >= 0 and max(row.tokens_T.max(), row.labels_T.max()) < built.vocab_size
            assert labels_of(row) == solve(task_config, row.tokens_T.tolist()), row


def test_parity_is_the_sum_of_bits() -> None:
    row = open_reader(SMALL["parity"], 65).make_synthetic_row(3, 65)
    assert row.labels_T.tolist() == (np.cumsum(row.tokens_T) % 2).tolist()


def test_each_key_is_written_as_often_as_asked_for_and_asked_once() -> None:
    task_config = SMALL["overwriting"]
    row = open_reader(task_config, 37).make_synthetic_row(0, 37)
    keys = Counter(token for token in row.tokens_T.tolist() if 1 <= token <= task_config.num_keys)
    assert list(keys.values()) == [task_config.num_writes + 1] * task_config.num_pairs
    assert len(labels_of(row)) == task_config.num_pairs


def test_groups_have_their_orders_and_begin_with_the_identity() -> None:
    for task, order in (("parity", 2), ("s3", 6), ("s4", 24), ("a5", 60), ("s5", 120)):
        elements = group_elements(task)  # type: ignore[arg-type]
        assert len(set(elements)) == order and elements[0] == tuple(range(len(elements[0])))
    even = set(group_elements("a5"))
    assert all(tuple(p[i] for i in q) in even for p, q in product(list(even)[:12], even)), "even times even is even"


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_functions_of_seed_split_and_sample(task: str) -> None:
    task_config = SMALL[task]
    reader = open_reader(task_config, 37)
    samples = np.array([9, 2, 10**12])
    (rows, damages), again = (
        reader.read(samples),
        [open_reader(task_config, 37).make_synthetic_row(n, 37) for n in samples],
    )
    assert not damages and [row.sample for row in rows] == samples.tolist()
    for row, expected in zip(rows, again):
        assert row.labels is not None
        assert row.tokens.tolist() == [*expected.tokens_T.tolist(), 0]
        assert row.labels.tolist() == expected.labels_T.tolist()
    others = [
        open_reader(task_config, 37).make_synthetic_row(3, 37),
        open_reader(task_config, 37, seed=6).make_synthetic_row(2, 37),
        open_reader(task_config, 37, split="validation").make_synthetic_row(2, 37),
    ]
    assert all(other.tokens_T.tolist() != again[1].tokens_T.tolist() for other in others)


def test_rows_stay_what_they_were_in_every_release() -> None:
    """Change GENERATOR_VERSION with this digest: a run must not continue with other rows."""
    digest = hashlib.sha256()
    for task_config in SMALL.values():
        for sample in range(3):
            row = open_reader(task_config, 37).make_synthetic_row(sample, 37)
            digest.update(np.stack(row).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "e5e3f1c660c76877"


def test_no_row_of_one_split_occurs_in_the_other_whatever_the_seeds() -> None:
    train = open_reader(SMALL["parity"], 9, seed=1)
    validation = open_reader(SMALL["parity"], 9, split="validation", seed=2)
    trained = {tuple(train.make_synthetic_row(sample, 9).tokens_T) for sample in range(3000)}
    validated = {tuple(validation.make_synthetic_row(sample, 9).tokens_T) for sample in range(600)}
    assert not trained & validated
    # Of 512 rows; the hash decides on its own, so that an eighth is 64 with a standard deviation of 7.5.
    assert len(trained) + len(validated) == 512 and 40 <= len(validated) <= 88


@pytest.mark.parametrize("task", TASKS)
def test_no_constant_prediction_is_better_than_chance(task: str) -> None:
    built, length = build_task(SMALL[task]), 37
    reader = open_reader(SMALL[task], length)
    labels = Counter(label for n in range(600) for _, label in labels_of(reader.make_synthetic_row(n, length)))
    assert len(labels) == built.num_classes
    # The most frequent of up to 120 labels, of 1800 and more: four standard deviations of a share.
    chance = 1 / built.num_classes
    assert max(labels.values()) / labels.total() <= chance + 4 * np.sqrt(chance / labels.total())


def stream(loader: PretrainLoader, steps: int) -> dict[int, tuple[Any, ...]]:
    rows = {}
    for _ in range(steps):
        for batch in loader.take(8):
            assert (batch.loss_mask_BT == (batch.labels_BT != IGNORED_LABEL)).all()
            assert (batch.document_ids_BT == 0).all(), "a row is one document"
            for number, sample in enumerate(batch.sample_ids):
                rows[sample] = batch.tokens_BT[number].tolist(), batch.labels_BT[number].tolist()
    loader.close()
    return rows


def load(workers: int = 0, **changes: Any) -> PretrainLoader:
    config = DataConfig(synthetic=SMALL["overwriting"], num_workers=workers)
    return PretrainLoader(config, **({"sequence_length": 27, "micro_batch_size": 2, "seed": 7} | changes))


def test_order_is_the_same_at_any_world_size_micro_batch_and_worker_count() -> None:
    expected = stream(load(), 3)
    assert sorted(expected) == list(range(24))
    for world_size, micro_batch, workers in ((1, 4, 1), (2, 2, 0), (4, 1, 0)):
        together = {}
        for rank in range(world_size):
            loader = load(workers, micro_batch_size=micro_batch, data_rank=rank, data_world_size=world_size)
            together |= stream(loader, 3)
        assert together == expected, (world_size, micro_batch, workers)


def test_resume_continues_the_order_and_the_ledger_counts_on() -> None:
    expected, first, second = stream(load(), 4), load(), load()
    before = stream(first, 2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before | stream(second, 2) == expected
    (line,) = second.ledger()
    assert (line.source, line.samples, line.tokens, line.epochs) == ("overwriting", 32, 32 * 27, 0.0)
    assert second.describe_repeats(10**9) == []


def test_a_state_of_other_settings_is_refused() -> None:
    first = load()
    first.take(8)
    other = DataConfig(synthetic=SMALL["overwriting"].model_copy(update={"num_keys": 6}), num_workers=0)
    loader = PretrainLoader(other, sequence_length=27, micro_batch_size=2, seed=7)
    with pytest.raises(
        ValueError,
        match=r"the data state has dataset probe-.*, data\.synthetic has probe-.*; set data\.synthetic back",
    ):
        loader.load_state_dict(first.state_dict())


def test_rows_change_their_length_at_a_phase() -> None:
    config = DataConfig(
        synthetic=SMALL["parity"], num_workers=0, phases=(PhaseConfig(start_sample=4, sequence_length=9),)
    )
    loader = PretrainLoader(config, sequence_length=5, micro_batch_size=4, seed=0)
    assert [loader.take(4)[0].tokens_BT.shape[1] for _ in range(2)] == [5, 9]
    assert [(line.phase, line.tokens) for line in loader.ledger()] == [(0, 20), (1, 36)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"task": "parity", "num_keys": 3},
            "num_keys=3 has no effect on the synthetic task parity, whose settings are: none",
        ),
        (
            {"task": "mqar", "num_writes": 2},
            "num_writes=2 has no effect on the synthetic task mqar, whose settings are: num_pairs",
        ),
        ({"task": "mqar", "num_pairs": 4, "num_keys": 3}, "num_pairs=4 must be at most num_keys=3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(SyntheticConfig(**settings))


def test_rows_too_short_for_the_task_or_for_two_splits_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"sequences of 20 tokens are too short for the synthetic task overwriting .*; use 21 at least"
    ):
        open_reader(SMALL["overwriting"], 20)
    with pytest.raises(ValueError, match="no validation sequence of 2 tokens was found for the synthetic task parity"):
        open_reader(SMALL["parity"], 2, split="validation")
