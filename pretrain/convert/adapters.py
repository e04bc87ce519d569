"""Kinds of update that packages bring to the tuning of a conversion, next to low-rank updates of projections.

An entry point of the group `amfm.adapters` names an `AdapterSpec`, and `convert.tune.adapters` asks for it by name. An adapter
puts parameters into a model whose other weights are frozen; the result has them merged into those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from amfm.model.config.plugins import how_to_install, load_named, specs_by_name

if TYPE_CHECKING:
    from amfm.model.hybrid import HybridModel

ENTRY_POINTS = "amfm.adapters"


class Adapter(Protocol):
    """What a package brings."""

    def add_update(self, model: HybridModel, *, rank: int, alpha: float) -> list[str]:
        """Put updates that are zero at first into a model; returns the names of their parameters.

        None if no block has a place for them. No collectives; every rank calls this before an engine takes the model.
        Raises ValueError if ranks hold the weights in parts that it cannot update.
        """

    def merge_update(self, state: Mapping[str, Tensor], *, rank: int, alpha: float) -> Mapping[str, Tensor]:
        """Add the updates to their weights, and leave their parameters out: whole tensors by name."""


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter as configurations see it. name: lower case. adapter: `package.module:object`, an `Adapter`."""

    name: str
    adapter: str


def adapter_specs() -> dict[str, AdapterSpec]:
    """Collect the adapters of installed packages by name. Raises RuntimeError as mixers do."""
    return specs_by_name(ENTRY_POINTS, AdapterSpec, (), "an adapter")


def how_to_get(name: str) -> str:
    """What to do about an adapter that no package registers."""
    return how_to_install(name, f"install the package that registers it under {ENTRY_POINTS}")


def find_adapter(name: str) -> Adapter:
    """Import an adapter by its name."""
    return cast("Adapter", load_named(adapter_specs()[name].adapter))
