"""Children that check kernels in Triton's interpreter, in forks in which PyTorch is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

from tests.helpers.processes.zygote import BARE, run_program

# Kernels interpret if this is set when they are made. Those of Triton's own library are there already: planted ones call none.
_CODE = """
import os, runpy
os.environ["TRITON_INTERPRET"] = "1"
runpy.run_module("MODULE", run_name="__main__", alter_sys=True)
"""


def run_forked(
    command: list[str], *, cwd: Path, env: Mapping[str, str] = os.environ, **_: object
) -> CompletedProcess[str]:
    """As `subprocess.run` of `[sys.executable, "-P", "-m", MODULE, SETTINGS]` with TRITON_INTERPRET=1."""
    module, settings = command[-2:]
    environment = {name: value for name, value in env.items() if name != "TRITON_INTERPRET"}  # the fork sets it
    words = [sys.executable, "-P", "-c", _CODE.replace("MODULE", module), settings]
    return run_program(words, env=environment, cwd=cwd, zygote=BARE)
