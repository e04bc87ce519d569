"""What a manifest records."""

import json
from dataclasses import asdict, replace

import pytest

from amfm.data_pipeline.store.manifest import Layout, Part, shard_length


def test_vocabulary_decides_the_dtype_and_too_large_is_refused():
    assert Layout.for_vocabulary(65536, 64, "fast").dtype == "uint16"
    assert Layout.for_vocabulary(65537, 64, "fast").dtype == "uint32"
    with pytest.raises(ValueError, match="vocabulary 4294967297 must be at most 4294967296"):
        Layout.for_vocabulary(2**32 + 1, 64, "fast")


def test_a_part_comes_back_from_json_as_it_was():
    part = Part(
        "parts/a/train-000000-00.zarr",
        10,
        2,
        40,
        token_shards=(24,),
        document_shards=(20, 4),
        head_shards=(8,),
        digest="d",
        opening_digest="o",
    )
    record = json.loads(json.dumps(asdict(part)))
    assert Part.from_json(record) == part
    del record["opening_digest"]  # as it was written before there was one
    assert Part.from_json(record) == replace(part, opening_digest="")


@pytest.mark.parametrize(("length", "expected"), [(1, 64), (64, 64), (65, 128), (1000, 192)])
def test_a_shard_is_whole_chunks_and_no_longer_than_the_limit(length: int, expected: int):
    assert shard_length(length, chunk=64, limit=200) == expected
