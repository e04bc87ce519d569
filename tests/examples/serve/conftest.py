"""Servers of tiny models with random weights, each on its own port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from amfm_serve.completions import load_model
from amfm_serve.server import ModelServer

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.export.export import export_checkpoint
from tests.pretrain.export.exported_models import weights_folder

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}<assistant>"
)


@contextmanager
def serving(folder: Path, kind: type[ModelServer] = ModelServer) -> Iterator[ModelServer]:
    with kind("127.0.0.1", 0) as server:
        server.max_tokens = 512
        server.model = load_model(folder, device="cpu", backend="torch", max_state_bytes=1 << 28)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def imported(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder."""
    return weights_folder(data, tmp_path_factory.mktemp("served") / "small", "nemotron_h")


@pytest.fixture(scope="session")
def exported(imported: Path) -> Path:
    """Its export, with a chat template as a fine-tuned model has one."""
    folder = imported.parent / "small-chat"
    export_checkpoint(imported, folder, target="nemotron_h", verify=False)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def server(imported: Path) -> Iterator[ModelServer]:
    """A model without a chat template."""
    with serving(imported) as started:
        yield started


@pytest.fixture(scope="session")
def chat_server(exported: Path) -> Iterator[ModelServer]:
    """A model with one."""
    with serving(exported) as started:
        yield started
