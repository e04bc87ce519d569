"""One sound file of every kind that is read: what fuzzing and the replayed bad inputs begin with."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import tokenizers
from amfm_foreign_states.dcp import export_dcp
from amfm_foreign_states.universal import export_universal

from amfm.data_pipeline.store.megatron_files import HEADER, MAGIC
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.train import train
from tests.pretrain.export.exported_models import weights_folder
from tests.pretrain.tiny_run import tiny_config, tiny_data


def write_sound_files(place: Path) -> Path:
    """Write one sound file of every kind into a folder, and return it."""
    data = tiny_data(place)
    config = tiny_config(data, place, train__steps=4, train__stop_after_steps=1)
    assert train(config) == 0
    (place / "run.yaml").write_text(resolved_yaml(config))
    (place / "beats").mkdir()
    (place / "beats" / "rank-0.json").write_text('{"rank": 0, "host": "a", "step": 3, "phase": "data", "seen": 1.5}')
    vocabulary = {"</s>": 0, "a": 1, "b": 2, "ab": 3}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")])).save(str(place / "tokenizer.json"))
    write_sources(place / "sources")
    write_tokens(place / "tokens")
    write_chat(place / "chat")
    export_dcp(place, place / "dcp")
    export_universal(place, place / "universal")
    export_checkpoint(weights_folder(data, place / "weights", "nemotron_h"), place / "exported", verify=False)
    return place


def write_tokens(folder: Path) -> None:
    """Token ids that other libraries wrote."""
    folder.mkdir()
    written = Path(__file__).parents[2] / "data_pipeline/store"
    for path in (*(written / "flat_tokens").iterdir(), *(written / "token_shards").iterdir()):
        shutil.copy(path, folder / path.name)


def write_chat(folder: Path) -> None:
    """A conversation, and a template that marks turns and writes tools."""
    folder.mkdir()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"name": "c"}]}]
    (folder / "a.jsonl").write_text(json.dumps({"messages": turns, "tools": [{"name": "c"}]}) + "\n")
    (folder / "chat.jinja").write_text(
        "{{ tools | tojson(indent=1) }}{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )


def write_sources(folder: Path) -> None:
    """Files of each kind of text, in each compression and each encoding of parquet."""
    folder.mkdir()
    texts = [f"document {number}, é 漢 " * 3 for number in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.txt.gz").write_bytes(gzip.compress(texts[0].encode()))
    with pyarrow.CompressedOutputStream(str(folder / "a.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    table = pyarrow.table({"number": list(range(40)), "text": texts})
    for name, compression in (("a.arrow", None), ("b.arrow", "zstd")):
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        with pyarrow.ipc.new_stream(folder / name, table.schema, options=options) as stream:
            stream.write_table(table, max_chunksize=10)
    for name, encoding in (("a.parquet", "PLAIN"), ("b.parquet", "DELTA_BYTE_ARRAY"), ("c.parquet", None)):
        options = {"use_dictionary": encoding is None, "column_encoding": encoding and {"text": encoding}}
        pyarrow.parquet.write_table(table, folder / name, row_group_size=10, compression="zstd", **options)
    (folder / "a.parquet.gz").write_bytes(gzip.compress((folder / "a.parquet").read_bytes()))
    lengths, pointers, bounds = np.full(9, 4, "<i4"), np.arange(9, dtype="<i8") * 8, np.arange(10, dtype="<i8")
    head = HEADER.pack(MAGIC, 1, 8, len(lengths), len(bounds))
    (folder / "a.idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    (folder / "a.bin").write_bytes(np.arange(36, dtype="<u2").tobytes())
