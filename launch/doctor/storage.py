"""Whether a folder is one and the same on every rank: files are written and looked for."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.doctor.compare import name_ranks
from launch.doctor.links import gather
from launch.doctor.machine import MIN_FREE_GIB, Finding
from launch.doctor.rank import free_gib

WAIT_SECONDS = 10.0  # for a file to become visible
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class StorageTest:
    """What came of it; the three tables hold a reason for each rank that could not do its part.

    `unwritten`: could not write its own file; `unseen_by`: does not see rank 0's; `unseen_from`: rank 0 does not see its.
    """

    unwritten: dict[int, str]
    unseen_by: dict[int, str]
    unseen_from: dict[int, str]
    slowest_seconds: float
    free_gib: float


def run_storage_test(folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> StorageTest:
    """Rank 0 writes a file that the others look for, then each of them one that rank 0 looks for; all are removed.

    Rank 0 makes the folder when it is missing. The same on every rank; every rank must call this.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    token: str = gather(secrets.token_hex(8))[0]
    files = {number: folder / f".amfm-doctor-{token}-{number}" for number in range(num_ranks)}
    contents = {number: hashlib.sha512(f"{token} {number}".encode()).digest() * 64 for number in files}
    try:
        reasons = gather(write_file(files[0], contents[0], make_folder=True) if rank == 0 else None)
        if reasons[0] is not None:
            return StorageTest({0: reasons[0]}, {}, {}, 0.0, 0.0)
        room: float = gather(free_gib(folder) if rank == 0 else None)[0]
        looks = gather(look_for({0: files[0]}, contents, wait_seconds)[0] if rank else (None, 0.0))
        unseen_by = {number: why for number, (why, _) in enumerate(looks) if why is not None}
        reasons = gather(write_file(files[rank], contents[rank]) if rank else None)
        unwritten = {number: why for number, why in enumerate(reasons) if why is not None}
        expected = {number: path for number, path in files.items() if number not in {0, *unwritten}}
        seen: dict[int, tuple[str | None, float]] = gather(
            look_for(expected, contents, wait_seconds) if rank == 0 else None
        )[0]
        unseen_from = {number: why for number, (why, _) in seen.items() if why is not None}
        slowest = max([seconds for why, seconds in (*looks, *seen.values()) if why is None], default=0.0)
        return StorageTest(unwritten, unseen_by, unseen_from, slowest, room)
    finally:
        # What cannot be removed could not be written, and that is found already.
        with suppress(OSError):
            files[rank].unlink()


def write_file(path: Path, content: bytes, *, make_folder: bool = False) -> str | None:
    """Write a file down to the disk; returns why it failed, none when it is written."""
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def look_for(
    files: Mapping[int, Path], contents: Mapping[int, bytes], wait_seconds: float
) -> dict[int, tuple[str | None, float]]:
    """For each file, by its writer: why it was not seen with its content, none when it was, and after how long."""
    start = time.monotonic()
    results: dict[int, tuple[str | None, float]] = {}
    while True:
        for rank, path in files.items():
            if rank not in results or results[rank][0] is not None:
                results[rank] = (reason_unseen(path, contents[rank]), time.monotonic() - start)
        if all(why is None for why, _ in results.values()) or time.monotonic() - start > wait_seconds:
            return results
        time.sleep(POLL_SECONDS)


def reason_unseen(path: Path, content: bytes) -> str | None:
    """Why a file is not there with its content, none when it is."""
    try:
        return None if path.read_bytes() == content else "other bytes"
    except OSError as error:
        return error.strerror or str(error)


def examine_storage(folder: Path, test: StorageTest, hosts: Sequence[str]) -> Finding:
    """The outcome in one line: the first thing that is wrong, or the room that is free."""
    wrong = [
        ("cannot be written by", test.unwritten),
        ("what rank 0 writes is not seen by", test.unseen_by),
        ("rank 0 does not see what is written by", test.unseen_from),
    ]
    for what, ranks in wrong:
        if ranks:
            why = ", ".join(dict.fromkeys(ranks.values()))
            remedy = "name a folder that every host mounts and may write: run.dir, or --shared DIR"
            found = f"{folder}: {what} {name_ranks(list(ranks), hosts)}: {why}"
            return Finding("shared storage", "fail", found, remedy)
    found = f"{folder}: seen by all after at most {test.slowest_seconds:.2f} s, {test.free_gib:.1f} GiB free"
    if test.free_gib < MIN_FREE_GIB:
        return Finding("shared storage", "warn", found, "make room, or set run.dir to a larger disk")
    return Finding("shared storage", "ok", found)
