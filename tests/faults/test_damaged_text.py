"""A token outside the vocabulary under sound checksums: named, or skipped and counted in metrics.jsonl."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.store.part_writer import write_part
from amfm.data_pipeline.store.store import TokenStore
from amfm.pretrain.checkpoint.manifest_file import read_manifest
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.saving import join_damages
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import read_metrics, tiny_config

SMALL: dict[str, Any] = {"model__pattern": "-", "model__moe": None}  # what is read does not depend on the model


def with_foreign_token(data: DataConfig, folder: Path) -> tuple[DataConfig, str]:
    """A copy of the store in which some tokens of a part are not in the vocabulary; and the part."""
    shutil.copytree(data.store, folder)
    store = TokenStore.open(folder)
    part = store.parts("source0", "train")[0]
    tokens = store.read_tokens(part, 0, part.num_tokens).copy()
    ends = store.document_ends(part).astype(np.uint64)
    tokens[100::400] = store.vocab_size + 7
    written = write_part(
        folder, part.path, tokens, ends, text_bytes=part.text_bytes, layout=store.layout, attributes={}
    )
    assert written.token_shards == part.token_shards, "nothing but the content tells"
    return data.model_copy(update={"store": str(folder)}), part.path


def test_a_token_outside_the_vocabulary_ends_the_run_and_names_part_row_and_token(
    data: DataConfig, tmp_path: Path
) -> None:
    damaged, part = with_foreign_token(data, tmp_path / "store")
    with pytest.raises(
        RuntimeError, match=rf"{part} is damaged: row \d+ of 48 tokens holds token id \d+, outside the voc"
    ):
        train(tiny_config(damaged, tmp_path / "run", **SMALL, train__steps=40))


def test_skipped_samples_are_counted_in_metrics_also_across_a_resume(data: DataConfig, tmp_path: Path) -> None:
    damaged, _ = with_foreign_token(data, tmp_path / "store")
    damaged = damaged.model_copy(update={"on_corruption": "quarantine"})
    counts = []
    for name, stops in (("straight", [12]), ("resumed", [5, 12])):
        for stop in stops:
            config = tiny_config(damaged, tmp_path / name, **SMALL, train__steps=12, train__stop_after_steps=stop)
            assert train(config) == 0
        counts.append([line.get("damaged_samples", 0) for line in read_metrics(tmp_path / name)])
    assert counts[0] == counts[1] == sorted(counts[0]) and counts[0][-1] > 0


def test_damages_that_several_ranks_know_of_are_joined_once_and_in_order() -> None:
    loaded, own = [7, "a", "crc32c"], [30, "b", "truncated"]
    assert join_damages([[loaded, own], [loaded], [loaded, own]]) == [loaded, own]


def train_in_two_starts(config: RunConfig, stops: list[int]) -> list[int]:
    counts = []
    for stop in stops:
        section = config.train.model_copy(update={"stop_after_steps": stop})
        assert train(config.model_copy(update={"train": section})) == 0
        saved = Path(config.run.dir, "checkpoints", f"step-{stop:08d}")
        damages = read_manifest(saved)["state"]["loader"]["quarantined"]
        assert len({sample for sample, _, _ in damages}) == len(damages)
        counts.append(len(damages))
    return counts


@pytest.mark.slow
def test_resumed_ranks_save_each_skipped_sample_once(data: DataConfig, tmp_path: Path) -> None:
    damaged, _ = with_foreign_token(data, tmp_path / "store")
    damaged = damaged.model_copy(update={"on_corruption": "quarantine"})
    config = tiny_config(damaged, tmp_path / "run", train__steps=12)
    counts, _ = run_ranks(train_in_two_starts, config, [5, 8, 12])
    assert 0 < counts[0] < counts[2]
    last = read_metrics(tmp_path / "run")[-1]
    assert last["damaged_samples"] == counts[2]
