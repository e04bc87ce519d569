"""Two processes from which ranks and command lines of tests are forked: what they have imported is there at once.

A fresh interpreter that trains takes five seconds of the processor to import; a fork takes a fifth of one. `FULL` has
imported amfm; `BARE` only PyTorch, DeepSpeed and Megatron-core, for tests whose packages amfm must find when it is imported
(entry points on PYTHONPATH) and for programs that are not ours. Both have one thread and have computed nothing. What only
a fresh interpreter can show (its flags, variables that are read at an import, a launcher's command, libraries in front of
the C library, signals during imports) stays with `subprocess`.

The process that runs pytest starts them for all its workers; without workers the first test that needs one does. It also
starts `COLLECTED`, a fork of `FULL` that collects the tests, from which its workers are forked: imports of tests, and of
what they test, are made once and not once per worker. They end with the process that started them, and what was forked ends
when nothing waits for it.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FULL, BARE, COLLECTED = "full", "bare", "collected"
ROOT = Path(__file__).parents[3]
ADDRESS = "AMFM_TEST_ZYGOTE"
# Python and libraries read these when they start or are imported, so a fork has them as the first process did.
READ_EARLY = (
    "ATEN_",
    "DS_",
    "GLIBC_",
    "LANG",
    "LC_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "OMP_",
    "ONEDNN_",
    "PYTHON",
    "TORCH",
    "TRITON_",
)
# But these when a process group is made or something is compiled. A run in the process of the tests sets them, and the next
# fork must not need another pair of processes, which would begin with ten seconds of imports.
READ_LATE = (
    *("TORCH_FR_", "TORCH_GLOO_", "TORCH_NCCL_", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PYTHONPATH"),
    *("DS_ACCELERATOR", "TRITON_DEFAULT_FP_FUSION", "PYTHONBREAKPOINT"),  # set by imports of amfm and Ray, in forks too
)
NUMBER = struct.Struct("<q")
END = struct.Struct("<qd")  # exit code, and processor seconds with those of children
_SECONDS = [0.0]


class Forked:
    """A process that was forked, with those parts of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket, folder: str) -> None:
        self.connection, self.folder = connection, folder
        (self.pid,) = self._read(NUMBER)
        self.returncode: int | None = None

    def _read(self, form: struct.Struct) -> tuple[Any, ...]:
        data = b""
        while len(data) < form.size:
            more = self.connection.recv(form.size - len(data))
            if not more:
                log = Path(self.folder, "log")
                raise RuntimeError(f"the process from which tests fork ended: {log.read_text()[-2000:]}")
            data += more
        return form.unpack(data)

    def wait(self) -> int:
        """Exit code of the process, or the signal that ended it, negative, once it has ended."""
        if self.returncode is None:
            self.returncode, seconds = self._read(END)
            _SECONDS[0] += seconds
            self.connection.close()
        return int(self.returncode or 0)

    def kill(self) -> None:
        """End the process; without effect where it has ended."""
        self.connection.close()


def forked_seconds() -> float:
    """Processor seconds of what this process had forked and waited for."""
    return _SECONDS[0]


def call(function: Callable[..., None], *arguments: Any) -> Forked:
    """Call a function of a module in a fork that has this process's variables, folder, paths, input and output.

    The fork ends with 0, or with 1 and a traceback where the function raises.
    """
    return _ask(FULL, {"call": pickle.dumps((function, arguments)), "paths": sys.path}, (0, 1, 2))


def run_program(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    zygote: str = FULL,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(command, capture_output=True, text=True, check=False)`, of a Python program and in a fork.

    The command is `sys.executable`, options among -P and -W ACTION, and a script, `-m MODULE` or `-c CODE` with its words.
    Raises ValueError for variables that differ from this process's and that only a fresh interpreter reads.
    """
    environment = dict(os.environ if env is None else env)
    changed = _read_early(environment).items() ^ _read_early(os.environ).items()
    if changed:
        raise ValueError(
            f"{sorted(changed)[0][0]} is read before a fork begins; start a fresh interpreter with subprocess"
        )
    request = {"words": [str(word) for word in command[1:]], "env": environment, "cwd": str(cwd or Path.cwd())}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors, open(os.devnull, "rb") as nothing:
        process = _ask(zygote, request, (nothing.fileno(), out.fileno(), errors.fileno()))
        try:
            code = process.wait()
        finally:
            process.kill()
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(command), code, *texts)


def _read_early(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_EARLY) and not name.startswith(READ_LATE)
    }


def fork_worker(words: Sequence[str]) -> Forked:
    """Run a worker of pytest-xdist, `-c CODE`, in a fork that has collected the tests, with this process's streams."""
    return _ask(COLLECTED, {"words": list(words)}, (0, 1, 2))


def _ask(zygote: str, request: dict[str, Any], streams: Sequence[int]) -> Forked:
    folder, variables = os.environ.get(ADDRESS), _read_early(os.environ)
    if folder is None or json.loads(Path(folder, "variables.json").read_text()) != variables:
        folder = _own(tuple(sorted(variables.items())))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(folder, zygote))
    data = pickle.dumps({"env": dict(os.environ), "cwd": str(Path.cwd())} | request)
    socket.send_fds(connection, [NUMBER.pack(len(data))], list(streams))
    connection.sendall(data)
    return Forked(connection, folder)


@functools.cache
def _own(variables: tuple[tuple[str, str], ...]) -> str:
    """The folder of processes that this one starts with its variables, where it has none that were started for it."""
    folder, end = start()
    atexit.register(end)
    return folder


def start(tests: Sequence[str] = ()) -> tuple[str, Callable[[], None]]:
    """Start the processes; returns their folder, which `ADDRESS` names to others, and what ends them.

    tests: the folders, files and tests that `COLLECTED` collects; without any there is no such process.
    """
    folder = tempfile.mkdtemp(prefix="z.")
    Path(folder, "variables.json").write_text(json.dumps(_read_early(os.environ)))
    listeners = [_listen(os.path.join(folder, name)) for name in (FULL, BARE, *([COLLECTED] if tests else []))]
    numbers = [listener.fileno() for listener in listeners]
    command = [sys.executable, "-m", "tests.helpers.processes.zygote_server", *map(str, numbers), *tests]
    with open(os.path.join(folder, "log"), "wb") as log:  # warnings of imports, in all
        server = subprocess.Popen(command, pass_fds=numbers, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT)
    for listener in listeners:
        listener.close()
    owner = os.getpid()

    def end() -> None:
        if os.getpid() == owner and server.returncode is None:
            server.communicate()  # at the end of its input it ends

    return folder, end


def _listen(place: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    return listener
