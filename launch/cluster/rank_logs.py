"""Log files of ranks, one per rank: rank 0's is shown while the ranks run, and the last words of a failed one name the
cause.

Ray's actors and Slurm's srun both write them to `run.dir/logs/attempt-A/rank-R.log`, which all nodes share. Files are
appended to: a job that is queued again counts its attempts from 0. So what stood there before an attempt is left out.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

SHOWN_LINES = 200
MESSAGE = "amfm: "
CONTROL_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\^_])")


def rank_log(run_dir: str, attempt: int, rank: int | str) -> Path:
    """Where a rank's output of an attempt goes; `rank` may be a placeholder of Slurm's."""
    return Path(run_dir, "logs", f"attempt-{attempt}", f"rank-{rank}.log")


class Follower:
    """Copies what is appended to a file to standard error, to show rank 0's log."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, path.stat().st_size if path.exists() else 0

    def show(self) -> None:
        """Copy what was appended since the last call."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.offset)
                text = file.read()
            self.offset += len(text)
            sys.stderr.write(text.decode(errors="replace"))
            sys.stderr.flush()


def last_words(log: Path, code: int, *, start: int = 0) -> str:
    """Last words of a failed rank: amfm's first message, else its last line, else the signal that killed it.

    `start`: bytes of the file that are of an earlier attempt.
    """
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    message = first_message(log, start=start)
    lines = [line for line in read_lines(log, start) if is_telling(line)]
    return message or (lines[-1] if lines else f"exit code {code}")


def first_message(log: Path, *, start: int = 0) -> str:
    """amfm's first message among the last lines of a log, empty where there is none."""
    return next((text for line in read_lines(log, start) if (text := find_message(line))), "")


def find_message(line: str) -> str:
    """amfm's message in a line, which a terminal's control sequences or a launcher's own words may precede; else empty."""
    _, found, text = CONTROL_SEQUENCE.sub("", line).partition(MESSAGE)
    return found + text


def is_telling(line: str) -> bool:
    """Whether a line says anything: torchrun's reports end with a rule, a panel with its border."""
    return any(letter.isalnum() for letter in CONTROL_SEQUENCE.sub("", line))


def read_lines(log: Path, start: int) -> Sequence[str]:
    """The last lines of a log after its first `start` bytes; none where there is no file."""
    if not log.exists():
        return ()
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()[-SHOWN_LINES:]
