"""Tasks out of held-out text: the same each time, answerable, and read by lm-eval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from amfm_tasks.make_tasks import held_out_texts, make_tasks

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.launch.cli import run
from tests.helpers.json_output import one_object
from tests.helpers.tiny_store import make_tiny_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = make_tiny_store(tmp_path_factory.mktemp("tasks"), num_documents=150)
    assert made.store is not None
    return made.store


def test_answers_are_what_follows_in_the_text(store: str, tmp_path: Path) -> None:
    names, longest = make_tasks(store, tmp_path, name="tiny", num_documents=9)
    assert names == ["tiny_continuation", "tiny_next_word", "tiny_text"]
    text = "".join("\n" + text.strip() for text in held_out_texts(store))
    lengths = []
    for line in (tmp_path / "tiny_continuation.jsonl").read_text().splitlines():
        document = json.loads(line)
        assert document["context"] + document["choices"][document["label"]] in text
        assert len(document["choices"]) == 4
        lengths += [len(load_tokenizer(store).encode(choice)) for choice in document["choices"]]
    assert longest == max(lengths), "rows that a model needs"
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_tasks(store, tmp_path, name="tiny", num_documents=9)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_the_verb_writes_what_lm_eval_reads(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from amfm.pretrain.tasks.suite import TaskChoice, open_suite

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["tasks", store, str(tmp_path / "out"), "--documents", "5", "--json"]) == 0
    names = one_object(capsys.readouterr().out)["tasks"]
    suite = open_suite(TaskChoice(tuple(names), str(tmp_path / "out")), "--tasks")
    suite.load()
    assert suite.kinds() == {"multiple_choice", "generate_until", "loglikelihood_rolling"}


def test_tasks_of_a_folder_called_store_have_the_name_of_its_project(store: str, tmp_path: Path) -> None:
    (tmp_path / "plays").mkdir()
    (tmp_path / "plays" / "store").symlink_to(store)
    names, _ = make_tasks(tmp_path / "plays" / "store", tmp_path / "out", num_documents=1)
    assert names == ["plays_continuation", "plays_next_word", "plays_text"]


def test_too_little_held_out_text_and_odd_names_are_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has \d+ words, and tasks need 432"):
        make_tasks(data.text_store(), tmp_path / "out")
    with pytest.raises(ValueError, match="--name a/b must be letters"):
        make_tasks(data.text_store(), tmp_path / "out", name="a/b")
    assert not (tmp_path / "out").exists()
