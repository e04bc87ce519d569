"""Lines for shells, ssh and sbatch, written in one place: every word quoted, what could become another line refused."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

# Names, addresses, USER@HOST; nothing that ssh would take for an option or a shell for more than a word.
HOST = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:@%\[\]-]*")


def plain(text: str, what: str) -> str:
    """The text itself. Raises ValueError when it has a newline or another control character."""
    if not text.isprintable():
        raise ValueError(f"{what}={text!r} must be one line without control characters; write it on one line")
    return text


def check_host(name: str, what: str) -> str:
    """The name of a host. Raises ValueError for what is none, above all for an option of ssh such as -oProxyCommand=."""
    if not HOST.fullmatch(name):
        raise ValueError(
            f"{what} names the host {name!r}, which must be a name or an address, without spaces or a leading -"
        )
    return name


def shell_line(steps: Sequence[Sequence[str] | str]) -> str:
    """Steps of one line, each only if the one before went well. Words are quoted; a string is a shell's text as it is."""
    return " && ".join(step if isinstance(step, str) else shlex.join(step) for step in steps)


def with_variables(variables: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """A command with more environment variables."""
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *command] if variables else list(command)


def remote_command(remote_shell: Sequence[str], host: str, line: str) -> list[str]:
    """What runs a line on a host."""
    return [*remote_shell, check_host(host, "--hosts"), line]


def sbatch_directive(option: str, value: object, what: str) -> str:
    """`#SBATCH --OPTION=VALUE`, the value quoted as sbatch reads quotes."""
    return f"#SBATCH --{option}={shlex.quote(plain(str(value), what))}"


def sbatch_extra(text: str) -> str:
    """A further option as the user wrote it. Raises ValueError when it is none, or would begin another line."""
    if not plain(text, "launch.slurm.extra").startswith("-"):
        raise ValueError(
            f"launch.slurm.extra={text!r} must be an option of sbatch; begin it with -- such as --constraint=h100"
        )
    return f"#SBATCH {text}"
