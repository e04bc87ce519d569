"""What a simulated rank does, in order: computations with their FLOPs and bytes, exchanges, and waits for them.

How it works: the tracer reports every operation that computes on the GPU, of every collective and of every wait for
one.
No time is known here: the list goes to the parent process, where `timeline.py` lays it out on streams with the rates of the
hardware file. Exchanges are numbered over all steps, because the weights that a step gathers are awaited by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import get_process_group_ranks

from amfm.launch.plan.flops import name_arguments
from amfm.launch.plan.hardware import Limit
from amfm_simulate.count_collectives import COLLECTIVES, group_of
from amfm_simulate.values import leaves

# Operations that read only the rows that they give back.
LOOK_UPS = ("embedding", "index", "index_select", "gather", "take", "slice")
RECEIVES = ("recv_", "recv_any_source_")
# Parts of the names of our operations whose products run at the rate of attention and scans.
FLASH = "_varlen_attn"  # PyTorch's operation of FlashAttention over documents
MIXING = ("attention", FLASH, "scan", "mamba2")


@dataclass
class EventLog:
    """Events of the present step, each a dictionary of JSON values. `axis_of`: axes by the names of their groups."""

    axis_of: dict[str, str]
    events: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0

    def compute(
        self, func: Any, args: Any, kwargs: dict[str, Any], out: Any, *, flops: int, kind: str, phase: str
    ) -> None:
        """Note an operation of the current stream: what limits it, its FLOPs, and the bytes that it reads and writes."""
        inputs = [] if func._opname in LOOK_UPS else list(leaves((args, kwargs)))
        results = [tensor for tensor in leaves(out) if tensor.device.type == "cuda"]
        read = sum(tensor.numel() * tensor.itemsize for tensor in inputs if tensor.device.type == "cuda")
        self.events.append(
            {
                "do": "compute",
                "name": f"{func.namespace}.{func._opname}",
                "kind": kind,
                "phase": phase,
                "limit": limit_of(func),
                "wide": bool(flops) and factor_of(func, args, kwargs).dtype == torch.float32,
                "flops": flops,
                "bytes": read + sum(tensor.numel() * tensor.itemsize for tensor in results),
            }
        )

    def exchange(self, operator: str, args: Sequence[Any]) -> int:
        """Note the start of a collective, a send or a receive; returns its number, 0 for a group of one rank."""
        group = group_of(args)
        if group.size() == 1 or operator in ("barrier", "monitored_barrier_"):
            return 0
        self.number += 1
        members = get_process_group_ranks(group)
        found: dict[str, Any] = {
            "axis": self.axis_of.get(group.group_name, "other"),
            "ranks": len(members),
            "stride": members[1] - members[0],
            "number": self.number,
        }
        if operator in RECEIVES or operator == "send":
            found |= {"do": "receive" if operator in RECEIVES else "send", "peer": members[int(args[2])]}
            found["bytes"] = sum(tensor.nbytes for tensor in leaves(args[0]))
        else:
            collective, place = COLLECTIVES[operator]
            found |= {"do": "collective", "collective": collective}
            found["bytes"] = sum(tensor.nbytes for tensor in leaves(args[place]))
        self.events.append(found)
        return self.number

    def wait(self, number: int) -> None:
        """Note that the current stream waits for an exchange."""
        self.events.append({"do": "wait", "number": number})

    def host(self, what: str) -> None:
        """Note that the host waits for the GPU."""
        self.events.append({"do": "host", "what": what})


def factor_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The second factor of a product, whose dtype decides the rate: a float32 sum may take products of bfloat16.

    Of operations without such an argument the first tensor.
    """
    named = name_arguments(func, args, kwargs)
    factors = (named.get(name) for name in ("mat2", "batch2", "weight"))
    return next((factor for factor in factors if isinstance(factor, Tensor)), next(iter(leaves((args, kwargs)))))


def limit_of(func: Any) -> Limit:
    """Which efficiency of the hardware file holds: if it multiplies."""
    name = func._opname
    if "grouped" in name or "expert_feed_forward" in name:
        return "grouped"
    return "mixing" if any(word in name for word in MIXING) else "product"
