"""Examine a cluster: every rank describes itself, all measure together, and all come to the same findings.

How it works: the order goes from what needs no measurement (versions, devices) over clocks and storage to what may hang
(links). Each step is announced on rank 0 first, so that a dead link is named by the last line printed before the
timeout. Every result is gathered to all ranks and judged by pure functions (`compare.py`), so that all ranks agree on
the exit code.

Test whether a folder is the same on every rank: files are written on one side and looked for on the other.

How it works: rank 0 writes a file that all others look for, then each of them writes one that rank 0 looks for.
Contents derive from a random token of this test, so that files of an earlier one cannot pass for it, and readers poll,
because network file systems show a new file late. Both directions are needed: a folder that only rank 0 can write is
not enough for sharded checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from amfm.launch.doctor.compare import compare_reports, examine_all_reduce, examine_clocks, examine_links, name_ranks
from amfm.launch.doctor.links import gather, measure_all_reduce, measure_links, measure_skews
from amfm.launch.doctor.machine import MIN_FREE_GIB, Finding
from amfm.launch.doctor.rank import RankReport, describe_rank, free_gib
from amfm.pretrain.parallel import start_process_group

WAIT_SECONDS = 10.0  # for a file to become visible
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class StorageTest:
    """Outcome of the test; each table maps a rank that failed its part to the reason.

    `unwritten`: could not write its own file; `unseen_by`: does not see rank 0's; `unseen_from`: rank 0 does not see
    its. `slowest_seconds`: longest wait for a file that did appear.
    """

    unwritten: dict[int, str]
    unseen_by: dict[int, str]
    unseen_from: dict[int, str]
    slowest_seconds: float
    free_gib: float


def run_storage_test(folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> StorageTest:
    """Test a folder from all ranks; returns the same result on every rank. Every rank must call this.

    Rank 0 makes the folder when it is missing. All files are removed at the end.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    token: str = gather(secrets.token_hex(8))[0]
    files = {number: folder / f".amfm-doctor-{token}-{number}" for number in range(num_ranks)}
    contents = {number: hashlib.sha512(f"{token} {number}".encode()).digest() * 64 for number in files}
    try:
        # Gathers order the phases: no one looks before the writer is done, and every rank learns every reason.
        reasons = gather(write_file(files[0], contents[0], make_folder=True) if rank == 0 else None)
        if reasons[0] is not None:
            return StorageTest({0: reasons[0]}, {}, {}, 0.0, 0.0)
        room: float = gather(free_gib(folder) if rank == 0 else None)[0]
        looks = gather(wait_for_files({0: files[0]}, contents, wait_seconds)[0] if rank else (None, 0.0))
        unseen_by = {number: why for number, (why, _) in enumerate(looks) if why is not None}
        reasons = gather(write_file(files[rank], contents[rank]) if rank else None)
        unwritten = {number: why for number, why in enumerate(reasons) if why is not None}
        expected = {number: path for number, path in files.items() if number not in {0, *unwritten}}
        seen: dict[int, tuple[str | None, float]] = gather(
            wait_for_files(expected, contents, wait_seconds) if rank == 0 else None
        )[0]
        unseen_from = {number: why for number, (why, _) in seen.items() if why is not None}
        slowest = max([seconds for why, seconds in (*looks, *seen.values()) if why is None], default=0.0)
        return StorageTest(unwritten, unseen_by, unseen_from, slowest, room)
    finally:
        # What cannot be removed could not be written, and that is found already.
        with suppress(OSError):
            files[rank].unlink()


def write_file(path: Path, content: bytes, *, make_folder: bool = False) -> str | None:
    """Write a file and sync it to the disk; returns why that failed, None when it is written."""
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


def wait_for_files(
    files: Mapping[int, Path], contents: Mapping[int, bytes], wait_seconds: float
) -> dict[int, tuple[str | None, float]]:
    """Poll for files until all are seen with their content or `wait_seconds` are over.

    Returns by writer why its file was not seen, None when it was, and after how many seconds.
    """
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
    """Why a file cannot be read with this content, None when it can."""
    try:
        return None if path.read_bytes() == content else "other bytes"
    except OSError as error:
        return error.strerror or str(error)


def examine_storage(folder: Path, test: StorageTest, hosts: Sequence[str]) -> Finding:
    """Finding of a test: the first thing that is wrong, else the free space."""
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
        return Finding("shared storage", "warn", found, "free space, or set run.dir to a larger disk")
    return Finding("shared storage", "ok", found)


TIMEOUT_SECONDS = 300.0  # the ranks of a large cluster import from shared storage at the same time


def examine_cluster(
    shared: Path | None, *, report: Callable[[str], None], wait_seconds: float = WAIT_SECONDS
) -> list[Finding]:
    """Examine all ranks and hosts of this process group; returns the same findings on every rank.

    Every rank must call this; it communicates by gathers, an all-reduce and sends between pairs. `shared`: the folder
    that all hosts should see, None to leave it out. `report` hears what is done next, on rank 0: where a link is dead,
    these are the last words before the group's timeout ends the ranks.
    """
    rank, num_ranks, local_rank, _ = start_process_group(TIMEOUT_SECONDS)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def say_next(text: str) -> None:
        if rank == 0:
            report(f"amfm doctor: {text}")

    say_next(f"{num_ranks} ranks are here; comparing what they have")
    reports: list[RankReport] = gather(describe_rank(rank))
    hosts = [item.host for item in reports]
    findings = compare_reports(reports)
    say_next("comparing clocks")
    findings.append(examine_clocks(measure_skews(hosts)))
    if shared is None:
        remedy = "name the folder that all hosts should see: --shared DIR"
        findings.append(Finding("shared storage", "warn", "not examined", remedy))
    else:
        say_next(f"writing to {shared}")
        findings.append(examine_storage(shared, run_storage_test(shared, wait_seconds=wait_seconds), hosts))
    if num_ranks > 1:
        say_next("measuring an all-reduce over all ranks")
        findings.append(examine_all_reduce(measure_all_reduce(device), num_ranks))
        say_next("measuring links")
        findings += examine_links(measure_links(hosts, device), hosts)
    return findings


def leave_cluster() -> None:
    """Destroy the process group. Every rank must call this."""
    torch.distributed.destroy_process_group()
