"""The section of Muon and of its kinds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from amfm.model.config.section import Section


class MuonConfig(Section):
    """How Muon steps the matrices of blocks (docs/optimizers.md); the rest of a model steps by AdamW's settings."""

    rule: Literal["muon", "normuon", "hyperball", "adam_hyperball"] = Field(
        "muon",
        description="normuon: rows of an update get equal sizes over time; hyperball: updates and weights keep their Frobenius norm, without weight decay; adam_hyperball: the same with AdamW's update.",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of the momentum, which is Nesterov's.")
    rounds: int = Field(5, gt=0, description="Newton-Schulz rounds by which an update is orthogonalized.")
    update_rms: float = Field(
        0.2,
        gt=0,
        description="Root mean square of an update at rate 1; 0.2 is typical of AdamW, so both can use the same rate.",
    )
    per_head: bool = Field(
        True,
        description="Orthogonalize projections to heads one head at a time; false: all heads of a projection together.",
    )

    @property
    def keeps_norms(self) -> bool:
        """Whether weights keep their norm, so that no decay applies to them."""
        return self.rule in ("hyperball", "adam_hyperball")

    @property
    def keeps_state_at_owners(self) -> bool:
        """Whether a state of whole matrices is with their owners, and not in the moments that ZeRO cuts."""
        return self.rule != "muon"

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept of a matrix, by name."""
        if self.rule == "adam_hyperball":
            return {"exp_avg": (rows, columns), "exp_avg_sq": (rows, columns)}
        return {"momentum": (rows, columns)} | ({"row_squares": (rows,)} if self.rule == "normuon" else {})
