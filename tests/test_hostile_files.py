"""A file for each format that is read which would write another file if anything in it ran: none does.

Pickles and TorchScript in checkpoints of other programs are in tests/examples/foreign_states/test_hostile.py.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.records import Reject
from amfm.data_pipeline.prepare.segments import cut_segments
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.chat_template import ChatTemplate
from amfm.data_pipeline.tokenizer.tokenizer import read_tokenizer_file
from amfm.pretrain.checkpoint.files import verify_checkpoint
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_config
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.tensor_files import TensorFile
from tests.examples.foreign_states.conftest import Evil

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    return tmp_path / "touched"


def test_the_pickle_of_these_tests_would_run(touched: Path) -> None:
    pickle.loads(pickle.dumps(Evil(touched)))
    assert touched.exists()


READERS: dict[str, Callable[[Path], Any]] = {
    "weights.safetensors": TensorFile,
    "tokenizer.json": lambda path: read_tokenizer_file(path, "</s>"),
    "tokenizer.model": read_tokenizer_file,
    "manifest.json": lambda path: TokenStore.open(path.parent),
    "weights.json": lambda path: read_weights(path.parent),
    "config.json": lambda path: import_huggingface(path.parent, path.parent / "out"),
    "run.yaml": load_config,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("archive", [False, True], ids=["pickle", "torch.save"])
def test_a_pickle_under_the_name_of_another_format_is_refused(
    tmp_path: Path, touched: Path, name: str, archive: bool
) -> None:
    if archive:
        torch.save({"model": Evil(touched)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Evil(touched)))
    with pytest.raises((ValueError, RuntimeError)):
        READERS[name](tmp_path / name)
    assert not touched.exists()


def test_a_checkpoint_of_pickles_is_damaged(tmp_path: Path, touched: Path) -> None:
    for name in ("manifest.json", "rank-00000.safetensors"):
        torch.save({"model": Evil(touched)}, tmp_path / name)
    manifest, problems = verify_checkpoint(tmp_path)
    assert manifest is None and problems and not touched.exists()


@pytest.mark.parametrize("model_type", ["nemotron_h", "granitemoehybrid", "qwen3_next", "amfm", "unknown"])
def test_code_and_pickles_in_a_transformers_folder_are_left_alone(
    tmp_path: Path, touched: Path, model_type: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"open({str(touched)!r}, 'w')"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(code)
    classes = {"AutoConfig": "configuration_evil.E", "AutoModelForCausalLM": "modeling_evil.E", "AutoTokenizer": ["tokenization_evil.E", None]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": classes, "eos_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes, "tokenizer_class": "E"}))
    torch.save({"weight": Evil(touched)}, folder / "pytorch_model.bin")
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(pickle.dumps(Evil(touched)))
    with pytest.raises(ValueError):
        import_huggingface(folder, tmp_path / "out")
    assert not touched.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", ["arrow.py_extension_type", "arrow.unknown"])
def test_extension_types_of_arrow_unpickle_nothing(tmp_path: Path, touched: Path, suffix: str, name: str) -> None:
    marks = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(Evil(touched))}
    field = pyarrow.field("text", pyarrow.string(), metadata=marks)
    schema = pyarrow.schema([field], metadata={"pandas": pickle.dumps(Evil(touched))})
    table, path = pyarrow.table([["one", "two"]], schema=schema), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, schema) as stream:
            stream.write_table(table)
    (file,) = list_files(SourceConfig(name="a", paths=(str(path),)))
    (segment,) = cut_segments(file, 10**6)
    items = list(SegmentReader(segment, "text"))
    assert [getattr(item, "text", None) for item in items] == ["one", "two"] or isinstance(items[0], Reject)
    assert not touched.exists()


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{}]",
        "!!python/object/new:os.mkdir [{}]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
    ],
)
def test_tags_of_yaml_make_no_object(tmp_path: Path, touched: Path, tag: str) -> None:
    (tmp_path / "run.yaml").write_text(f"run:\n  dir: {tag.format(touched)}\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError):
        load_config(Path("configs/tiny_cpu.yaml"), [f"run.dir={tag.format(touched)}", "run.dir=[]"])
    assert not touched.exists()


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__.os.mkdir('PATH') }}",
        "{{ lipsum.__globals__['os'].mkdir('PATH') }}",
        "{{ self.__init__.__globals__.__builtins__.open('PATH', 'w') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['TemplateError'] }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{a.__class__}'.format_map({'a': ''}) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.__class__ }}",
        "{% include 'PATH' %}",
        "{% import 'os' as os %}{{ os.mkdir('PATH') }}",
        "{{ range(10 ** 9) }}",
        "{{ strftime_now('\0') }}",
        "{{ 'a'.index('b') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 2 ** 62 }}",
        "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    ],
)
def test_templates_get_nothing_but_the_messages(touched: Path, source: str) -> None:
    try:
        written = ChatTemplate(source.replace("PATH", str(touched)), {}).render(MESSAGES)
    except ValueError as error:
        assert "the model's chat template" in str(error)
    else:
        assert written == ""
    assert not touched.exists()
