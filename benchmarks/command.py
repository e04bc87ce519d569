"""A function as a separate program, with options, messages and exit codes as `amfm` has them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from amfm.launch.console import say
from amfm.pretrain.failures import describe, exit_code, is_bug


def main(function: Callable[..., None], package: str = "benchmarks") -> None:
    """Run a function with this process's arguments, and end with its exit code."""
    sys.exit(run(function, sys.argv[1:], package))


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
