"""What is carried out of a router's choices, and choices without those of padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from amfm.kernels.moe.grouping import count_experts
from amfm.kernels.moe.op import Routing
from amfm.model.packing import Padding

LARGEST_PADDING = 2.0  # rows sent over rows chosen, up to which slots of one size cost less than to wait for counts


@dataclass(frozen=True)
class Choices:
    """Choices that are carried out: expert ids [R, K], `num_experts` for a dropped one, and weights [R, K], 0 for it.

    capacity: choices that an expert takes of the whole rows at most, with those that padding might have had; None without a limit.
    bound: where nothing is sent, choices that are not dropped, at most; None: none is.
    """

    expert_ids_RK: Tensor
    weights_RK: Tensor
    capacity: int | None = None
    bound: int | None = None

    def slots(self, num_tokens: int, num_experts: int) -> int | None:
        """Slots for each expert that hold what this many of the tokens choose; None without a limit, or as `slots_for` says."""
        if self.capacity is None:
            return None
        return slots_for(num_tokens, self.expert_ids_RK.shape[1], num_experts, self.capacity)


def slots_for(num_tokens: int, top_k: int, num_experts: int, capacity: int) -> int | None:
    """Slots for each expert that hold the choices of this many tokens; None if too many would stay empty.

    A token chooses an expert once, and the capacity holds for the tokens of all ranks that share the rows, so each of
    several ranks needs as many slots as all together.
    """
    slots = min(num_tokens, capacity)
    return slots if 0 < slots * num_experts <= LARGEST_PADDING * num_tokens * top_k else None


def leave_out(routing: Routing, padding: Padding, num_experts: int) -> Routing:
    """The same choices without those of padding, which are lost (`Choices`): weight 0, and no part in the counts."""
    is_padding_R1 = padding.is_padding_BT.reshape(-1, 1)
    ids_RK = routing.expert_ids_RK.masked_fill(is_padding_R1, num_experts)
    counts_E = count_experts(ids_RK, num_experts + 1)[:num_experts]
    return replace(
        routing, expert_ids_RK=ids_RK, weights_RK=routing.weights_RK.masked_fill(is_padding_R1, 0.0), counts_E=counts_E
    )
