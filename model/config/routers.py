"""Routers of packages, folders and processes: what `model.moe.router` may name besides ours, and the section of their options.

A package registers one with an entry point of the group `amfm.routers` that names a `RouterSpec`. Its code is a function
`choose(given, options) -> Routed` of the logits of the router's matrix. All tensor ranks that share tokens call it
with the same logits and must choose alike, so it draws only by `given.seed`. Everything else is ours. No torch here.

What a router of a package is given, and what it gives (routers.py). No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from amfm.model.config.plugins import (
    PluginSections,
    list_packages,
    load_named,
    specs_by_name,
    until_registered,
    with_sections,
)
from amfm.model.config.section import Section

Tensor = Any  # torch's


@dataclass(frozen=True)
class RouterInput:
    """What a router is given: R tokens of one micro-batch, rows of T tokens one after the other, and E experts.

    logits_RE [R, E], float32 at least, differentiable. bias_E [E], the balancing bias, or None. num_tokens: of the R, those that
    are not padding; is_padding_R [R] bool, or None. seed: an int64 scalar that differs by block and step, for draws.
    """

    logits_RE: Tensor
    moe: Any  # the MoeConfig, which is made after this
    bias_E: Tensor | None
    num_tokens: int
    is_padding_R: Tensor | None
    seed: Tensor
    is_training: bool


@dataclass(frozen=True)
class Routed:
    """What a router chose: K experts a token, for any K.

    expert_ids_RK [R, K] int64; E for no expert, and no expert twice. weights_RK [R, K], differentiable, of the experts' outputs
    in the sum. scores_RE [R, E], at least 0, by which load is balanced and whose entropy is logged. losses: values a token, [R],
    by the names in `RouterSpec.losses`; their means over tokens are added to the loss in training. most: choices that are
    experts, at most, where it is below R * K.
    """

    expert_ids_RK: Tensor
    weights_RK: Tensor
    scores_RE: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    most: int | None = None


ENTRY_POINTS = "amfm.routers"
OURS = ("softmax", "sigmoid", "sqrt_softplus")


@dataclass(frozen=True)
class RouterSpec:
    """A router as configurations see it, without importing it.

    name: lower case, a value of `model.moe.router`. choose: `package.module:function`, or the function. options: its section, with
    defaults. losses: names of its auxiliary losses. reads: settings of model.moe that it takes from `given.moe`, of those in
    moe_rules.py. compares_tokens: its choices for a token depend on others of the micro-batch. modeling: the choice outside of
    training in plain PyTorch, `package.module:function` of logits [R, E] and the section of moe; "": no export.
    """

    group: ClassVar[str] = ENTRY_POINTS

    name: str
    choose: str | Callable[..., Any]
    options: type[Section]
    losses: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    compares_tokens: bool = False
    modeling: str = ""

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        found: Callable[..., Any] = load_named(self.choose)
        return found


@until_registered
@cache
def router_specs() -> dict[str, RouterSpec]:
    """Collect the routers of packages by name. Raises RuntimeError as mixers do, and for a name that is taken."""
    return specs_by_name(ENTRY_POINTS, RouterSpec, OURS, "a router")


@with_sections({name: (spec.options, "None: its defaults.") for name, spec in router_specs().items()})
class RegisteredRouters(PluginSections):
    """Options of routers of installed packages, by name; `router` chooses one (entry point group `amfm.routers`)."""

    group: ClassVar[str] = ENTRY_POINTS
    chooser: ClassVar[str] = "router"
    packages: ClassVar[Mapping[str, str]] = list_packages(ENTRY_POINTS, RouterSpec)
