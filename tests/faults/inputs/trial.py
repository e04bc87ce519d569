"""Command lines of `amfm` with bad input, each in a fork of its own: how it ended, in words, seconds and bytes.

Called as `python -m tests.faults.inputs.trial PLACE KIND...` with the sound files of sound_files.py; prints a JSON
line a kind. What is promised: exit code 0 or 2 (3 where a
checkpoint or store that amfm wrote is damaged), a message and no traceback, an end within seconds, no gigabytes, nothing left
of an output that was rejected, and no change of a file outside of the folder of the case.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amfm.launch import cli
from amfm.launch.verbs import VERBS, load_verb
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, INTERRUPTED

MAX_SECONDS = 60.0  # of the processor
MAX_WAITING_SECONDS = 3600.0
MAX_BYTES = 3 << 30
PRECIOUS = "precious"


@dataclass(frozen=True)
class Case:
    """One call: its words, in which HERE is the folder of the case, and what is put into that folder before."""

    name: str
    words: tuple[str, ...]
    make: Callable[[Path], Any] = lambda here: None
    out: str | None = None  # what must not be there where the call was rejected
    codes: tuple[int, ...] = (DONE, BAD_INPUT)


def attempt(case: Case, here: Path) -> None:
    """Be `amfm` with these words; ends the process."""
    null = os.open(os.devnull, os.O_RDONLY)
    said = os.open(here.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, stream in enumerate((null, said, said)):
        os.dup2(stream, number)
    code = 1
    try:
        os.chdir(here)
        code = cli.run([word.replace("HERE", str(here)) for word in case.words])
    except BaseException:  # noqa: BLE001 - whatever it is, it is what is looked for
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> tuple[int, float, int]:
    """Exit code (that of a signal negative), processor seconds and most bytes of a process, which is ended when it is late."""
    deadline = time.monotonic() + MAX_WAITING_SECONDS
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def judge(case: Case, here: Path, code: int, seconds: float, size: int) -> str:
    """What is wrong with an end; nothing if all is as promised."""
    said = here.with_suffix(".said").read_text(errors="replace")
    allowed = (*case.codes, INTERRUPTED) if case.words[0] == "init" else case.codes
    if "Traceback" in said:
        return "traceback"
    if code not in allowed:
        return f"wrong code {code}"
    if seconds > MAX_SECONDS or size > MAX_BYTES + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024:
        return f"{seconds:.0f} s, {size >> 20} MiB"
    if code == BAD_INPUT and not said.strip():
        return "no message"
    if (here.parent / PRECIOUS).read_text() != PRECIOUS:
        (here.parent / PRECIOUS).write_text(PRECIOUS)
        return "another file was written"
    if code == BAD_INPUT and case.out is not None and (here / case.out).exists():
        return "something is left of the output"
    return ""


def run(kind: str, cases: Iterable[Case], place: Path) -> dict[str, Any]:
    """Try all cases of a kind."""
    report: dict[str, Any] = {"kind": kind, "inputs": 0, "refused": 0, "accepted": 0, "tracebacks": 0, "wrong_codes": 0}
    report["broken"] = []
    (place / PRECIOUS).write_text(PRECIOUS)
    here = place / "case"
    for case in cases:
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        case.make(here)
        pid = os.fork()
        if pid == 0:
            attempt(case, here)
        code, seconds, size = wait(pid)
        report["inputs"] += 1
        report["accepted" if code == DONE else "refused"] += 1
        if wrong := judge(case, here, code, seconds, size):
            report["tracebacks"] += wrong == "traceback"
            report["wrong_codes"] += wrong.startswith("wrong code")
            said = here.with_suffix(".said").read_text(errors="replace")
            report["broken"].append(f"{case.name}: {wrong}: {said[-600:]}")
    shutil.rmtree(here)
    return report


def find_cases(kind: str, place: Path) -> Iterator[Case]:
    """The cases of a kind, `file.function`."""
    file, _, name = kind.partition(".")
    yield from getattr(importlib.import_module(f"tests.faults.inputs.{file}"), name)(place)


if __name__ == "__main__":
    for verb in VERBS:
        with suppress(ValueError):  # the package of a verb may not be installed
            load_verb(verb)
    for module in (
        "torch",
        "transformers",
        "amfm_foreign_states.adopt",
        "amfm.pretrain.export.import_huggingface",
    ):
        importlib.import_module(module)
    for kind in sys.argv[2:]:
        print(json.dumps(run(kind, find_cases(kind, Path(sys.argv[1])), Path(sys.argv[1]))), flush=True)
    os._exit(0)
