"""Examine a cluster: every rank describes itself, all measure together, and all come to the same findings.

Findings name the ranks and hosts that differ.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from amfm.launch.doctor.machine import MIN_FREE_GIB, Finding
from amfm.launch.doctor.rank import (
    Link,
    RankReport,
    Skew,
    describe_rank,
    free_gib,
    gather,
    group_by_host,
    measure_all_reduce,
    measure_links,
    measure_skews,
)
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


SLOW_LINK = 0.5  # of the median of its kind
MAX_SKEW_SECONDS = 1.0
SHOWN = 4  # hosts or links of a finding that are named; the others are counted


def compare_reports(reports: Sequence[RankReport]) -> list[Finding]:
    """Findings that need no measurement between ranks; `reports` are in rank order."""
    hosts = [report.host for report in reports]
    findings = [
        compare_values(
            name,
            [report.versions[name] for report in reports],
            hosts,
            remedy="one environment and one checkout on every host, or one that they share (launch.setup)",
            # Ranks of two patch levels of Python work; anything else differs in numbers or in what goes over the wire.
            status="warn" if name == "python" else "fail",
        )
        for name in reports[0].versions
    ]
    findings.append(
        compare_values(
            "devices",
            [report.device for report in reports],
            hosts,
            remedy="the slowest and smallest device sets the pace and the memory: leave its host out",
            status="warn",
        )
    )
    shared_gpus = compare_gpus(reports)
    return [
        *findings,
        *([shared_gpus] if shared_gpus else []),
        *merge_host_findings(reports),
        compare_caches(reports),
        compare_disks(reports),
    ]


def compare_values(
    name: str, values: Sequence[str], hosts: Sequence[str], *, remedy: str, status: Literal["warn", "fail"]
) -> Finding:
    """Whether all ranks report the same value; ranks that differ from most are named with their hosts."""
    usual, count = Counter(values).most_common(1)[0]
    if count == len(values):
        return Finding(name, "ok", usual)
    others = [
        f"{value} on {name_ranks([rank for rank, own in enumerate(values) if own == value], hosts)}"
        for value in dict.fromkeys(values)
        if value != usual
    ]
    return Finding(name, status, f"{usual} on {count} of {len(values)} ranks; {shorten(others)}", remedy)


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks in words, grouped by host."""
    named: dict[str, list[str]] = {}
    for rank in ranks:
        named.setdefault(hosts[rank], []).append(str(rank))
    return shorten([f"{host} ({'ranks' if own[1:] else 'rank'} {', '.join(own)})" for host, own in named.items()])


