"""A reading process: gets micro-batches to read on standard input, gives rows on standard output, ends with its parent.

Started as a fresh interpreter and not forked: the trainer has threads, and a fork would copy their locks. It imports
numpy, not torch, and nothing of the working directory (`-P`). Its answers wait in the pipe until the trainer takes them, so it never runs far ahead of the pipe.

A thread of a reading process that brings blocks of a remote store to the node long before their rows are due.

When a shuffle window begins, nearly every row is in a block that no one has read yet: without this the trainer would
wait for a request per row, and then for none. The order of samples is known, so what will be due is read and not
guessed. A thread is enough, because it waits for the network.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

import numpy as np

from amfm.data_pipeline.samples.packing import Row
from amfm.data_pipeline.samples.samples import CorruptSample, SampleReader, SampleSettings
from amfm.data_pipeline.store.shards import DamagedError

AHEAD_ROWS = 2048  # of this process: minutes of training, and more blocks than a window has


class FetchAhead(threading.Thread):
    """Reads the rows that come after those that were asked for, and throws them away: their blocks stay in the node cache.

    It has its own files; the folder of the node cache is made for several readers. Errors are left to the reader
    that needs the row.
    """

    def __init__(self, reader: SampleReader) -> None:
        super().__init__(daemon=True, name="fetch-ahead")
        self._reader = reader.with_own_files()
        self._due = (0, 1, 1)
        self._moved = threading.Event()

    def move_to(self, first: int, count: int, stride: int) -> None:
        """Report which rows are being read: [first, first + count), the next ones `stride` later."""
        self._due = first, count, stride
        self._moved.set()

    def run(self) -> None:
        """Stay ahead until the process ends."""
        reached, last = 0, 0
        while True:
            self._moved.wait()
            self._moved.clear()
            first, count, stride = self._due
            reached = max(first, reached) if first >= last else first  # back after a seek: begin again
            last = first
            while reached < first + stride * max(1, AHEAD_ROWS // count):
                reached += stride
                self._fetch(reached, count)
                if self._due[0] > first:
                    first = last = self._due[0]

    def _fetch(self, first: int, count: int) -> None:
        """Read rows for their blocks' sake; a failure is met again, and reported, by the reader that needs the row."""
        try:
            self._reader.read(np.arange(first, first + count, dtype=np.int64))
        except RuntimeError:
            return


PIPE_BYTES = 2**20
# What reaches the whole group from the terminal or the scheduler; the trainer decides, and still needs rows to save.
_OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from amfm.data_pipeline.loader.reader_process import serve; serve()"
)


class ReadingProcess:
    """The trainer's end of one reading process; requests are answered in order."""

    def __init__(self, settings: SampleSettings) -> None:
        root = str(Path(__file__).parents[3])
        # Inherited blocked: a signal during the imports of the new process waits until `serve` ignores it.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        assert self._process.stdin is not None and self._process.stdout is not None, "both pipes were asked for"
        self._requests, self._answers = self._process.stdin, self._process.stdout
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            # Over the user's limit for pipes less is read ahead; nothing else changes.
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(self._answers.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._send(settings)

    def request(self, first_sample: int, count: int, stride: int) -> None:
        """Ask for the rows of global samples [first_sample, first_sample + count); the next begin `stride` later."""
        self._send((first_sample, count, stride))

    def receive(self) -> tuple[list[Row], list[CorruptSample]]:
        """Rows of the oldest request; DamagedError as raised there, RuntimeError when the process died."""
        try:
            answer = load_message(self._answers)
        except EOFError as error:
            raise RuntimeError(self._explain_death()) from error
        if isinstance(answer, Exception):
            raise answer
        rows, damages = answer
        return rows, damages

    def close(self) -> None:
        """End the process, which exits when its input has ended, and wait for it."""
        with contextlib.suppress(BrokenPipeError):  # it died with a request on its way
            self._requests.close()
        self._answers.close()
        self._process.wait()

    def _send(self, message: object) -> None:
        try:
            pickle.dump(message, self._requests)
            self._requests.flush()
        except BrokenPipeError as error:
            raise RuntimeError(self._explain_death()) from error

    def _explain_death(self) -> str:
        """Message for a process that died, with its signal or exit code."""
        code = self._process.wait()
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        return (
            f"a process that reads data ahead died ({reason}); its message is above, or it was killed for memory: "
            "start again to resume, with data.num_workers=0 to read in the training process"
        )


def load_message(stream: IO[bytes]) -> Any:
    """Load what the other end has sent next; EOFError where it died before that, or within it, as with a full pipe."""
    try:
        return pickle.load(stream)  # noqa: S301 - a pipe of the process that it started
    except pickle.UnpicklingError as error:
        raise EOFError("the message is truncated") from error


def serve() -> None:
    """Body of the reading process: answer requests until standard input ends."""
    for number in _OF_THE_GROUP:
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints goes to standard error, or it would break the stream of answers.
    os.dup2(2, 1)
    requests: Any = sys.stdin.buffer
    try:
        reader: SampleReader | None = None
        fetcher: FetchAhead | None = None
        while True:
            message = load_message(requests)
            if isinstance(message, SampleSettings):
                reader = message.open_reader()
                if reader.store.remote_cache is not None:
                    fetcher = FetchAhead(reader)
                    fetcher.start()
                continue
            assert reader is not None, "the settings come first"
            if fetcher is not None:
                fetcher.move_to(*message)
            pickle.dump(_answer(reader, *message), answers, protocol=5)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the trainer is gone; nothing here needs to be written


def _answer(
    reader: SampleReader, first: int, count: int, stride: int
) -> tuple[list[Row], list[CorruptSample]] | DamagedError:
    try:
        return reader.read_block(first, count, stride)
    except DamagedError as error:
        return error
