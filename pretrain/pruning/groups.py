"""What a model can be pruned by: groups of weights that leave together, in every block that has them.

    channels   inner channels of dense feed-forwards and shared experts: a row of up (of gate and up), a column of down
    experts    whole routed experts
    heads      a key-value head with its query heads: rows of q, k, v and the gates, columns of o

A group of zeros has a zero gradient, because every product that leads to one of its weights passes another of them: so it
stays at zero while the rest trains, weight decay included, and nothing has to hold it there. An expert needs one thing more:
the router must not choose it, so its balancing bias is put where no score can reach it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from amfm.model.config.schema import ModelConfig
from amfm.pretrain.checkpoint.masters import Grouping
from amfm.pretrain.config.pruning import PrunedGroups
from amfm.pretrain.inference.merge import mixer_places


@dataclass(frozen=True)
class Unit:
    """The groups of one block that are weighed against each other: `count` of them from number `first`."""

    place: str
    first: int
    count: int


@dataclass
class GroupPlan:
    """All groups of a model, numbered, and how each parameter is divided among them."""

    units: list[Unit] = field(default_factory=list)
    groupings: dict[str, Grouping] = field(default_factory=dict)

    @property
    def num_groups(self) -> int:
        """Number of groups of all units."""
        return sum(unit.count for unit in self.units)

    def add(self, place: str, count: int, dims: dict[str, tuple[int, int, int]]) -> None:
        """Add a unit of parameters that begin with `place`: of each the dim, its period and the width of a group."""
        first = self.num_groups
        self.units.append(Unit(place, first, count))
        for name, (dim, period, width) in dims.items():
            self.groupings[place + name] = Grouping(dim, period, width, first)


def plan_groups(config: ModelConfig, kind: PrunedGroups) -> GroupPlan:
    """Number the groups of a kind over all blocks that have them; the configuration must have passed its checks."""
    plan = GroupPlan()
    for place, letter in mixer_places(config):
        if kind == "channels" and letter == "-" and config.feed_forward is not None:
            plan.add(place, config.feed_forward.hidden_size, _channel_dims(config.feed_forward.hidden_size))
        elif kind == "channels" and letter == "E" and config.moe is not None and config.moe.shared_expert_hidden_size:
            inner = config.moe.shared_expert_hidden_size
            plan.add(f"{place}shared.", inner, _channel_dims(inner))
        elif kind == "experts" and letter == "E" and config.moe is not None:
            number = config.moe.num_experts
            plan.add(place, number, {"experts.up": (0, number, 1), "experts.down": (0, number, 1)})
        elif kind == "heads" and letter == "*" and config.attention is not None:
            attention = config.attention
            queries = attention.num_heads // attention.num_kv_heads
            rows, keys = queries * attention.head_dim, attention.head_dim
            kv_heads = attention.num_kv_heads
            dims = {
                "q_proj.weight": (0, kv_heads * rows, rows),
                "k_proj.weight": (0, kv_heads * keys, keys),
                "v_proj.weight": (0, kv_heads * keys, keys),
                "o_proj.weight": (1, kv_heads * rows, rows),
            }
            if attention.gate != "none":
                gates = rows if attention.gate == "element" else queries
                dims["g_proj.weight"] = (0, kv_heads * gates, gates)
            plan.add(place, kv_heads, dims)
    return plan


def _channel_dims(inner: int) -> dict[str, tuple[int, int, int]]:
    # Gate rows, then up rows: the same channel again after `inner` rows.
    return {"up_proj.weight": (0, inner, 1), "down_proj.weight": (1, inner, 1)}
