"""Why not: the layouts that a search leaves out, by what rules them out, and the choices that it does not try.

How it works: the search counts as it goes. A rejected layout counts under the setting whose rule it breaks first, one that is
out of memory under the largest part of its memory, each with one of them as an example: of rejections the first, of the others
the one that needs the least. What is not tried at all has no number and a reason, and stands here next to the bounds of
`search.py` only where the model and the ranks have such a choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.memory import Memory
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import RunConfig


@dataclass(frozen=True)
class LeftOut:
    """`count` layouts that share a reason; None for a choice that was not tried. `example`: one of them, and what it lacks."""

    what: str
    count: int | None
    example: str


@dataclass
class Tally:
    """Counts of a search under way."""

    refused: dict[str, LeftOut] = field(default_factory=dict)
    too_large: dict[str, tuple[LeftOut, float]] = field(default_factory=dict)

    def refuse(self, layout: Layout, problem: Problem) -> None:
        """Count a layout that breaks a rule."""
        first = LeftOut(f"breaks a rule of {problem.key}", 0, f"{layout.describe()}: {problem}")
        entry = self.refused.setdefault(problem.key, first)
        self.refused[problem.key] = replace(entry, count=(entry.count or 0) + 1)

    def overflow(self, layout: Layout, memory: Memory, reason: str) -> None:
        """Count a layout that does not fit, with all the recomputation that helps."""
        part = max((name for name in memory.parts if name != "margin"), key=lambda name: memory.parts[name])
        entry, least = self.too_large.get(part, (LeftOut(f"out of memory, most of it {part}", 0, ""), float("inf")))
        need = memory.total()
        example = f"{layout.describe()}: {reason}" if need < least else entry.example
        self.too_large[part] = replace(entry, count=(entry.count or 0) + 1, example=example), min(need, least)

    def reasons(self) -> tuple[LeftOut, ...]:
        """All that was counted, the most frequent first."""
        found = [*self.refused.values(), *(entry for entry, _ in self.too_large.values())]
        return tuple(sorted(found, key=lambda entry: -(entry.count or 0)))


def untried(config: RunConfig, ranks: int, hardware: Hardware, *, largest_context: int) -> Iterator[LeftOut]:
    """The choices that a search over all axes does not try, of those that this run on this many ranks would have."""
    node, letters = hardware.gpus_per_node, set(config.model.letters)
    if ranks > node:
        reason = f"a block waits for its sums, and beyond {node} ranks they pass the network"
        yield LeftOut(f"parallel.tensor above {node}", None, reason)
    yield LeftOut(
        "parallel.sequence_parallel=false together with tensor ranks", None, "the same bytes, and more memory"
    )
    if config.model.routed_experts() and ranks > 1:
        yield LeftOut(
            "parallel.expert_tensor above 1 together with expert ranks", None, "whole experts keep their products large"
        )
        yield LeftOut(
            "ZeRO 0, 2 and 3 together with expert or pipeline ranks",
            None,
            "0 and 3 are rejected with expert ranks, 3 with a pipeline; 2 reduces in every pass",
        )
    if ranks > largest_context:
        reason = "sequences of a million tokens are cut into parts of 64K by then"
        yield LeftOut(f"parallel.context above {largest_context}", None, reason)
    yield LeftOut("sizes of axes that are not powers of two", None, "nodes and models are cut in halves")
    yield LeftOut("micro-batches of more than 8 sequences, or of 3, 5, 6, 7", None, "products are large by then")
    if ranks > 1:
        yield LeftOut("other virtual_stages than 2 and 4", None, "more pieces send more often")
        yield LeftOut(
            "zero_bubble with recomputation", None, "a recomputed pass no longer has the parameters themselves"
        )
    if len(letters) > 2:
        yield LeftOut("recomputation of some kinds of block together", None, "one kind, else all of them")
    if config.train.cuda_graphs == "none":
        yield LeftOut(
            "train.cuda_graphs=blocks", None, "no GPU has run it; set it for a run on data ranks, and plan that"
        )
    yield LeftOut("parallel.offload_optimizer", None, "the plan does not model memory and processors of the host")
