"""What a run is made of, in one record: settings, store, tokenizer, our own code, and versions of libraries.

All ranks compare it at the start: ranks that were started by hand or by a scheduler with other settings, another store
or another checkout would train together without a word. Every checkpoint carries it (`config`, `identities`,
`versions`), and a start that continues from one says what changed.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping, Sequence

import torch.distributed

from amfm.pretrain.config.fields import flatten_settings
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.versions import collect_versions

SHOWN_RANKS = 4


def describe_start(config: RunConfig) -> dict[str, str]:
    """Build the part of the record known before any data is open: versions and code, then settings by dotted name."""
    settings = flatten_settings(config.model_dump(mode="json"))
    return collect_versions() | {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}


def require_same_on_all_ranks(record: Mapping[str, str]) -> None:
    """Compare this rank's record with those of all others. Every rank must call this, in the default process group.

    Digests are compared first, so that many ranks exchange little. Raises ValueError on every rank, naming the ranks
    and hosts that differ from most and the first entry in which they do.
    """
    world_size = torch.distributed.get_world_size()
    if world_size == 1:
        return
    ranks = RankGroup(torch.distributed.get_rank(), world_size)
    digest = hashlib.sha256(json.dumps(list(record.items())).encode()).hexdigest()
    if len(ranks.merge({digest}, set.union)) == 1:
        return
    # A record of each kind, and who has which.
    kinds = ranks.merge({digest: dict(record)}, lambda known, more: more | known)
    everyone = ranks.all_gather((socket.gethostname(), digest))
    raise ValueError(describe_difference([(host, kinds[digest]) for host, digest in everyone]))


def describe_difference(records: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Name the ranks that differ from most, and the first entry that is not the same everywhere.

    records: (host, record) by rank. The most frequent value counts as right.
    """
    names = dict.fromkeys(name for _, record in records for name in record)
    absent = "(absent)"
    for name in names:
        values = [record.get(name, absent) for _, record in records]
        if len(set(values)) == 1:
            continue
        usual, _ = Counter(values).most_common(1)[0]  # of equally many the one of the lowest rank
        odd = [rank for rank, value in enumerate(values) if value != usual]
        shown = ", ".join(f"rank {rank} on {records[rank][0]}" for rank in odd[:SHOWN_RANKS])
        more = f" and {len(odd) - SHOWN_RANKS} more" if len(odd) > SHOWN_RANKS else ""
        return (
            f"ranks were not started alike: {shown}{more} has {name}={values[odd[0]]}, the others {usual}; start all "
            "ranks with the same configuration, data and code"
        )
    raise AssertionError("records of equal entries have equal digests")
