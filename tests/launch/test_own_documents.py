"""Filters, transforms and readers of a folder: in every process that prepares, and in the identity of the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import amfm
from amfm.data_pipeline.config import DataConfig, SourceConfig
from amfm.data_pipeline.prepare.own_code import CodeSpec
from amfm.data_pipeline.store.store import TokenStore
from amfm.launch.cli import run as run_verb
from tests.data_pipeline.prepare.stores import in_process
from tests.helpers.registered import nothing_stays_registered  # noqa: F401 a fixture
from tests.helpers.tiny_store import make_text
from tests.launch.test_modules import page_blocks


def page_program() -> str:
    (program,) = page_blocks("docs/hooks.md", "Documents")
    return program


def write_input(folder: Path, number: int = 120) -> None:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    lines = [{"title": f" Title {n} ", "text": make_text(random, 12) if n % 3 else "short"} for n in range(number)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "b.rec").write_bytes(b"\x1e".join(b"record number %d here" % n for n in range(number)))


def own_data(folder: Path, store: str, **source: object) -> DataConfig:
    write_input(folder / "text")
    settings = {"name": "a", "paths": (str(folder / "text"),), "steps": ("few_words", "titled"), **source}
    return DataConfig(
        store=str(folder / store),
        sources=(SourceConfig.model_validate(settings),),
        tokenizer={"vocab_size": 300},
        validation_fraction=0,
    )


def test_filters_transforms_and_readers_of_a_process_make_the_documents(tmp_path: Path) -> None:
    exec(compile(page_program(), "docs/hooks.md", "exec"), {"__name__": __name__})
    config = own_data(tmp_path, "store")
    report = in_process(config)
    assert sum(report.documents["a"].values()) == 80 + 120 and report.rejects == 40
    store = TokenStore.open(config.store)
    assert "few words" in next((tmp_path / "store" / "rejects" / "a").glob("*.jsonl")).read_text()
    code = json.loads((tmp_path / "store" / "manifest.json").read_text())["code"]["a"]
    assert set(code) == {"few_words", "titled", "records"}
    changed = CodeSpec.registered["titled"]
    amfm.register(amfm.DocumentTransform("titled", changed.function, version="2"))
    again = in_process(config)
    assert again.units_written > 0 and TokenStore.open(config.store).identity() != store.identity()
    assert in_process(config).units_written == 0


def test_a_name_that_nothing_registers_is_refused_with_what_there_is(tmp_path: Path) -> None:
    exec(compile(page_program(), "docs/hooks.md", "exec"), {"__name__": __name__})
    with pytest.raises(ValueError, match=r"steps has 'long'.* there is few_words, titled\..*plugins"):
        in_process(own_data(tmp_path, "store", steps=("long",)))


@pytest.mark.slow
def test_parts_of_a_folder_run_in_rays_actors_and_nothing_next_to_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "my_parts"
    parts.mkdir()
    (parts / "__init__.py").write_text("from my_parts import documents\n")
    (parts / "documents.py").write_text(page_program())
    (tmp_path / "next_to_it.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    stores = []
    for name, actors in (("one", None), ("ray", 2)):
        data = own_data(tmp_path, name).model_dump(mode="json", exclude_unset=True)
        data["prepare"] = {"num_actors": actors, "part_bytes": 70_000}
        tree = {
            "plugins": ["my_parts"],
            "run": {"dir": "run"},
            "model": {"pattern": "-", "vocab_size": 300, "hidden_size": 8, "feed_forward": {"hidden_size": 8}},
            "data": data,
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": 2, "sequence_length": 16, "micro_batch_size": 1, "global_batch_size": 1},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        assert run_verb(["prepare", "run.yaml"]) == 0, capfd.readouterr().err
        stores.append(TokenStore.open(tmp_path / name).identity())
    assert stores[0] == stores[1]
