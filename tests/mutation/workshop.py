"""A copy of the repository in which one file at a time is wrong, and forks that run tests there.

Packages that are not ours are imported once, before the forks: they are most of a test's start. What a test starts itself, ranks
and programs, sees the wrong file too, since it is on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAID = (0, 1, -signal.SIGKILL)  # all passed, one failed, ended by us
OUTPUT = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
# In the copy: reads [arguments of pytest, file of the output] as JSON lines, answers with the exit code. Tests that were quick
# before run first, whichever file they are in.
SERVER = """
import json, os, pathlib, sys
answers = os.fdopen(os.dup(1), "w")  # what others print goes elsewhere
os.dup2(2, 1)
import numpy, torch, torch.distributed, torch.multiprocessing, torch.utils.data, deepspeed, megatron.core, zarr, pydantic
import pytest, hypothesis, transformers, sentencepiece, tokenizers
class QuickestFirst:
    def __init__(self, file):
        self.file = pathlib.Path(file)
        self.seconds = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.now = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report):
        self.now[report.nodeid] = self.now.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self):
        self.file.write_text(json.dumps(self.seconds | self.now))

print("ready", file=answers, flush=True)
for line in sys.stdin:
    arguments, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        code = pytest.main(arguments, plugins=[QuickestFirst(log + ".seconds")])
        sys.stdout.flush()
        os._exit(code)
    print(pid, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Verdict:
    """Of one run of tests: whether one failed, the first that did, and how long it took."""

    caught: bool
    by: str
    seconds: float


class Workshop:
    """`folder`: where the copy is; made again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "amfm", folder / "log"
        shutil.rmtree(self.folder, ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).exists() or (ROOT / name).is_symlink():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name, follow_symlinks=False)
        self.times = int(time.time()) - 10**6  # of changed files, each its own: compiled files are told apart by them
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(self.folder / "src"), str(self.folder)])}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER], cwd=self.folder, env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def write(self, name: str, content: str) -> None:
        """Change a file of the copy."""
        path = self.folder / name
        path.write_text(content, encoding="utf-8")
        self.times += 1
        os.utime(path, (self.times, self.times))

    def run(self, tests: tuple[str, ...], seconds: float) -> Verdict:
        """Run tests until the first fails; one that outlasts the seconds hangs, which is noticed too.

        What ends otherwise, before a test or in the middle of one, is run again: the machine may have been the reason.
        """
        verdict, code = self._run(tests, seconds)
        assert code != pytest.ExitCode.USAGE_ERROR, f"{tests} are not there: {self.log.read_text()}"
        return verdict if code in SAID else self._run(tests, seconds)[0]

    def _run(self, tests: tuple[str, ...], seconds: float) -> tuple[Verdict, int]:
        assert self.server.stdin is not None
        arguments = ["-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-rfE", "--tb=no", *tests]
        self.server.stdin.write(json.dumps([arguments, str(self.log)]) + "\n")
        self.server.stdin.flush()
        began = time.monotonic()
        group = int(self._answer())
        alarm = threading.Timer(seconds, _end, [group])
        alarm.start()
        code = int(self._answer())
        alarm.cancel()
        _end(group)
        found = OUTPUT.search(self.log.read_text(errors="replace"))
        by = found[1] if found else "it hangs" if code == -signal.SIGKILL else f"exit code {code}"
        return Verdict(code != 0, by, time.monotonic() - began), code

    def close(self) -> None:
        """End the server."""
        self.server.communicate("")

    def _answer(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline().strip()
        assert line, "the server ended"
        return line


def _end(group: int) -> None:
    """Kill the fork and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
