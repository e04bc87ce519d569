"""Optimizers and learning-rate schedules: those of installed packages, and the sections of their options.

What `optimizer.kind` may name besides ours: a package registers one with an entry point of the group `amfm.optimizers` that names
an `OptimizerSpec`. As with schedules the spec names code by its import path, because configurations are read if nothing else of
the package is needed.

The code is a function `update(weight, gradient, moments, step, group, options)` that changes `weight` and the tensors in
`moments` in place. All are float32 vectors of the same length: ZeRO flattens and cuts them anywhere, so the rule must be one of
single numbers, as AdamW's is. `step` counts from 1; `group` has `lr`, `betas`, `eps` and `weight_decay` (0 for what does not
decay). It must depend on nothing else: a run that resumes has only these.

A `MatrixOptimizerSpec` steps whole matrices, those that Muon would (model/matrices.py), and AdamW the rest of the model. Its
function `update(weights, gradients, state, step, group, options)` gets N matrices of one shape at once, [N, R, C] each, and
returns the new weights, [N, R, C]; it changes the tensors of `state`, [N, *shape], in place. These have the dtype of the
master weights, float32, and start as zeros. What it does to one matrix must not depend on the others. A second function,
`shapes(rows, columns, options)`, gives the shapes of the state of one matrix, by name.

Sections of Muon and of its kinds, and of rates and weight decay by group of parameters.

What `schedule.kind` may name besides ours: a package registers one with an entry point of the group `amfm.schedules` that names a
`ScheduleSpec`. The code is a function `factor(step, total_steps, schedule, options) -> float`: the share of the peak rate at step
number `step` of `total_steps`, counted from 1, after the warm-up, which is ours. `schedule` is the ScheduleConfig (min_ratio,
warmup_length). It must be a pure function of its arguments: a run that resumes asks it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import Field

from amfm.model.config.plugins import (
    PluginSections,
    list_packages,
    load_named,
    specs_by_name,
    until_registered,
    with_sections,
)
from amfm.model.config.section import Section

OPTIMIZERS = "amfm.optimizers"
OWN_OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class PackageOptimizerSpec:
    """An optimizer as configurations see it, without importing it.

    name: lower case, a value of `optimizer.kind`. update: `package.module:function`. options: its section, whose fields have
    defaults.
    """

    group: ClassVar[str] = OPTIMIZERS

    name: str
    update: str | Callable[..., Any]
    options: type[Section]

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        found: Callable[..., Any] = load_named(self.update)
        return found


@dataclass(frozen=True)
class OptimizerSpec(PackageOptimizerSpec):
    """An optimizer of single numbers.

    num_moments: tensors that it keeps for each weight: `momentum` for one, `exp_avg` and `exp_avg_sq` for two.
    """

    num_moments: Literal[1, 2] = 2


@dataclass(frozen=True)
class MatrixOptimizerSpec(PackageOptimizerSpec):
    """An optimizer of whole matrices.

    shapes: `package.module:function`, the shapes of its state. per_head: projections to heads are stepped one head at a time.
    """

    shapes: str = ""
    per_head: bool = True


@dataclass(frozen=True)
class PackageMatrices:
    """Settings of a package's optimizer of whole matrices: what `MuonConfig` answers about ours."""

    spec: MatrixOptimizerSpec
    options: Section
    rounds: ClassVar[int] = 0  # of Newton-Schulz, the only arithmetic that a plan counts
    keeps_norms: ClassVar[bool] = False
    keeps_state_at_owners: ClassVar[bool] = True

    @property
    def per_head(self) -> bool:
        """Whether projections to heads are stepped one head at a time."""
        return self.spec.per_head

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept of a matrix, by name. Raises TypeError for a package that gives anything else, naming it."""
        shapes = load_named(self.spec.shapes)(rows, columns, self.options)
        if not isinstance(shapes, dict) or not all(isinstance(shape, tuple) for shape in shapes.values()):
            raise TypeError(
                f"optimizer.kind={self.spec.name}: {self.spec.shapes} returned {shapes!r}; it must return a dict of tuples"
            )
        return shapes


@until_registered
@cache
def optimizer_specs() -> dict[str, PackageOptimizerSpec]:
    """Collect the optimizers of installed packages by name. Raises RuntimeError as mixers do, and for a name that is taken."""
    return specs_by_name(OPTIMIZERS, PackageOptimizerSpec, OWN_OPTIMIZERS, "an optimizer")


@with_sections({name: (spec.options, "None: its defaults.") for name, spec in optimizer_specs().items()})
class RegisteredOptimizers(PluginSections):
    """Options of optimizers of installed packages, by name; `kind` chooses one (entry point group `amfm.optimizers`)."""

    group: ClassVar[str] = OPTIMIZERS
    packages: ClassVar[Mapping[str, str]] = list_packages(OPTIMIZERS, PackageOptimizerSpec)


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


SCHEDULES = "amfm.schedules"
OWN_SCHEDULES = ("wsd", "cosine", "constant", "inverse_sqrt")


@dataclass(frozen=True)
class ScheduleSpec:
    """A schedule as configurations see it, without importing it.

    name: lower case, a value of `schedule.kind`. factor: `package.module:function`. options: its section, whose fields have
    defaults.
    """

    group: ClassVar[str] = SCHEDULES

    name: str
    factor: str | Callable[..., Any]
    options: type[Section]

    def load(self) -> Callable[..., float]:
        """Import the function."""
        found: Callable[..., float] = load_named(self.factor)
        return found


@until_registered
@cache
def schedule_specs() -> dict[str, ScheduleSpec]:
    """Collect the schedules of installed packages by name. Raises RuntimeError as mixers do, and for a name that is taken."""
    return specs_by_name(SCHEDULES, ScheduleSpec, OWN_SCHEDULES, "a schedule")


@with_sections({name: (spec.options, "None: its defaults.") for name, spec in schedule_specs().items()})
class RegisteredSchedules(PluginSections):
    """Options of schedules of installed packages, by name; `kind` chooses one (entry point group `amfm.schedules`)."""

    group: ClassVar[str] = SCHEDULES
    packages: ClassVar[Mapping[str, str]] = list_packages(SCHEDULES, ScheduleSpec)
