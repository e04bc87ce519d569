"""About 1,900 bad inputs and 280 raw requests: each is rejected with a message and exit code 2, or does what was asked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from tests.examples.serve.conftest import serving
from tests.faults.disk import PATHS
from tests.faults.inputs.requests import requests
from tests.faults.inputs.sound_files import write_sound_files
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.conftest import data
from tests.pretrain.export.exported_models import weights_folder

__all__ = ["data"]
KINDS = (
    *("texts.files", "texts.patterns", "texts.overrides", "texts.settings", "texts.sources", "folders.states"),
    *("folders.models", "folders.runs_and_stores", "folders.markup", "lines.lines", "lines.outputs", "bombs.bombs"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound_files(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_ends_with_a_message_and_the_documented_code(
    place: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-P", "-W", "ignore", "-m", "tests.faults.inputs.trial", str(place), kind]
    variables = {**os.environ, "PYTHONPATH": PATHS}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    broken = report.pop("broken")
    with capsys.disabled():
        print(f"\n{report}", end="")
    assert broken == []


@pytest.mark.slow
def test_raw_requests_are_answered_or_refused(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: Counter[str] = Counter()
    with serving(weights_folder(data, tmp_path / "small", "nemotron_h")) as server:
        address = ("127.0.0.1", server.server_address[1])
        for name, sent in requests():
            with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
                try:
                    connection.sendall(sent)
                    connection.shutdown(socket.SHUT_WR)
                    said = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode(errors="replace")
                except (ConnectionResetError, BrokenPipeError):  # rejected before all of it was there
                    said = "HTTP/1.1 ended"
            status = said.split(" ")[1] if said.startswith("HTTP/1.") else "nothing" if not said else "other"
            assert not status.startswith("5") or status in ("501", "505"), (name, said[:300])
            answers[status] += 1
        with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    said = capsys.readouterr()
    with capsys.disabled():
        print(f"\n{sum(answers.values())} requests: {dict(answers)}", end="")
    assert "Traceback" not in said.err + said.out
