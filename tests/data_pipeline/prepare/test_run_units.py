"""Who writes the units: this process where the text is small, else Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare import finished_units
from amfm.data_pipeline.prepare.prepare import prepare
from tests.data_pipeline.prepare.stores import contents, elsewhere


@pytest.mark.parametrize("num_actors", [None, 1])
def test_a_small_corpus_is_written_here_with_the_bytes_of_any_other_way(
    reference: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_actors: int | None
) -> None:
    monkeypatch.setattr(finished_units, "run_on_ray", lambda *_, **__: pytest.fail("Ray was asked"))
    config, seen = elsewhere(reference, tmp_path, num_actors=num_actors), []
    report = prepare(config, progress=seen.append)
    assert report.units_written == seen[-1].units_done > 6
    assert contents(config.store) == contents(reference.store)
    assert prepare(config).units_written == 0


class AskedError(Exception):
    """Ray was asked to write."""


@pytest.mark.parametrize(
    ("num_actors", "address", "small_bytes"), [(2, None, 10**9), (None, "auto", 10**9), (None, None, 1)]
)
def test_ray_writes_where_several_actors_a_cluster_or_much_text_is_given(
    reference: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_actors: int | None,
    address: str | None,
    small_bytes: int,
) -> None:
    def ask(*_: object, address: str | None, **__: object) -> None:
        raise AskedError(address)

    monkeypatch.setattr(finished_units, "run_on_ray", ask)
    monkeypatch.setattr(finished_units, "SMALL_BYTES", small_bytes)
    with pytest.raises(AskedError, match=str(address)):
        prepare(elsewhere(reference, tmp_path, num_actors=num_actors), address=address)
