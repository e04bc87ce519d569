"""Command lines for shells, ssh and sbatch: every word quoted, text that could start another line rejected.

How it works: host names, settings and paths reach a shell on another machine or an sbatch header, where a space,
newline or leading dash would change the meaning. All such text passes here: words are quoted for the shell, hosts must
match a narrow pattern, directives must be printable and one line. Only `launch.setup` is a shell's text as the user
wrote it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Names, addresses, USER@HOST; nothing that ssh would take for an option or a shell for more than a word.
HOST = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:@%\[\]-]*")


def plain(text: str, what: str) -> str:
    """Return the text unchanged. Raises ValueError if it holds a newline or another control character."""
    if not text.isprintable():
        raise ValueError(f"{what}={text!r} must be one line without control characters; write it on one line")
    return text


def check_host(name: str, what: str) -> str:
    """Return the host name unchanged. Raises ValueError for anything else, such as the ssh option -oProxyCommand=."""
    if not HOST.fullmatch(name):
        raise ValueError(
            f"{what} names the host {name!r}, which must be a name or an address, without spaces or a leading -"
        )
    return name


def shell_line(steps: Sequence[Sequence[str] | str]) -> str:
    """Join steps with `&&`, so that each runs only if the one before succeeded.

    A sequence of words is quoted; a string is shell text and stays as it is.
    """
    return " && ".join(step if isinstance(step, str) else shlex.join(step) for step in steps)


def check_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return `launch.environment` unchanged. Raises ValueError for a name or a value that a shell would take apart."""
    for name, value in variables.items():
        if not VARIABLE.fullmatch(name):
            raise ValueError(
                f"launch.environment names {name!r}, and a variable has letters, digits and _ only; rename it"
            )
        plain(value, f"launch.environment.{name}")
    return dict(variables)


def with_variables(variables: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """Prefix a command with `env NAME=VALUE`, if there are variables."""
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *command] if variables else list(command)


def remote_command(remote_shell: Sequence[str], host: str, line: str) -> list[str]:
    """Command that runs `line` on a host through the remote shell. Raises ValueError for a name that is not a host."""
    return [*remote_shell, check_host(host, "--hosts"), line]


def sbatch_directive(option: str, value: object, what: str) -> str:
    """`#SBATCH --OPTION=VALUE`, the value quoted as sbatch reads quotes. Raises ValueError for control characters."""
    return f"#SBATCH --{option}={shlex.quote(plain(str(value), what))}"


def sbatch_extra(text: str) -> str:
    """An sbatch option as the user wrote it. Raises ValueError if it is none or would begin another line."""
    if not plain(text, "launch.slurm.extra").startswith("-"):
        raise ValueError(
            f"launch.slurm.extra={text!r} must be an option of sbatch; begin it with -- such as --constraint=h100"
        )
    return f"#SBATCH {text}"
