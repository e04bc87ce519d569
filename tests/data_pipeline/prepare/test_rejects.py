"""A file of something else than JSON lines gives as many rejects as lines: counted all, listed some, each with its byte."""

import gzip
import json

import numpy as np

from amfm.data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.config import PrepareConfig as Prepare
from amfm.data_pipeline.prepare import rejects
from tests.data_pipeline.prepare.stores import in_process
from tests.helpers.tiny_store import make_text

SHORT = json.dumps({"text": "short"}) + "\n"


def prepared(tmp_path):
    """Report of a source whose short documents are dropped, and its rejects by file of the store."""
    config = DataConfig(
        store=str(tmp_path / "store"),
        sources=(SourceConfig(name="web", paths=(str(tmp_path / "texts"),), filters={"min_characters": 10}),),
        tokenizer=TokenizerConfig(vocab_size=300, algorithm="bpe", training_bytes=10**5),
        prepare=Prepare(part_bytes=10**6, chunk_tokens=512, on_damage="keep"),
        validation_fraction=0.0,
    )
    report = in_process(config)
    files = sorted((tmp_path / "store" / "rejects" / "web").iterdir())
    return report, [[json.loads(line) for line in file.open()] for file in files]


def test_rejects_are_counted_and_the_first_listed_and_damage_always(tmp_path, monkeypatch):
    monkeypatch.setattr(rejects, "MAX_LISTED", 5)
    (tmp_path / "texts").mkdir()
    long = json.dumps({"text": make_text(np.random.default_rng(0), 3000)}) + "\n"
    with (tmp_path / "texts" / "a.jsonl.gz").open("wb") as file:
        file.write(gzip.compress((long + SHORT * 40).encode()) + b"\x1f\x8b and no more")
    report, (listed,) = prepared(tmp_path)
    assert report.rejects == 41
    assert [item["reason"].partition(":")[0] for item in listed[:5]] == ["filter"] * 5
    assert [item["reason"].partition(" compressed")[0] for item in listed[5:]] == ["damaged"]


def test_a_document_that_a_rule_drops_is_named_by_its_byte_in_the_file(tmp_path):
    (tmp_path / "texts").mkdir()
    long = json.dumps({"text": make_text(np.random.default_rng(0), 3000)}) + "\n"
    content = (long * 20 + SHORT + long).encode()
    (tmp_path / "texts" / "a.jsonl").write_bytes(content)
    report, ((item,),) = prepared(tmp_path)
    offset = content.index(SHORT.encode())
    assert offset > 2 * 65_536, "in no first segment"
    assert item["position"] == f"0/a.jsonl:byte {offset}"
    assert report.first_rejects["web"].startswith(f"{tmp_path}/texts/a.jsonl:line 21 (byte {offset}): filter")
