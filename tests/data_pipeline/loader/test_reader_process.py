"""Processes that read ahead: how they end, and loaders in processes that were forked or spawned."""

import io
import multiprocessing
import pickle
import signal

import numpy as np
import pytest

from amfm.data_pipeline.loader.reader_process import ReadingProcess, load_message
from tests.data_pipeline.loader.loading import load, stream
from tests.helpers.patience import PATIENCE_SECONDS


def test_a_killed_reading_process_is_one_clear_error(config):
    loader = load(config.model_copy(update={"num_workers": 1}))
    loader.take(8)
    loader._processes[0]._process.send_signal(signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"reads data ahead died \(signal 9\)"):
        for _ in range(10):
            loader.take(8)
    loader.close()


def test_reading_processes_outlive_signals_and_end_with_the_loader(config):
    loader = load(config.model_copy(update={"num_workers": 1}))
    loader.take(8)
    process = loader._processes[0]._process
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    assert len(loader.take(8)) == 4
    loader.close()
    assert process.returncode == 0


def test_signals_while_a_reading_process_starts_do_not_end_it(config):
    """As Ctrl-C in the first second of a run, which the terminal sends to every process."""
    process = ReadingProcess(load(config).settings)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process._process.send_signal(number)
    process.request(0, 2, 2)
    rows, damages = process.receive()
    process.close()
    assert len(rows) == 2 and not damages and process._process.returncode == 0


def test_files_of_the_working_directory_are_not_imported_by_a_reading_process(config, tmp_path, monkeypatch):
    settings = load(config).settings
    for name in ("numpy", "json", "pickle", "numcodecs", "amfm"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(77)")
    monkeypatch.chdir(tmp_path)
    process = ReadingProcess(settings)
    process.request(0, 2, 2)
    assert len(process.receive()[0]) == 2
    process.close()


def read_in_a_child(config, results):
    results.put(stream(load(config), 3, 8))


@pytest.mark.parametrize(
    ("method", "workers"),
    [("fork", 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("fork", 0), ("spawn", 0), ("spawn", 1)))],
)
def test_a_loader_in_a_forked_or_spawned_process_gives_the_same_rows(config, method, workers):
    """Also after the parent has read: open files and reading processes of its own do not get in the way."""
    config = config.model_copy(update={"num_workers": workers})
    parent = load(config)
    parent.take(8)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=read_in_a_child, args=(config, results))
    child.start()
    rows = results.get(timeout=PATIENCE_SECONDS)
    child.join(timeout=PATIENCE_SECONDS)
    parent.close()
    assert child.exitcode == 0 and rows == stream(load(config), 3, 8)


def test_a_message_that_is_cut_anywhere_is_an_end(config):
    """A killed process leaves the beginning of an answer: what it has read ahead fills the pipe, and the rest waits."""
    message = pickle.dumps(load(config, sequence_length=1024).reader.read(np.arange(3)), protocol=5)
    for cut in range(0, len(message), 41):
        with pytest.raises(EOFError):
            load_message(io.BytesIO(message[:cut]))
    rows, damages = load_message(io.BytesIO(message))
    assert len(rows) == 3 and not damages
