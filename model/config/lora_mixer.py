"""The section of low-rank updates among which a router chooses. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from amfm.model.config.section import Section

Projection = Literal["q", "k", "v", "o", "in", "out"]
BALANCE, SPECIALIZATION = "lora_balance", "lora_specialization"  # names of the losses


class LoraMixerConfig(Section):
    """Low-rank updates of projections, of which a router chooses some for each token; set by `amfm convert`."""

    num_experts: int = Field(ge=2, description="Updates of each projection.")
    top_k: int = Field(2, gt=0, description="Updates per token; at most num_experts.")
    rank: int = Field(8, gt=0, description="Rank of each update.")
    alpha: float = Field(16.0, gt=0, description="Updates count alpha / rank times.")
    targets: tuple[Projection, ...] = Field(
        ("q", "k", "v", "o"),
        min_length=1,
        description="Projections with updates: `q`, `k`, `v`, `o` of attention, `in` and `out` of Mamba2 and of linear mixers.",
    )
    balance_weight: float = Field(
        0.01, ge=0, description="Weight of the loss that balances the router, as lora_balance."
    )
    specialization_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean entropy of a token's choice, as lora_specialization: tokens decide, the more the choices of all are balanced.",
    )
    hard_from_step: int | None = Field(
        None,
        gt=0,
        description="Training steps in which all updates count, by the softmax of the router; then, and outside of training, the top_k do. None: the top_k from the first step.",
    )

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """A token chooses among the updates that there are."""
        if self.top_k > self.num_experts:
            yield "top_k", f"is more than num_experts={self.num_experts}; lower it to at most that"

    def auxiliary_names(self) -> tuple[str, ...]:
        """The balance of the router and the sharpness of its choices, if these have a weight."""
        weights = {BALANCE: self.balance_weight, SPECIALIZATION: self.specialization_weight}
        return tuple(name for name, weight in weights.items() if weight)
