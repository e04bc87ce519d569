"""Log files of nodes, one per node and attempt, in which each line has the number of its rank in front: `37: text`.

Ray's actors write them to `run.dir/logs/attempt-A/node-N.log`, and Slurm's srun to the same in a folder `job-J`, as two jobs of
a run may overlap; N counts the nodes of the attempt from 0. A file per rank would be thousands in one folder. Rank 0's lines are
shown while the ranks run, and the last words of a failed one name the cause. Files are appended to, so what was there
before an attempt is not read.

What srun says while it runs an attempt: of its ranks, and of itself.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

SHOWN_LINES = 2000  # of a node: at a hang each of its ranks dumps its stacks
MESSAGE = "amfm: "
CONTROL_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\^_])")
LABEL = re.compile(r" *(\d+): ?(.*)")  # srun aligns the numbers


def node_log(run_dir: str, attempt: int, node: int | str, *, job: str | None = None) -> Path:
    """Where the output of a node's ranks in an attempt goes, in a folder of the job; `node` may be a placeholder of Slurm's."""
    return Path(run_dir, "logs", *([] if job is None else [f"job-{job}"]), f"attempt-{attempt}", f"node-{node}.log")


def copy_labelled(rank: int, stream: IO[bytes], log: IO[bytes]) -> None:
    """Append a rank's output to its node's log line by line, as srun does with --label, until the stream ends."""
    for line in stream:
        log.write(b"%d: %s\n" % (rank, line.rstrip(b"\n")))


class Follower:
    """Copies rank 0's lines that are appended to its node's log to standard error."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, path.stat().st_size if path.exists() else 0

    def show(self) -> None:
        """Copy what was appended since the last call, in whole lines."""
        with suppress(OSError):  # not there yet, or its storage is away: what is missing comes later
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read()
            content = content[: content.rfind(b"\n") + 1]
            self.offset += len(content)
            for line in lines_of(content.decode(errors="replace").split("\n"), rank=0):
                sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def last_words(log: Path, code: int, *, rank: int | None = None) -> str:
    """Last words of a failed process: amfm's first message, else its last line, else the signal that killed it.

    `rank`: in a node's log, whose lines; None for a log of only one process.
    """
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    message = first_message(log, rank=rank)
    lines = [line for line in read_lines(log, 0, rank) if is_telling(line)]
    return message or (lines[-1] if lines else f"exit code {code}")


def first_message(log: Path, *, rank: int | None = None, start: int = 0) -> str:
    """amfm's first message among the last lines of a log (of one rank, if given), empty if there is none.

    `start`: bytes of the file that are of an earlier attempt.
    """
    return next((text for line in read_lines(log, start, rank) if (text := find_message(line))), "")


def find_message(line: str) -> str:
    """amfm's message in a line, which a terminal's control sequences or a launcher's own words may precede; else empty."""
    _, found, text = CONTROL_SEQUENCE.sub("", line).partition(MESSAGE)
    return found + text


def is_telling(line: str) -> bool:
    """Whether a line says anything: torchrun's reports end with a rule, a panel with its border."""
    return any(letter.isalnum() for letter in CONTROL_SEQUENCE.sub("", line))


def read_lines(log: Path, start: int, rank: int | None) -> Sequence[str]:
    """The last lines of a log (of one rank, if given) after its first `start` bytes; none if there is no file."""
    if not log.exists():
        return ()
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")[-SHOWN_LINES:]
    return lines if rank is None else lines_of(lines, rank=rank)


def lines_of(lines: Sequence[str], *, rank: int) -> list[str]:
    """The lines of a node's log that this rank wrote, without the rank's number."""
    found = (LABEL.fullmatch(line) for line in lines)
    return [match[2] for match in found if match is not None and int(match[1]) == rank]


SIGNALLED = signal.strsignal(signal.SIGUSR1) or "User defined signal 1"
NO_STEP = "Unable to create step"
FAILED_TASK = re.compile(r"srun: error: .*\btasks? (\d+)")


class SrunOutput:
    """What srun itself says, copied to standard error: amfm's first message in it, its first error, and the task it names."""

    def __init__(self) -> None:
        self.message = self.error = ""
        self.failed_task: int | None = None

    def follow(self, stream: IO[bytes]) -> None:
        """Copy lines until srun closes its output."""
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n")
            self.message = self.message or find_message(line)
            if line.startswith("srun: error"):
                self.error = self.error or line
                found = FAILED_TASK.match(line)
                if found and self.failed_task is None:
                    self.failed_task = int(found[1])
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
