"""A function as a separate program, with options, messages and exit codes as `amfm` has them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import typer

from amfm.launch.console import say
from amfm.pretrain.failures import describe, exit_code, is_bug


def main(function: Callable[..., None], package: str = "benchmarks") -> None:
    """Run a function with this process's arguments, say where and when it ran, and end with its exit code."""
    code = run(function, sys.argv[1:], package)
    if code == 0 and not {"--help", "--json"} & set(sys.argv):
        say(describe_run())
    sys.exit(code)


def describe_run(checkout: Path = Path(__file__).parents[1]) -> str:
    """The line that stands above a table: the commit (`+` with changes that are not committed), date, host and PyTorch."""
    import torch

    from amfm.pretrain.monitor.environment import read_processor_name
    from amfm.pretrain.parallel import count_cores

    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    name = f"{commit.stdout.strip() or 'unknown'}{'+' if changes.stdout else ''}"
    host = f"{count_cores()} threads of {read_processor_name()}"
    return f"commit {name}, {date.today():%Y-%m-%d}, {host}, PyTorch {torch.__version__}"


def run(function: Callable[..., None], arguments: Sequence[str], package: str = "benchmarks") -> int:
    """Run a function with arguments of a command line and return the exit code; a bug's exception passes through."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(function)
    command: Any = typer.main.get_command(application)
    try:
        command(args=list(arguments), prog_name=f"python -m {package}.{function.__name__}")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (ValueError, RuntimeError, OSError) as error:
        if is_bug(error):
            raise
        say(f"{function.__name__}: {describe(error)}")
        return exit_code(error)
    return 0
