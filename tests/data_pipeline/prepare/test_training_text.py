"""What a tokenizer is trained on, and the word on a source that has none of it."""

import json

import pytest

from amfm.data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.choose_tokenizer import training_texts
from amfm.data_pipeline.prepare.plan import plan_source
from amfm.data_pipeline.prepare.prepare import prepare


def config_of(tmp_path, name, **changes):
    source = SourceConfig(name="web", paths=(str(tmp_path / name),), **changes)
    return DataConfig(store=str(tmp_path / "store"), sources=(source,), tokenizer=TokenizerConfig(vocab_size=300))


def test_a_wrong_text_column_is_named_with_the_first_record(tmp_path):
    lines = [json.dumps({"body": f"text {number}"}) + "\n" for number in range(3)]
    (tmp_path / "web.jsonl").write_text("".join(lines))
    message = r"'web' gave no text .* 3 records were rejected, the first \(/.*/web.jsonl:line 1 \(byte 0\)\) for: no field 'text'"
    with pytest.raises(ValueError, match=message):
        prepare(config_of(tmp_path, "web.jsonl"))


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes("voil\u00e0".encode("latin-1"))
    with pytest.raises(ValueError, match=r"the first \(/.*/latin.txt\) for: not UTF-8: .* at byte 4"):
        prepare(config_of(tmp_path, "latin.txt"))


def test_texts_stop_at_the_bytes_asked_for(tmp_path):
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": "abc" * 10}) + "\n" for _ in range(9)))
    config = config_of(tmp_path, "web.jsonl")
    config = config.model_copy(update={"tokenizer": TokenizerConfig(vocab_size=300, training_bytes=70)})
    texts = list(training_texts(config, {"web": plan_source(config.sources[0], config)}))
    assert [len(text) for text in texts] == [30, 30, 11]
