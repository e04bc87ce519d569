"""Which documents stay, and the reason for each that does not."""

import json
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig, FilterConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.store.store import TokenStore
from tests.data_pipeline.prepare.stores import in_process
from tests.helpers.tiny_store import make_tiny_store, write_jsonl


def test_bad_records_go_to_a_file_with_the_reason(tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", 100, seed=0)
    with text.open("a") as file:
        file.write('not json\n{"body": 1}\n{"text": ""}\n')
    config = DataConfig(
        store=str(tmp_path / "store"),
        sources=(SourceConfig(name="web", paths=(str(text),)),),
        tokenizer=TokenizerConfig(vocab_size=400, algorithm="bpe"),
    )
    report = in_process(config)
    lines = [json.loads(line) for file in Path(config.store).glob("rejects/web/*.jsonl") for line in file.open()]
    assert report.rejects == len(lines) == 3
    assert [line["reason"].split(":")[0] for line in lines] == ["not JSON", "no field 'text'", "empty text"]
    assert sum(report.documents["web"].values()) == 100


def test_filters_drop_documents_with_the_rule_and_limits_take_a_share(tmp_path):
    texts = [
        "short",
        "x" * 5000,
        "fine text that stays here",
        "fine text with a SECRET in it",
        "other text without the word",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    many = write_jsonl(tmp_path / "b.jsonl", 400, seed=0)
    filters = FilterConfig(min_characters=10, max_characters=1000, keep_pattern="fine|other", drop_pattern="SECRET")
    config = DataConfig(
        store=str(tmp_path / "store"),
        sources=(
            SourceConfig(name="few", paths=(str(path),), filters=filters),
            SourceConfig(name="many", paths=(str(many),), max_bytes=70_000),
        ),
        tokenizer=TokenizerConfig(vocab_size=400, algorithm="bpe"),
        prepare=PrepareConfig(part_bytes=10_000),
        validation_fraction=0.0,
    )
    report = in_process(config)
    assert report.documents["few"]["train"] == 2
    reasons = [json.loads(line)["reason"] for file in Path(config.store).glob("rejects/few/*") for line in file.open()]
    assert [reason.split()[1] for reason in reasons] == ["5", "5000", "drop_pattern"]
    store = TokenStore.open(config.store)
    assert 50_000 < sum(part.text_bytes for part in store.parts("many", "train")) <= 71_000
    stricter = config.sources[0].model_copy(update={"filters": FilterConfig(min_characters=26)})
    assert in_process(config.model_copy(update={"sources": (stricter, config.sources[1])})).units_written == 1
    bad = config.sources[0].model_copy(update={"filters": FilterConfig(drop_pattern="(")})
    with pytest.raises(ValueError, match=r"source 'few': filters.drop_pattern='\(' is not a regular expression"):
        in_process(config.model_copy(update={"sources": (bad,)}))


def test_a_source_that_gives_nothing_is_refused_and_points_to_the_rejects(tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", 100, seed=0)
    model = TokenStore.open(make_tiny_store(tmp_path / "other").store).tokenizer_path
    config = DataConfig(
        store=str(tmp_path / "store"),
        sources=(SourceConfig(name="web", paths=(str(text),), text_column="body"),),
        tokenizer=TokenizerConfig(model=str(model)),
    )
    with pytest.raises(
        ValueError,
        match=r"gave no training document: 100 records were rejected, the first is \S+a.jsonl:line 1 .*check text_column='body'",
    ):
        in_process(config)
