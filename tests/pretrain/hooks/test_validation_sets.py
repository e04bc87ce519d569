"""Each validation set is measured on its own and by name: any source, text that is never trained on, whole where it is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.store import TokenStore
from amfm.launch.cli import run as run_cli
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.evaluate import evaluate_checkpoint
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.plots import validation_sets_plot
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny_store import make_tiny_store, run_in_process, write_jsonl
from tests.pretrain.tiny_run import MODEL, Trained, read_events, read_metrics, tiny_config, train_and_collect

LENGTH = 48


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A source that is trained on, one that joins later, and a corpus that is only measured."""
    folder = tmp_path_factory.mktemp("sets")
    data = make_tiny_store(folder, num_documents=200, mean_words=12, num_sources=2)
    others = [data.sources[0], data.sources[1].model_copy(update={"weight": 0.0})]
    tree = tiny_config(data.model_copy(update={"sources": tuple(others)}), folder).model_dump(mode="json")
    held_out = str(write_jsonl(folder / "held.jsonl", 30, seed=9, mean_words=12))
    config = RunConfig.model_validate(tree | {"validation": [{"name": "held", "paths": [held_out]}]})
    assert config.data.sources[-1].model_dump(include={"name", "weight"}) == {"name": "held", "weight": 0.0}
    prepare(config.data, runner=run_in_process)
    return config.data


def with_sets(data: DataConfig, run_dir: Path, **overrides: Any) -> RunConfig:
    sets = [{"name": "held"}, {"name": "later", "source": "source1", "tokens": 3 * LENGTH}]
    given = {"train__validate_every_steps": 2, "model__pattern": "E-"} | overrides
    tree = tiny_config(data, run_dir, **given).model_dump(mode="json")
    return RunConfig.model_validate(tree | {"validation": sets})


def test_sets_are_measured_alone_before_the_first_step_and_on(
    text: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_sets(text, tmp_path / "run", train__validation_batches=25)  # more than the text has
    assert train(config) == 0
    terminal = capsys.readouterr().err
    lines = read_metrics(tmp_path / "run")
    assert [sorted(line.get("validation_sets", {})) for line in lines] == [[], ["held", "later"]] * 2
    assert lines[0]["validation_sets_at_start"]["held"] > lines[-1]["validation_sets"]["held"]
    assert f"validation loss of held {lines[-1]['validation_sets']['held']:.4f}" in terminal
    assert "before the first step: validation loss of later" in terminal
    # Each row of a small text once: nothing is left out, and nothing counts twice.
    store = TokenStore.open(str(text.store))
    assert store.num_tokens("held", "train") == 0
    parts, events = store.parts("held", "validation"), read_events(tmp_path / "run", "validation")
    held = [event for event in events if event.get("set") == "held"]
    labels = 0
    for part in parts:
        rows = (part.num_tokens - 1) // LENGTH
        ends = store.document_ends(part)
        labels += rows * LENGTH - sum(1 for end in ends.tolist() if end <= rows * LENGTH)
    assert [event["step"] for event in held] == [0, 2, 4] and {event["tokens"] for event in held} == {labels}
    later = [event["tokens"] for event in events if event.get("set") == "later"]
    assert 2 * LENGTH < later[0] <= 3 * LENGTH, "three rows, less the last tokens of documents"
    store.close()
    # The same rows in order, measured from the checkpoint.
    whole = evaluate_checkpoint(tmp_path / "run", sequence_length=LENGTH).by_source
    assert held[-1]["loss"] == pytest.approx(whole["held"].loss, rel=0.02), (
        "a few tokens at the ends of parts are apart"
    )
    plot = validation_sets_plot(read_run(tmp_path / "run"))
    assert plot is not None and [curve.name for curve in plot.curves] == ["held", "later"]
    assert list(plot.curves[0].steps) == [0, 2, 4]


def test_a_run_is_as_it_is_without_sets(text: DataConfig, tmp_path: Path) -> None:
    assert train(with_sets(text, tmp_path / "sets")) == 0
    assert train(tiny_config(text, tmp_path / "plain", train__validate_every_steps=2, model__pattern="E-")) == 0
    for key in ("loss", "grad_norm", "validation_loss"):
        assert [line.get(key) for line in read_metrics(tmp_path / "sets")] == [
            line.get(key) for line in read_metrics(tmp_path / "plain")
        ]


WHOLE: dict[str, Any] = {"train__micro_batch_size": 1, "model__pattern": MODEL["pattern"]}


def train_layouts(data: DataConfig, folder: str, layouts: list[dict[str, Any]]) -> list[Trained]:
    return [
        train_and_collect(with_sets(data, Path(folder, str(number)), **WHOLE, **layout))
        for number, layout in enumerate(layouts)
    ]


@pytest.mark.slow
def test_every_layout_measures_the_same_losses(text: DataConfig, tmp_path: Path) -> None:
    (one,) = run_ranks(train_layouts, text, str(tmp_path / "one"), [{}], num_ranks=1)
    layouts: list[dict[str, Any]] = [
        {},
        {"parallel__zero_stage": 3},
        {"parallel__tensor": 2, "parallel__sequence_parallel": True},
        {"parallel__expert": 2},
        {"parallel__pipeline": 2},
        {"parallel__context": 2},
    ]
    found = run_ranks(train_layouts, text, str(tmp_path / "two"), layouts)[0]
    for layout, trained in zip(layouts, found):
        for line, expected in zip(trained.metrics, one[0].metrics):
            for key in ("validation_sets", "validation_sets_at_start"):
                assert line.get(key, {}) == pytest.approx(expected.get(key, {}), rel=1e-5), layout


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "held", "source": "nowhere"}, "nowhere is not a name of data.sources"),
        ({"name": "held", "batches": 1, "tokens": 9}, "batches are both given"),
        ({"name": "held", "source": "held", "paths": ["x"]}, "source are both given"),
        ({"name": "again", "paths": ["TRAINED"]}, "is trained on, by source source0; use source: source0"),
    ],
)
def test_sets_that_measure_nothing_or_the_trained_text_are_refused(
    text: DataConfig, tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    entry = entry | ({"paths": list(text.sources[0].paths)} if entry.get("paths") == ["TRAINED"] else {})
    tree = tiny_config(text, tmp_path / "run").model_dump(mode="json") | {"validation": [entry]}
    with pytest.raises(ConfigError, match=message):
        check_run(RunConfig.model_validate(tree), 1)


def test_a_set_that_was_not_prepared_is_named_at_the_start(
    text: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_config(text, tmp_path / "run").model_dump(mode="json")
    config = RunConfig.model_validate(tree | {"validation": [{"name": "new", "paths": ["x.jsonl"]}]})
    (tmp_path / "run.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    assert run_cli(["train", str(tmp_path / "run.yaml")]) == 2
    assert "new" in capsys.readouterr().err
