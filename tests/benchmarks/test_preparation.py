"""`python -m benchmarks.preparation` at a small size: its parts agree with each other; speeds and memory are not judged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig, SourceConfig
from amfm.data_pipeline.prepare.plan import plan_source
from benchmarks.preparation.__main__ import preparation
from benchmarks.preparation.alone import from_json, read_texts, to_json
from benchmarks.preparation.processes import MemoryWatch, Sample, below, memory_by_tenth, parents, title
from tests.helpers.tiny_store import write_jsonl


def test_a_tokenizer_alone_gets_the_texts_of_the_segments_up_to_its_limit(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "text.jsonl", 50, seed=1)
    source = SourceConfig(name="web", paths=(str(file),))
    segments = plan_source(source, DataConfig(store=str(tmp_path / "store"), sources=(source,)))
    wanted = json.loads(json.dumps(to_json(segments)))
    texts = [json.loads(line)["text"] for line in file.read_bytes().splitlines()]
    assert read_texts(from_json(wanted), 10**9) == [(text, len(text.encode())) for text in texts]
    few = read_texts(from_json(wanted), 3 * len(texts[0].encode()))
    assert [text for text, _ in few] == texts[: len(few)] and len(few) < len(texts)


def test_memory_is_a_median_by_tenths_of_the_time_with_actors() -> None:
    samples = [Sample(float(second), 5, 0 if second < 10 else second, 7) for second in range(50)]
    rows = memory_by_tenth(samples)
    assert [row["seconds"] for row in rows] == list(range(10, 50, 4))
    assert [row["actor_bytes"] for row in rows] == [second + 1.5 for second in range(10, 50, 4)]


def test_processes_below_this_one_are_found_with_their_memory() -> None:
    known = parents()
    assert os.getpid() in below(known[os.getpid()]) and os.getpid() not in below(os.getpid())
    assert "pytest" in title(os.getpid()) or "python" in title(os.getpid())
    watch = MemoryWatch(os.getpid())
    watch.sample(0.0)
    (sample,) = watch.samples
    assert sample.actor == 0 and 0 < sample.driver <= sample.total


@pytest.mark.slow
def test_a_small_store_that_was_killed_is_equal_and_every_slice_has_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preparation(
        megabytes=20, shards=6, sources=2, files=40, slices=2, kills=1, vocab_size=600, work=tmp_path, as_json=True
    )
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and len(found["killed"]["kills"]) == 1
    made = found["undisturbed"]
    assert 18e6 < made["text_bytes"] < 22e6 and len(made["slices"]) == 2
    assert made["units"] == found["killed"]["units_in_journal"]
    assert all(row["text_bytes"] > 0 and row["share_of_tokenizer"] > 0 for row in made["slices"])
    assert not (tmp_path / "killed").exists(), "the stores are deleted"
