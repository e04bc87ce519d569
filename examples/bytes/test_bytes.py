"""The ids are those of the exported tokenizer.json, and an installed package's tokenizer goes from text to an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import yaml
from amfm_bytes import END, ByteTokenizer

from tests.helpers.examples import amfm, install_example
from tests.pretrain.tiny_run import MODEL


def test_ids_come_back_as_text_and_are_those_of_the_export() -> None:
    tokenizer = ByteTokenizer(b"")
    texts = ["", "plain text", "a\tb\r\nc  d", "Grüße, 世界 👋", "\x00\x7f\xad"]
    ids, offsets = tokenizer.encode_documents(texts)
    assert offsets.tolist()[-1] == len(ids) and all(ids[offset - 1] == END for offset in offsets)
    fast = tokenizers.Tokenizer.from_buffer(tokenizer.to_tokenizer_json())
    for text in texts:
        assert tokenizer.decode([*tokenizer.encode(text), END]) == text
        assert fast.encode(text).ids == tokenizer.encode(text)
    assert fast.token_to_id("<end>") == END


@pytest.mark.slow
def test_installed_it_prepares_trains_and_exports_and_is_named_where_it_is_not(tmp_path: Path) -> None:
    packages = install_example("bytes", tmp_path / "packages")
    (tmp_path / "utf8.bytes").touch()
    lines = [json.dumps({"text": f"Document {index}: grüße, 世界."}) for index in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    tree = {
        "run": {"dir": "run", "tensorboard": False},
        "model": MODEL | {"vocab_size": 320},
        "data": {
            "store": "store",
            "tokenizer": {"model": "utf8.bytes"},
            "validation_fraction": 0.1,
            "sources": [{"name": "text", "paths": ["text.jsonl"]}],
        },
        "train": {
            **{"steps": 3, "sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 4},
            **{"precision": "float32", "num_threads": 1, "validation_batches": 1},
        },
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    for words in (("prepare", "run.yaml"), ("train", "run.yaml"), ("export", "run", "out", "--json")):
        done = amfm(*words, packages=packages, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["max_logit_difference"] < 1e-5 and "tokenizer.bytes" in report["files"]
    assert (tmp_path / "store" / "tokenizer.bytes").is_file()
    missing = amfm("generate", "run", "--prompt", "a", packages=[], cwd=tmp_path)
    assert missing.returncode == 2 and "install the package that registers 'bytes'" in missing.stderr
