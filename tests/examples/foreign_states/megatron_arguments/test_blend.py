"""A blend file of Megatron becomes sources with its weights, as Megatron-Core reads it; what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from amfm_foreign_states.megatron_arguments.blend import read_blend

from amfm.data_pipeline.store.megatron_files import CODE_BY_DTYPE, HEADER, MAGIC
from amfm.launch.cli import run as run_cli
from tests.helpers.json_output import one_object


def write_pair(prefix: Path, tokens: int) -> str:
    """A Megatron pair of one document."""
    np.arange(tokens, dtype=np.uint16).tofile(f"{prefix}.bin")
    head = HEADER.pack(MAGIC, 1, CODE_BY_DTYPE["uint16"], 1, 2)
    Path(f"{prefix}.idx").write_bytes(
        head + np.array([tokens], "<i4").tobytes() + np.zeros(1, "<i8").tobytes() + np.array([0, 1], "<i8").tobytes()
    )
    return str(prefix)


def test_weights_and_prefixes_are_those_of_megatron_core(tmp_path: Path) -> None:
    utils = pytest.importorskip("megatron.core.datasets.utils")
    web, code = write_pair(tmp_path / "web_text_document", 30), write_pair(tmp_path / "code.1", 10)
    for words in (["0.7", web, "3e-1", code], [web, code], [web]):
        (tmp_path / "blend.txt").write_text("  ".join(words[:2]) + "\n" + " ".join(words[2:]))
        prefixes, weights = utils.get_blend_from_list((tmp_path / "blend.txt").read_text().split())
        found = read_blend(tmp_path / "blend.txt").sources
        assert [source["paths"] for source in found] == [[f"{prefix}.idx"] for prefix in prefixes]
        if weights is not None:
            assert [source["weight"] for source in found] == pytest.approx(list(weights))
    assert [source["weight"] for source in read_blend(tmp_path / "blend.txt").sources] == [1.0]
    (tmp_path / "blend.txt").write_text(f"{web} {code}")
    assert [source["weight"] for source in read_blend(tmp_path / "blend.txt").sources] == [0.75, 0.25], "by tokens"


def test_the_verb_writes_sources_and_validation_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    web, held = write_pair(tmp_path / "web", 30), write_pair(tmp_path / "held", 10)
    splits = {"train": [1.0, web], "valid": [web, held], "test": [held]}
    (tmp_path / "blend.json").write_text(json.dumps(splits))
    out = tmp_path / "out.yaml"
    assert run_cli(["import", "blend", str(tmp_path / "blend.json"), str(out), "--json"]) == 0
    assert one_object(capsys.readouterr().out)["left_out"] == ["test"]
    assert yaml.safe_load(out.read_text()) == {
        "data": {"sources": [{"name": "web", "paths": [f"{web}.idx"], "weight": 1.0}]},
        "validation": [{"name": "web_valid", "paths": [f"{web}.idx"]}, {"name": "held", "paths": [f"{held}.idx"]}],
    }
    assert run_cli(["import", "blend", str(tmp_path / "blend.json"), str(out)]) == 2


def test_bad_blends_are_named(tmp_path: Path) -> None:
    web = write_pair(tmp_path / "web", 30)
    blend = tmp_path / "blend.txt"
    for text, message in (
        (f"0.5 {web} 0.5 {tmp_path}/gone", r"gone.idx' does not exist"),
        (f"0.5 {web} 0.5", "ends with the weight 0.5 and no prefix"),
        (f"-1 {web} 1 {web}", r"web.idx the weight -1.0; it must be 0 or more"),
        ('{"train": "web"}', "train, valid and test are read, train must be there"),
        ('{"train": [], "valid": []}', "has no dataset to train on"),
        ('{"train": ["1"], "valid": 1}', "valid is int; it must be a list"),
        ("{", "is not valid JSON"),
    ):
        blend.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_blend(blend)
    (tmp_path / "web.bin").unlink()
    blend.write_text(web)
    with pytest.raises(ValueError, match=r"web.idx needs web.bin next to it; restore the pair"):
        read_blend(blend)
    blend.write_text("")
    with pytest.raises(ValueError, match="has no dataset to train on"):
        read_blend(blend)
