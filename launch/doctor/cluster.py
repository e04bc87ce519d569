"""Examine a cluster: every rank describes itself, all measure together, and all come to the same findings.

How it works: the order goes from what needs no measurement (versions, devices) over clocks and storage to what may hang
(links). Each step is announced on rank 0 first, so that a dead link is named by the last line printed before the
timeout. Every result is gathered to all ranks and judged by pure functions (`compare.py`), so that all ranks agree on
the exit code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from amfm.launch.doctor.compare import compare_reports, examine_all_reduce, examine_clocks, examine_links
from amfm.launch.doctor.links import gather, measure_all_reduce, measure_links, measure_skews
from amfm.launch.doctor.machine import Finding
from amfm.launch.doctor.rank import RankReport, describe_rank
from amfm.launch.doctor.storage import WAIT_SECONDS, examine_storage, run_storage_test
from amfm.pretrain.parallel import start_process_group

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
