"""Where the steps of a start come from: hosts, job, code, versions and configuration, as its event `start` records them.

The configuration is kept too, under its digest: config.yaml is that of the newest start alone, and checkpoints, which carry
theirs, are pruned.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from amfm.data_pipeline.durable.files import make_folders, write_file_atomically
from amfm.pretrain.checkpoint.compatibility import digest_config
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.parallel import describe_environment
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.run import Run
from amfm.pretrain.versions import OWN_CODE, collect_versions

FOLDER = "starts"  # of configurations, below the run directory
JOB = (
    *("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"),
    *("TORCHELASTIC_RUN_ID", "RAY_JOB_ID", "JOBSET_NAME", "PBS_JOBID", "LSB_JOBID"),
)


def gather_hosts(ranks: RankGroup) -> dict[str, str]:
    """Ranks of each host, such as `0-7`, hosts in the order of their ranks. All ranks must call it."""
    own = {socket.gethostname(): [ranks.rank]}

    def join(known: dict[str, list[int]], more: dict[str, list[int]]) -> dict[str, list[int]]:
        return {host: [*known.get(host, []), *more.get(host, [])] for host in {**known, **more}}

    found = {host: sorted(members) for host, members in ranks.merge(own, join).items()}
    return {host: in_ranges(found[host]) for host in sorted(found, key=lambda host: found[host][0])}


def in_ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: 0, 1, 2, 5 as `0-2,5`."""
    ends = [place for place, (one, other) in enumerate(pairwise(numbers), 1) if other != one + 1]
    parts = [numbers[begin:end] for begin, end in zip([0, *ends], [*ends, len(numbers)])]
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def describe_origin(run: Run) -> dict[str, Any]:
    """Keep the configuration of this start, and give what its event records of it, besides the hosts. Main rank only."""
    digest = digest_config(run.config)
    kept = run.directory / FOLDER / f"config-{digest[:12]}.yaml"
    make_folders(kept.parent)
    write_file_atomically(kept, resolved_yaml(run.config).encode())
    versions = collect_versions()
    return {
        "job": describe_environment(JOB),
        "code": versions.pop(OWN_CODE),
        "versions": versions,
        "config_sha256": digest,
        "config": f"{FOLDER}/{kept.name}",
    }
