"""Judge the reports and measurements of all ranks: findings that name the ranks and hosts that differ.

Pure functions of what was gathered: no rank is asked here, so every rank comes to the same findings.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from amfm.launch.doctor.links import Link, Skew, group_by_host
from amfm.launch.doctor.machine import MIN_FREE_GIB, Finding
from amfm.launch.doctor.rank import RankReport

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