def shorten(items: Sequence[str]) -> str:
    """The first `SHOWN` items, and how many more there are."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def compare_gpus(reports: Sequence[RankReport]) -> Finding | None:
    """The UUIDs of all GPUs by host, a failure when several ranks share one; None on CPU."""
    named: dict[str, list[str]] = {}
    for report in reports:
        if report.device_id is not None:
            named.setdefault(report.host, []).append(f"rank {report.rank} {report.device_id}")
    if not named:
        return None
    gpus = Counter(report.device_id for report in reports if report.device_id is not None)
    twice = [report.rank for report in reports if report.device_id is not None and gpus[report.device_id] > 1]
    every = shorten([f"{host}: {', '.join(gpus)}" for host, gpus in named.items()])
    if not twice:
        return Finding("cards", "ok", f"one for each rank; {every}")
    found = f"one GPU for several ranks: {name_ranks(twice, [report.host for report in reports])}; {every}"
    remedy = "no more ranks per node than it has GPUs (--nproc-per-node), and one GPU for each task where tasks see one"
    return Finding("cards", "fail", found, remedy)


def merge_host_findings(reports: Sequence[RankReport]) -> list[Finding]:
    """Findings of hosts about themselves, one for all hosts that find the same."""
    hosts: dict[Finding, list[str]] = {}
    for report in first_reports(reports):
        for finding in report.findings:
            hosts.setdefault(finding, []).append(report.host)
    return [Finding(item.name, item.status, f"{shorten(on)}: {item.found}", item.remedy) for item, on in hosts.items()]


def first_reports(reports: Sequence[RankReport]) -> list[RankReport]:
    """Report of the first rank of each host, for what ranks of a host have in common."""
    return [reports[ranks[0]] for ranks in group_by_host([report.host for report in reports]).values()]


def compare_caches(reports: Sequence[RankReport]) -> Finding:
    """Whether each host's Triton cache is writable and on its own disk.

    A cache on a network file system is shared by hosts, which then compile into the same files: a warning.
    """
    own = first_reports(reports)
    broken = [f"{report.host}: {report.cache.problem}" for report in own if report.cache.problem]
    if broken:
        remedy = "make it writable, or TRITON_CACHE_DIR=FOLDER in launch.setup"
        on_gpus = any(report.device_id is not None for report in own if report.cache.problem)
        return Finding("triton cache", "fail" if on_gpus else "warn", shorten(broken), remedy)
    remote = [f"{report.host}: {report.cache.path} on {report.cache.file_system}" for report in own]
    remote = [text for text, report in zip(remote, own) if report.cache.is_on_network()]
    if remote:
        remedy = "a folder on each host's own disk, such as TRITON_CACHE_DIR=/tmp/triton in launch.setup"
        return Finding("triton cache", "warn", shorten(remote), remedy)
    return Finding("triton cache", "ok", shorten(list(dict.fromkeys(report.cache.path for report in own))))


def compare_disks(reports: Sequence[RankReport]) -> Finding:
    """Free space of each host's own folders, the smallest against `MIN_FREE_GIB`."""
    room = [
        (free, f"{report.host}: {free:.1f} GiB for {what}")
        for report in first_reports(reports)
        for what, free in report.free_gib.items()
    ]
    short = [text for free, text in room if free < MIN_FREE_GIB]
    if short:
        return Finding("disk", "warn", shorten(short), "free space, or TMPDIR=FOLDER on a larger disk in launch.setup")
    return Finding("disk", "ok", f"at least {min(room)[0]:.1f} GiB free on every host")


def examine_all_reduce(gigabytes_per_second: float, num_ranks: int) -> Finding:
    """Report the bus bandwidth of an all-reduce over all ranks.

    Never a warning: what is a good rate depends on the network.
    """
    return Finding("all-reduce", "ok", f"{gigabytes_per_second:.2f} GB/s by each of {num_ranks} ranks")


def examine_links(links: Sequence[Link], hosts: Sequence[str]) -> list[Finding]:
    """Judge each kind of link by its own median, and warn of links below `SLOW_LINK` of it."""
    findings = []
    for kind in dict.fromkeys(link.kind for link in links):
        own = sorted((link for link in links if link.kind == kind), key=lambda link: link.gigabytes_per_second)
        median = statistics.median(link.gigabytes_per_second for link in own)
        texts = [
            f"{link.gigabytes_per_second:.2f} GB/s between {name_ranks([link.first], hosts)} and "
            f"{name_ranks([link.second], hosts)}"
            for link in own
        ]
        slow = [text for text, link in zip(texts, own) if link.gigabytes_per_second < SLOW_LINK * median]
        found = f"{len(own)} link(s), median {median:.2f} GB/s each way"
        if slow:
            remedy = (
                "look at the GPU or cable that these links share (nvidia-smi topo -m, ibstat), or leave the host out"
            )
            findings.append(Finding(f"links {kind}", "warn", f"{found}; {shorten(slow)}", remedy))
        else:
            findings.append(Finding(f"links {kind}", "ok", f"{found}; slowest {texts[0]}"))
    return findings


def examine_clocks(skews: Mapping[str, Skew]) -> Finding:
    """Warn of hosts whose clock is, or within its error may be, too far from the median host's."""
    middle = statistics.median_low(skew.seconds for skew in skews.values())
    leads = {host: Skew(skew.seconds - middle, skew.error) for host, skew in skews.items()}
    far = [
        f"{host}: {lead.seconds:+.3f} s (give or take {lead.error:.3f})"
        for host, lead in leads.items()
        if abs(lead.seconds) + lead.error > MAX_SKEW_SECONDS
    ]
    if far:
        remedy = "start chronyd or systemd-timesyncd there; logs and heartbeats are compared by time"
        return Finding("clocks", "warn", f"off the middle of the hosts: {shorten(far)}", remedy)
    spread = max(abs(lead.seconds) for lead in leads.values())
    error = max(lead.error for lead in leads.values())
    return Finding("clocks", "ok", f"{len(leads)} host(s) within {spread:.3f} s (give or take {error:.4f})")
