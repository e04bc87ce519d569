"""Runs the tests of `interpreter/` in Triton's interpreter: one process for each file, forked from one that has imported Triton.

A process either interprets Triton kernels or compiles them, decided when Triton is imported. Imports take longer than most
files, so one child imports for all of them what they import, at their top and when they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amfm.kernels.runtime.backend import INTERPRETED

FOLDER = Path(__file__).parent / "interpreter"
ROOT = Path(__file__).parents[2]

# Takes a file's name and options of pytest.
Interpreted = Callable[..., tuple[int, str]]

# Collects all files once; then for each line [arguments of pytest, log] a fork runs pytest, and the answer is its exit code.
SERVER = """
import contextlib, gc, importlib, json, os, sys
import pytest, torch

with contextlib.redirect_stdout(sys.stderr):
    if pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "", sys.argv[1]]):
        sys.exit("the tests cannot be collected; the reason is above")
# What PyTorch and Triton import when an operation's registration is tried, or a kernel first runs.
for name in ("torch._dynamo", "torch.testing._internal.optests", "torch.fx.experimental.validator"):
    importlib.import_module(name)
with contextlib.suppress(ImportError):  # of some versions of Triton
    import triton.compiler.code_generator
gc.collect()
gc.freeze()
for line in sys.stdin:
    arguments, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_interpreted(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Interpreted]:
    """Exit code and output of a file's tests with certain options in a fork that interprets."""
    log = tmp_path_factory.mktemp("interpreter") / "log"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SERVER, str(FOLDER)]
    collected = log.with_name("collected")
    with (
        collected.open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as server,
    ):
        assert server.stdin is not None and server.stdout is not None

        def run(file: str, *options: str) -> tuple[int, str]:
            log.write_text("")
            seeds = ["--seed-offset", str(pytestconfig.getoption("seed_offset"))]
            arguments = ["-x", "-p", "no:cacheprovider", *options, *seeds, str(FOLDER / file)]
            server.stdin.write(json.dumps([arguments, str(log)]) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            assert answer, f"the server ended:\n{collected.read_text()}"
            return int(answer), log.read_text()

        yield run


@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_triton_kernels_hold_in_the_interpreter(run_interpreted: Interpreted, file: str) -> None:
    code, output = run_interpreted(file, "-m", "not slow")
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
@pytest.mark.parametrize(
    "file", sorted(path.name for path in FOLDER.glob("test_*.py") if "pytest.mark.slow" in path.read_text())
)
def test_the_long_tests_of_kernels_hold_in_the_interpreter(run_interpreted: Interpreted, file: str) -> None:
    code, output = run_interpreted(file, "-m", "slow", "--twice")
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
@pytest.mark.parametrize(
    "file", sorted(path.name for path in FOLDER.glob("test_*.py") if "twice_bitwise" in path.read_text())
)
def test_every_case_has_the_same_bits_twice_in_the_interpreter(run_interpreted: Interpreted, file: str) -> None:
    code, output = run_interpreted(file, "-m", "not slow", "-k", "twice_bitwise", "--twice")
    assert code == 0, output
