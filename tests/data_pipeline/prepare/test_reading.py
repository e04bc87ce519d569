"""Fields inside of records, templates, encodings, and long files that are cut into documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from amfm.data_pipeline.config import CutConfig, DataConfig, FilterConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.plan import plan_source
from amfm.data_pipeline.prepare.reading import reading_of
from amfm.data_pipeline.prepare.records import Document, Reject
from amfm.data_pipeline.prepare.segments import cut_segments
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.store import TokenStore
from tests.data_pipeline.prepare.stores import in_process
from tests.helpers.tiny_store import make_text, make_tiny_store, write_jsonl

RECORDS = [
    {"title": "One", "doc": {"text": "first", "year": 1900}},
    {"title": "Two", "doc": {"text": "second é", "year": 1901}},
    {"title": "Three", "doc": {"year": 1902}},
]


def read(path, segment_bytes=10**6, **settings):
    source = SourceConfig(name="web", paths=(str(path),), **settings)
    files = list_files(source)
    reading = reading_of(source, files)
    return [
        item
        for file in files
        for segment in cut_segments(file, segment_bytes, cut=source.cut)
        for item in SegmentReader(segment, source.text_column, reading=reading)
    ]


def plan(path, **settings):
    source = SourceConfig(name="web", paths=(str(path),), **settings)
    return plan_source(source, DataConfig(store="store", sources=(source,)))


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fields_inside_of_others_and_templates_make_texts(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    found = read(path, text_column="doc.text")
    assert texts(found) == ["first", "second é"] and isinstance(found[2], Reject)
    template = "{title} {{{doc.year}}}\n\n{doc.text}."
    assert texts(read(path, template=template)) == ["One {1900}\n\nfirst.", "Two {1901}\n\nsecond é."]
    flat = tmp_path / "flat.jsonl"
    flat.write_text(json.dumps({"doc.text": "as it is called"}) + "\n")
    assert texts(read(flat, text_column="doc.text")) == ["as it is called"]


@pytest.mark.parametrize("template", ["{title", "{}", "{a!r}", "no field"])
def test_what_is_not_a_template_is_refused(tmp_path, template):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(ValueError, match="template"):
        read(path, template=template)


def test_encodings_of_text_and_jsonl_and_bytes_that_are_not_theirs(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes("café".encode("latin-1"))
    lines.write_bytes(json.dumps({"text": "café"}, ensure_ascii=False).encode("latin-1") + b"\n")
    for path in (text, lines):
        assert texts(read(path, encoding="latin-1")) == ["café"]
        assert texts(read(path, errors="replace")) == ["caf�"] and texts(read(path, errors="ignore")) == ["caf"]
        assert [type(item) for item in read(path)] == [Reject]
    text.write_bytes("漢字".encode("utf-16"))
    assert texts(read(text, encoding="utf-16")) == ["漢字"]
    (refused,) = read(text, encoding="gb18030")
    assert refused.reason.startswith("not gb18030: ")
    with pytest.raises(ValueError, match="none of Python's"):
        plan(text, encoding="klingon")
    with pytest.raises(ValueError, match="convert the files"):
        plan(lines, encoding="utf-16")


@pytest.mark.parametrize("segment_bytes", [1, 50, 1000, 10**6])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_cuts_at_lines_are_the_same_whatever_ranges_are_read(tmp_path, segment_bytes, suffix):
    stories = [f"Story {number}.\n" + "é said so.\n" * (number % 5) for number in range(30)]
    path = tmp_path / f"a.txt{suffix}"
    content = "<|endoftext|>\n".join(stories).encode()
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert texts(read(path, segment_bytes, cut=CutConfig(separator=r"^<\|endoftext\|>$"))) == stories
    assert texts(read(path, segment_bytes, cut=CutConfig(first_line="^Story"))) == [
        story + ("<|endoftext|>\n" if number < 29 else "") for number, story in enumerate(stories)
    ]


@pytest.mark.parametrize("between", ["\n", " ", ""])
@pytest.mark.parametrize("segment_bytes", [1, 2500, 10**6])
def test_cuts_by_size_lose_and_repeat_nothing(tmp_path, between, segment_bytes):
    path = tmp_path / "a.txt"
    content = between.join("漢字é" * (1 + number % 11) for number in range(700))
    path.write_text(content)
    found = texts(read(path, segment_bytes, cut=CutConfig(size=1000)))
    assert "".join(found) == content and len(found) == -(-len(content.encode()) // 1000)
    assert found == texts(read(path, cut=CutConfig(size=1000)))


def test_one_long_file_is_held_out_in_part_and_limited(tmp_path):

    path = tmp_path / "input.txt"
    random = np.random.default_rng(0)
    path.write_text("".join(make_text(random, 40) for _ in range(400)))
    whole = DataConfig(
        store=str(tmp_path / "whole"),
        sources=(SourceConfig(name="a", paths=(str(path),), max_bytes=30_000),),
        tokenizer=TokenizerConfig(vocab_size=400),
        prepare=PrepareConfig(num_actors=1),
        validation_fraction=0.2,
    )
    report = in_process(whole)
    assert any("documents are taken whole; cut large files" in remark for remark in report.remarks)
    source = whole.sources[0].model_copy(update={"cut": CutConfig(size=1000)})
    report = in_process(whole.model_copy(update={"store": str(tmp_path / "cut"), "sources": (source,)}))
    assert report.tokens["a"]["validation"] > 0
    assert not any("taken whole" in remark for remark in report.remarks)


@pytest.mark.parametrize("settings", [{}, {"size": 2000, "separator": "a"}, {"separator": "("}])
def test_a_cut_is_one_regular_expression_or_a_size(tmp_path, settings):
    (tmp_path / "a.txt").write_text("some")
    with pytest.raises(ValueError, match=r"must have one of|is not a regular expression"):
        plan(tmp_path / "a.txt", cut=CutConfig(**settings))


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
