"""Mixtures of a study are drawn within bounds, differ only in weights, and a study goes from its file to a proposal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amfm_study.mixture import law as law_file
from amfm_study.mixture.cells import (
    compared_cells,
    draw_candidates,
    open_search,
    sampled_cells,
    weights_of,
)
from amfm_study.mixture.config import MixtureStudyConfig, load_mixture_study
from amfm_study.mixture.law import propose
from amfm_study.mixture.losses import measure_losses
from amfm_study.study import Study

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import diff_configs, resolved_yaml
from amfm.pretrain.train import train
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import tiny_config

STUDY = """\
dir: {folder}/study
task: {{name: text, config: text.yaml}}
mixtures: 4
checks: 2
seeds: [0]
largest: {{source1: 0.6}}
evaluation_tokens: 500
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_tiny_store(tmp_path_factory.mktemp("data"), num_documents=60, num_sources=2)


def make_study(folder: Path, data: DataConfig, *overrides: str, **changes: Any) -> Study[MixtureStudyConfig]:
    config = tiny_config(data, folder / "unused", train__steps=3, **changes)
    config = config.model_copy(update={"model": config.model.model_copy(update={"pattern": "-"})})
    (folder / "text.yaml").write_text(resolved_yaml(config))
    (folder / "study.yaml").write_text(STUDY.format(folder=folder))
    return load_mixture_study(folder / "study.yaml", overrides)


def test_sampled_runs_differ_by_their_weights_alone_and_stay_within_bounds(tmp_path: Path, data: DataConfig) -> None:
    study = make_study(tmp_path, data)
    search = open_search(study)
    np.testing.assert_allclose(search.configured, [1 / 3, 2 / 3])
    cells = sampled_cells(study, search)
    assert [cell.name for cell in cells] == [
        f"{kind}-seed0" for kind in ("fit0", "fit1", "fit2", "fit3", "check0", "check1")
    ]
    weights = weights_of(cells)
    assert (weights[:, 1] <= 0.6).all() and len(np.unique(weights[:, 0])) == 6
    changed = {item.key for item in diff_configs(cells[0].config, cells[1].config) if not item.key.startswith("run.")}
    assert changed == {"data.sources"} or all(key.startswith("data.sources") for key in changed)
    assert np.array_equal(weights, weights_of(sampled_cells(study, search))), "the same mixtures at each call"


def test_a_study_goes_from_sampled_runs_to_a_proposal_that_was_tried(
    tmp_path: Path, data: DataConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(law_file, "RESAMPLES", 20)
    study = make_study(tmp_path, data)
    search, cells = open_search(study), sampled_cells(study, open_search(study))
    for cell in cells:
        assert train(cell.config) == 0
    losses = measure_losses(cells, search, 500, device="cpu", progress=lambda *_: None)
    proposal = propose(weights_of(cells)[:4], losses[:4], search.objective, draw_candidates(search))
    compared = compared_cells(study, search, proposal.mixture)
    assert [cell.mixer for cell in compared] == ["proposal", "equal", "configured"]
    for cell in compared:
        assert train(cell.config) == 0
    assert run(["study", "mixture", str(tmp_path / "study.yaml"), "--json"]) == 0, "nothing is left to train"
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "study" / "study.json").read_text())
    shares = {name: entry["weight"] for name, entry in said["proposal"].items()}
    np.testing.assert_allclose(list(shares.values()), proposal.mixture)
    assert shares["source1"] <= 0.6 and len(said["gain"]["equal"]) == 1 and said["checks"]["runs"] == 2
    by_name = {entry["name"]: entry for entry in said["runs"]}
    assert by_name["equal-seed0"]["weights"] == {"source0": 0.5, "source1": 0.5}
    text = (tmp_path / "study" / "study.md").read_text()
    assert "| source | configured | proposed | 5% to 95% |" in text and "equal weights with every seed" in text
    assert (tmp_path / "study" / "study.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective={third: 1}"], "has no source of this name; there are source0, source1"),
        (["objective={source0: 0}"], "must be weights from 0, one of them above it"),
        (["largest={source0: 0.3, source1: 0.6}"], "leave less than 1 for all sources together"),
        (["largest={source0: 1.5}"], "must be parts of 1, above 0"),
        (["mixtures=3"], "is too few for 2 sources: the law has 3 numbers per source; use 8, 4 at least"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    tmp_path: Path, data: DataConfig, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        open_search(make_study(tmp_path, data, *overrides))


def test_a_run_whose_phases_have_weights_or_with_one_source_is_refused(tmp_path: Path, data: DataConfig) -> None:
    phases = [{"start_sample": 4, "weights": {"source0": 1.0}}]
    with pytest.raises(ConfigError, match=r"data\.phases with their own weights"):
        open_search(make_study(tmp_path, data, data__phases=phases))
    with pytest.raises(ConfigError, match="has no mixture: it needs two sources at least"):
        open_search(make_study(tmp_path, data, data__sources=[data.sources[0].model_dump(mode="json")]))
