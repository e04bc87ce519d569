"""The `amfm` command: its verbs, and how an error becomes one message and an exit code.

Exit codes: 0 done, 2 bad input, 3 the run failed and can be resumed, 4 a rank ended before a stage of another layout, 130 interrupted; a bug shows its traceback.
The verb that is called is imported (verbs.py), and heavy packages inside it, so that help and mistakes answer immediately.

Verbs and options of before under their present names: the old word is read, with one message that names the new one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.data_pipeline.terminal import LastingStream
from amfm.launch.console import UNUSED_LIBRARIES, print_json, say
from amfm.launch.verbs import Verbs, without_types_of_flags
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.failures import OwnCodeError, describe, exit_code, imports_in_words, is_bug, launches_in_words
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, INTERRUPTED, RUN_FAILED
from amfm.pretrain.packages import DISTRIBUTION, absent_extras_in_words

OLD_VERBS = {("corpus",): ("sample-data",), ("shrink",): ("compact",)}
OLD_OPTIONS = {
    "evaluate": {"--probe": "--synthetic"},
    "inspect": {"--keep": "--protect", "--release": "--unprotect"},
}
WITH_VALUE = "--plugins"  # of the options before a verb


def use_current_words(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with present names; says which ones were old."""
    words = list(arguments)
    first = next((at for at, word in enumerate(words) if is_verb(words, at)), len(words))
    for old, new in OLD_VERBS.items():
        if tuple(words[first : first + len(old)]) == old:
            words[first : first + len(old)] = new
            say(f"note: `amfm {' '.join(old)}` is called `amfm {' '.join(new)}` now; the old name still works")
    for old_option, option in OLD_OPTIONS.get(" ".join(words[first : first + 1]), {}).items():
        for at, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name == old_option:
                words[at] = option + equals + value
                say(f"note: {old_option} is called {option} now; the old name still works")
    return words


def is_verb(words: Sequence[str], at: int) -> bool:
    """Whether the word at a place is neither an option nor the value of one."""
    return not words[at].startswith("-") and (at == 0 or words[at - 1] != WITH_VALUE)


# Wrong options and arguments. Typer exports no name for this class: it has click inside in later releases, next to it
# before.
USAGE_ERROR: Any = typer.BadParameter.__base__
OLD_NAME = r"[\w.=]+ is called [\w.=]+ now; the old name is read"  # model/config/old_names.py, whose import is slower than help
FORMAT_WARNING = warnings.formatwarning
READING_VERBS = ("config", "plan")  # of which a configuration names no code that is run
REGISTERING = "amfm.model.config.registering"
RESUMABLE_VERBS = ("train", "convert", "prepare", "launch", "study")

app = typer.Typer(
    name="amfm",
    cls=Verbs,
    help="Pretrain hybrid Mamba2, attention and mixture-of-experts language models from one YAML file.",
    epilog="Example: amfm prepare configs/tiny_cpu.yaml, then amfm train configs/tiny_cpu.yaml train.stop_after_steps=20",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(asked: bool) -> None:
    """Typer callback: print `amfm VERSION` and exit; a checkout that was never installed has no number."""
    if not asked:
        return
    import importlib.metadata

    try:
        number = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        number = "(not installed)"
    typer.echo(f"amfm {number}")
    raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    traceback: bool = typer.Option(False, "--traceback", help="Show where in the program an error was raised."),
    plugins: Annotated[list[Path] | None, typer.Option(help="Import this folder, as `plugins` does.")] = None,
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=print_version, help="Print the version and exit."
    ),
) -> None:
    """Options of every verb; `--traceback` is read by `run`, which verbs get for the ranks that they start."""
    reads = context.invoked_subcommand in READING_VERBS or "--dry-run" in (context.obj or ())
    context.obj = run
    if plugins or reads or REGISTERING in sys.modules:
        from amfm.model.config.registering import load_folder, only_read

        only_read(reads)
        for folder in plugins or ():
            load_folder(folder)


def main() -> None:
    """Entry point of `amfm` and of `python -m amfm.launch`."""
    if sys.stderr is not None:
        sys.stderr = LastingStream(sys.stderr)
    sys.exit(run(sys.argv[1:]))


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as Python writes it, but one of ours as a line, which is not the reason of a failure."""
    if re.match(OLD_NAME, str(message)):
        return f"note: {message}\n"
    return FORMAT_WARNING(message, category, filename, lineno, line)


def quiet_libraries() -> None:
    """Leave out what libraries below us say at each start, of things that we do not use or cannot change."""
    warnings.filterwarnings("ignore", message=UNUSED_LIBRARIES)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Of a setting under its old name: once, in the words of a message of ours, by the first rank.
    warnings.filterwarnings("once" if os.environ.get("RANK", "0") == "0" else "ignore", message=OLD_NAME)
    warnings.formatwarning = format_warning
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # nvcc without a GPU, as on a login node


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; a bug's exception passes through."""
    quiet_libraries()
    arguments = use_current_words(arguments)
    as_json = "--json" in arguments
    try:
        # With --json, usage errors come back as exceptions, to be said as JSON too.
        command = without_types_of_flags(typer.main.get_command(app))
        with launches_in_words(), imports_in_words(), absent_extras_in_words():
            code = command(args=arguments, prog_name="amfm", standalone_mode=not as_json, obj=arguments)
        return code if isinstance(code, int) else DONE
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except typer.Abort:
        return INTERRUPTED
    except USAGE_ERROR as error:
        error.show()
        print_json(describe_as_json(error.format_message(), BAD_INPUT, error))
        return BAD_INPUT
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if is_bug(error) or "--traceback" in arguments:
            raise
        code = exit_code(error)
        if isinstance(error, OwnCodeError):
            code = show_own_code(error)
        say(f"amfm: {describe(error)}")
        if as_json:
            print_json(describe_as_json(describe(error), code, error))
        if isinstance(error, OwnCodeError):
            say(
                f"amfm: {arguments[0]} stopped in code of a package or of a mixer, shown above; the same command fails again"
            )
        elif code == RUN_FAILED:
            again = (
                "resume with the same command"
                if arguments[0] in RESUMABLE_VERBS and not {"--doctor", "--dry-run"} & set(arguments)
                else "the same command may be run again"
            )
            say(f"amfm: {arguments[0]} stopped; {again} (amfm --traceback {arguments[0]} ... shows where it failed)")
        return code


def show_own_code(error: OwnCodeError) -> int:
    """Show where in own code an error was raised; returns the exit code, of a wrong setting if no step was done."""
    from amfm.pretrain.hooks.own_code import first_cause

    cause = first_cause(error)
    traceback.print_exception(cause, chain=False)
    return BAD_INPUT if error.in_first_step else RUN_FAILED


def describe_as_json(message: str, code: int, error: BaseException) -> dict[str, Any]:
    """An error as JSON values: message, exit code, and each problem of a configuration with its place."""
    problems = error.problems if isinstance(error, ConfigError) else ()
    listed = [
        {
            "key": problem.key,
            "value": problem.value,
            "file": problem.origin and problem.origin.source,
            "line": problem.origin and (problem.origin.line or None),
            "rule": problem.rule,
            "remedy": problem.remedy,
        }
        for problem in problems
    ]
    return {"error": message, "exit_code": code} | ({"problems": listed} if listed else {})
