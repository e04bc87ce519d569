"""Bins that are kept next to a store: used where they are whole, computed again where they are not."""

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from amfm.data_pipeline.loader.loader import row_settings
from amfm.data_pipeline.store.store import TokenStore
from tests.helpers.tiny_store import make_tiny_store


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_tiny_store(folder, num_documents=60, mean_words=12).model_copy(update={"packing": "best_fit"})


def rows_of(config) -> list[list[int]]:
    reader = row_settings(config, split="train", sequence_length=40, seed=1).open_reader()
    return [row.tokens.tolist() for row in reader.read(np.arange(reader.rows_per_epoch("source0")))[0]]


def test_kept_bins_that_are_damaged_are_computed_and_written_again(config):
    expected, folder, drawn = rows_of(config), Path(config.store, "bins", "40"), random.Random(0)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.suffix for path in kept} == {".json", ".npz"}
    for path, content in kept.items():
        for _ in range(20):
            damaged = bytearray(content)
            damaged[drawn.randrange(len(damaged))] ^= 1 << drawn.randrange(8)
            path.write_bytes(damaged[: drawn.choice([len(damaged), drawn.randrange(len(damaged))])])
            assert rows_of(config) == expected
            assert path.read_bytes() == content


def test_kept_bins_are_not_computed_again(config):
    expected, folder = rows_of(config), Path(config.store, "bins", "40")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert rows_of(config) == expected
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    shutil.rmtree(folder)
    assert rows_of(config) == expected and set(folder.iterdir()) == set(before)


def test_the_last_label_of_a_full_row_is_of_the_same_document_or_none(config):
    """Rows as long as a document that there is: filled by one document to its end, by a piece of a longer one, or by several."""
    store = TokenStore.open(config.store)
    parts = store.parts("source0", "train")
    documents = [
        np.split(store.read_tokens(part, 0, part.num_tokens), store.document_ends(part)[:-1]) for part in parts
    ]
    texts = [document.tolist() for part in documents for document in part]
    length = Counter(map(len, texts)).most_common(1)[0][0]
    assert any(len(text) > 2 * length for text in texts)
    reader = row_settings(config, split="train", sequence_length=length, seed=1).open_reader()
    whole, cut = 0, 0
    for row in reader.read(np.arange(reader.rows_per_epoch("source0")))[0]:
        if row.num_valid >= length and len(row.starts) == 1:
            last = row.tokens[length - 1]
            assert row.num_valid == (length if last == store.eos_id else length + 1)
            assert any(contains(text, row.tokens[: row.num_valid].tolist()) for text in texts)
            whole, cut = whole + (last == store.eos_id), cut + (last != store.eos_id)
    assert whole > 0 and cut > 0


def contains(text: list[int], piece: list[int]) -> bool:
    return any(text[start : start + len(piece)] == piece for start in range(len(text) - len(piece) + 1))
