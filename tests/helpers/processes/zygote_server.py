"""The processes that `zygote.py` starts: they import, then fork what they are asked for.

Called as `python -m tests.helpers.processes.zygote_server FULL BARE [COLLECTED TEST ...]`: file descriptors of listening sockets,
and the tests that `COLLECTED` collects. All end at the end of standard input. Each connection is one fork: a request with its
standard streams comes in, its process number and its exit code go out.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.util
import os
import pickle
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
import types
import warnings
import weakref
from pathlib import Path
from typing import Any

from tests.helpers.processes.zygote import END, NUMBER

BARE_MODULES = ("torch", "deepspeed", "megatron.core.parallel_state", "typer", "pydantic", "safetensors.torch", "yaml")
# What transformers imports of others for each export that is verified, where it is installed. Not transformers: it reads its
# folders when it is imported.
FOR_TRANSFORMERS = ("PIL.Image", "scipy.optimize", "tokenizers")
FULL_MODULES = ("amfm.launch.cli", "amfm.launch.cluster.local", "amfm.pretrain.train", "tests.helpers.spawn")
# What a first run imports where it needs it: a third of the seconds of a fork that trains for a few steps.
FOR_RUNS = (
    *("amfm.model.mixers.attention", "amfm.model.mixers.mamba2", "amfm.model.moe.block", "amfm.model.feed_forward"),
    *("amfm.model.huggingface.classes", "amfm.pretrain.hooks.lost_losses"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer", "numpy.ma"),
    *("torch.nested._internal.nested_tensor", "torch.fx.experimental._constant_symnode", "rich._emoji_codes"),
    # A second in each rank that measures tasks, a third of one where a store is written.
    *("lm_eval.evaluator", "lm_eval.tasks", "datasets", "zarr"),
)
# What modules of tests import, which a fork imports to find the function that it calls: a fifth of its seconds.
FOR_TESTS = (
    *("pytest", "tests.pretrain.tiny_run", "tests.parallel.layouts", "tests.model.small_models"),
    *("amfm.pretrain.pipeline", "amfm.pretrain.checks.early", "amfm.pretrain.startup.arithmetic"),
    *("amfm.pretrain.engine.muon", "amfm_simulate.count_collectives", "amfm.launch.plan.blocks.measured"),
    "amfm.pretrain.report.page",  # and with it matplotlib
)
# Of Arrow's allocator, which stops it before a fork and does without it afterwards.
ARROWS_THREAD = "jemalloc_bg_thd"


class Server:
    """Forks what connections ask for and sends exit codes, one event after the other, in one thread."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.paths = [path for path in sys.path[1:] if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.variables: dict[str, str] = {}  # which forks have too, unless they have others
        self.needs_interpreters = False  # a fork of this process lacks something: it starts an interpreter
        self.children: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        self.reader, self.writer = socket.socketpair()
        for end in (self.reader, self.writer):
            end.setblocking(False)

    def serve(self) -> None:
        """Fork until standard input ends."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the process that runs the tests
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        for source in (0, self.listener, self.reader):
            self.selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    signal.set_wakeup_fd(-1)
                    for pid in self.children:
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fileobj is self.reader:
                    self.reader.recv(1 << 16)
                elif key.fileobj is self.listener:
                    self.fork(self.listener.accept()[0])
                else:  # nothing waits for the process any longer
                    self.selector.unregister(key.fileobj)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGKILL)
            self.reap()

    def fork(self, connection: socket.socket) -> None:
        """Do in a fork what a connection asks for."""
        try:
            request, streams = receive(connection)
        except ConnectionError:  # it ended while it asked
            connection.close()
            return
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for owned in (self.selector, self.reader, self.writer, self.listener, connection, *self.children.values()):
                owned.close()
            request["env"] = self.variables | request["env"]
            become(request, streams, self.paths, self.needs_interpreters)
        for stream in streams:
            os.close(stream)
        self.children[pid] = connection
        self.selector.register(connection, selectors.EVENT_READ, pid)
        self.send(connection, NUMBER.pack(pid))

    def reap(self) -> None:
        """Send the exit codes of processes that have ended."""
        while self.children:
            pid, status, used = os.wait4(-1, os.WNOHANG)
            if not pid:
                return
            connection = self.children.pop(pid, None)
            if connection is None:
                continue
            if connection in self.selector.get_map():
                self.selector.unregister(connection)
                self.send(connection, END.pack(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))
            connection.close()

    def send(self, connection: socket.socket, data: bytes) -> None:
        """Send; a connection that is closed at the other end is found where events are read."""
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, and the file descriptors of its standard streams."""
    head, streams, _, _ = socket.recv_fds(connection, NUMBER.size, 3)
    if len(head) < NUMBER.size:
        raise ConnectionError
    (size,) = NUMBER.unpack(head)
    data = bytearray()
    while len(data) < size:
        more = connection.recv(min(1 << 20, size - len(data)))
        if not more:
            raise ConnectionError
        data += more
    return pickle.loads(data), list(streams)


