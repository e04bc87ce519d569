"""Sections of rates and weight decay by group of parameters."""

from __future__ import annotations

from pydantic import Field

from amfm.model.config.section import Section

ROUTERS = (".router.weight", ".router.bias", ".shared_gate.weight")


class DecayFactors(Section):
    """Factors on `weight_decay`; norms and vectors never decay."""

    embedding: float = Field(1.0, ge=0, description="The embedding, also as a tied head.")
    head: float = Field(1.0, ge=0, description="The head, if it is not tied.")
    router: float = Field(1.0, ge=0, description="Routers of experts, and gates of shared experts.")
    matrices: float = Field(1.0, ge=0, description="All other matrices, and convolution kernels.")

    def factor(self, group: str) -> float:
        """The factor of a group."""
        found: float = getattr(self, group)
        return found


class RateFactors(Section):
    """Factors on the learning rate."""

    embedding: float = Field(1.0, ge=0, description="The embedding, also as a tied head.")
    head: float = Field(1.0, ge=0, description="The head, if it is not tied.")
    norms: float = Field(1.0, ge=0, description="Weights of norms.")
    router: float = Field(1.0, ge=0, description="Routers of experts, and gates of shared experts.")
    matrices: float = Field(1.0, ge=0, description="All other matrices, and convolution kernels.")
    vectors: float = Field(1.0, ge=0, description="Biases, A_log, D, dt_bias and other vectors.")
    adamw: float = Field(1.0, ge=0, description="kind muon: also on all that Muon does not step.")

    def factor(self, group: str, *, by_adamw: bool) -> float:
        """The factor of a group; by_adamw: of a parameter that Muon leaves to AdamW."""
        found: float = getattr(self, group)
        return found * self.adamw if by_adamw else found


def group_of(name: str, *, is_matrix: bool) -> str:
    """The group of a parameter, by its name in the model and whether it decays as matrices do."""
    if name.startswith("embedding."):
        return "embedding"
    if name.endswith(ROUTERS):
        return "router"
    if name == "head.weight":
        return "head"
    if is_matrix:
        return "matrices"
    return "norms" if name.endswith(("norm.weight", "norm.bias")) else "vectors"
