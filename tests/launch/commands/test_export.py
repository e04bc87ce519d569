"""`amfm export` and `import`: stores for Megatron, vocabularies of tiktoken, what is missing."""

import base64

from amfm.data_pipeline.store.megatron_files import read_megatron_index
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import read_tokenizer_file
from amfm.launch.cli import run
from tests.helpers.json_output import one_object
from tests.helpers.tiny_store import make_tiny_store


def test_tokens_of_a_store_are_exported_for_megatron(tmp_path, capsys):
    store = TokenStore.open(make_tiny_store(tmp_path, num_sources=2).store)
    assert run(["export", str(store.path), str(tmp_path / "out"), "--format", "megatron", "--json"]) == 0
    documents = one_object(capsys.readouterr().out)["documents"]
    assert sum(documents.values()) == sum(part.num_documents for _, _, part in store.all_parts())
    for name in documents:
        assert read_megatron_index(tmp_path / "out" / f"{name}.idx").num_documents == documents[name]
    assert run(["export", str(tmp_path), str(tmp_path / "out"), "--format", "megatron"]) == 2
    assert "must hold a prepared store" in capsys.readouterr().err


def test_a_tiktoken_file_becomes_a_tokenizer_json(tmp_path, capsys):
    file, out = tmp_path / "bytes.tiktoken", tmp_path / "out"
    file.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    options = ["--pattern", r"\p{L}+|[^\p{L}]", "--special", "<end>=300"]
    assert run(["import", str(file), str(out), *options]) == 0
    tokenizer = read_tokenizer_file(out / "tokenizer.json", "<end>")
    assert tokenizer.encode("aé ") == [0x61, 0xC3, 0xA9, 0x20] and tokenizer.eos_id == 300
    assert run(["import", str(file), str(out), *options]) == 2
    assert "out exists and is not empty" in capsys.readouterr().err
    assert run(["import", str(file), str(out)]) == 2
    assert "give it with --pattern" in capsys.readouterr().err
    assert run(["import", str(file), str(out), "--pattern", ".", "--special", "end"]) == 2
    assert "must be TOKEN=ID" in capsys.readouterr().err
    assert run(["import", str(tmp_path), str(out), "--pattern", "."]) == 2
    assert "are for a .tiktoken file" in capsys.readouterr().err


def test_import_says_what_is_missing(tmp_path, capsys):
    assert run(["import", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.json is missing; give a folder that transformers wrote" in capsys.readouterr().err