def become(request: dict[str, Any], streams: list[int], paths: list[str], needs_interpreter: bool = False) -> None:
    """Be the process that was asked for; ends it."""
    for inherited in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        inherited.detach()  # 400 libraries of operations, which the end of the process takes with it
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        is_error = number == 2  # written at the end of each line, with escapes for what cannot be encoded
        opened = open(  # noqa: SIM115
            number,
            "w" if number else "r",
            buffering=1 if is_error else -1,
            encoding="utf-8",
            errors="backslashreplace" if is_error else "strict",
            closefd=False,
        )
        setattr(sys, name, opened)
        setattr(sys, f"__{name}__", opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if needs_interpreter:
        os.execv(sys.executable, [sys.executable, *request["words"]])
    code = 1
    try:
        if "call" in request:
            sys.path[:] = request["paths"]
            function, arguments = pickle.loads(request["call"])
            function(*arguments)
        else:
            run_words(request["words"], paths)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 0xFF)


def run_words(words: list[str], paths: list[str]) -> None:
    """Run `[-P] [-W ACTION] (-m MODULE | -c CODE | SCRIPT) WORDS` as Python would."""
    words, is_safe = list(words), False
    while words[0] in ("-P", "-W"):
        if words.pop(0) == "-P":
            is_safe = True
        else:
            warnings.simplefilter(words.pop(0))  # type: ignore[arg-type]
    kind = words.pop(0) if words[0] in ("-m", "-c") else ""
    what, *rest = words
    first = str(Path(what).resolve().parent) if not kind else os.getcwd() if kind == "-m" else ""
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*([] if is_safe else [first]), *own, *paths]
    importlib.invalidate_caches()
    sys.argv = [what if kind != "-c" else "-c", *rest]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(what, "<string>", "exec"), main.__dict__)
    else:
        runpy.run_path(what, run_name="__main__")


def load(modules: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Import modules, and leave what they made out of rounds of the garbage collector: forks share its memory.

    optional: those that other releases of the libraries may not have.
    """
    gc.disable()
    for name in modules:
        importlib.import_module(name)
    for name in optional:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()
    gc.enable()


def collect(tests: list[str]) -> dict[str, str] | None:
    """Import tests as pytest does, with asserts rewritten; returns the variables that imports have set.

    A file that cannot be imported is reported by the workers, which try again. None, and a line that says so, if imports have
    started threads, which a fork would not have.
    """
    import pytest

    before = dict(os.environ)
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *tests])
    if sys.platform == "linux":
        names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        others = sorted(set(names[1:]) - {ARROWS_THREAD})
        if others:
            print(f"each worker imports the tests: imports have started threads, {others}", file=sys.stderr)
            return None
    gc.collect()
    gc.freeze()
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def prepare_runs() -> None:
    """Do once what each run does at its start and what its result does not depend on."""
    from amfm.pretrain.monitor import environment, peaks
    from amfm.pretrain.packages import collect_versions

    collect_versions()  # reads 800 files of ours, and what is said of installed packages
    peaks.MEASURED_SECONDS = 0.0  # one small product of matrices in place of 0.1 s: no test claims what a CPU can do
    environment.MEASURED_SIZE["cpu"] = 256


def main() -> None:
    """Serve with the bare modules in a fork, and with all here."""
    full, bare, *others = (socket.socket(fileno=int(number)) for number in sys.argv[1:4])
    folder = Path(full.getsockname()).parent
    present = [name for name in FOR_TRANSFORMERS if importlib.util.find_spec(name.partition(".")[0])]
    load((*BARE_MODULES, *present))
    pids = [os.fork()]
    if not pids[0]:
        for unused in (full, *others):
            unused.close()
        Server(bare).serve()
        os._exit(0)
    bare.close()
    load((*FULL_MODULES, *FOR_TESTS), FOR_RUNS)
    prepare_runs()
    for collected in others:
        pids.append(os.fork())
        if not pids[-1]:
            full.close()
            server = Server(collected)
            variables = collect(sys.argv[4:])
            server.variables, server.needs_interpreters = variables or {}, variables is None
            server.serve()
            os._exit(0)
        collected.close()
    Server(full).serve()
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)  # so that its seconds are counted
    shutil.rmtree(folder)
    os._exit(0)


if __name__ == "__main__":
    main()
