"""Registry of sequence mixers: ours and those of installed packages, under their names.

A package registers a mixer with an entry point of the group `amfm.mixers` that names a `MixerSpec`. A spec names the class
by its import path and does not hold it, because configurations are read and documented where torch is not imported; the
class is loaded when a model is built (plugins.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from amfm.model.config import mixer_options as own
from amfm.model.config.mixer_options import MixerOptions
from amfm.model.config.pattern import BLOCK_NAMES, MIXER_LETTERS, SECTIONS
from amfm.model.config.plugins import describe_entry, installed_specs
from amfm.model.config.window_linear import WindowLinearOptions

ENTRY_POINTS = "amfm.mixers"
_LETTERS = {name: letter for letter, name in MIXER_LETTERS.items()}


@dataclass(frozen=True)
class MixerSpec:
    """A registered mixer as pattern, configuration and checks see it, without importing it.

    name: lower case, as in `{name}`. mixer: `package.module:Class`, a SequenceMixer. options: its section, whose class
    docstring and field descriptions become the documentation. refuses: what it cannot do yet, with the reason.
    """

    name: str
    mixer: str
    options: type[MixerOptions]
    refuses: Mapping[Literal["context", "tensor"], str] = field(default_factory=dict)

    @property
    def symbol(self) -> str:
        """Its symbol in a pattern: its letter, or `{name}`."""
        return _LETTERS.get(self.name, f"{{{self.name}}}")

    def load(self) -> type[Any]:
        """Import the class: an `amfm.model.mixers.interface.SequenceMixer`."""
        module, _, name = self.mixer.partition(":")
        found: type[Any] = getattr(importlib.import_module(module), name)
        return found


BUILT_IN = (
    MixerSpec("deltanet", "amfm.model.mixers.delta:DeltaNetMixer", own.DeltaNetOptions),
    MixerSpec("gated_deltanet", "amfm.model.mixers.delta:GatedDeltaNetMixer", own.GatedDeltaNetOptions),
    MixerSpec("deltaproduct", "amfm.model.mixers.delta:DeltaProductMixer", own.DeltaProductOptions),
    MixerSpec("gla", "amfm.model.mixers.vector_gates:GlaMixer", own.GlaOptions),
    MixerSpec("hgrn2", "amfm.model.mixers.vector_gates:Hgrn2Mixer", own.Hgrn2Options),
    MixerSpec("kda", "amfm.model.mixers.kda:KdaMixer", own.KdaOptions),
    MixerSpec("hedgehog", "amfm.model.mixers.feature_maps:HedgehogMixer", own.HedgehogOptions),
    MixerSpec("lightning", "amfm.model.mixers.retention:LightningMixer", own.LightningOptions),
    MixerSpec(
        "lightnet",
        "amfm.model.mixers.lightnet:LightNetMixer",
        own.LightNetOptions,
        refuses={"context": "its running softmax does not pass between ranks yet"},
    ),
    MixerSpec("mala", "amfm.model.mixers.mala:MalaMixer", own.MalaOptions),
    MixerSpec("mamba1", "amfm.model.mixers.mamba1:Mamba1Mixer", own.Mamba1Options),
    MixerSpec(
        "mom",
        "amfm.model.mixers.mom:MomMixer",
        own.MomOptions,
        refuses={"context": "its memories do not pass between ranks yet"},
    ),
    MixerSpec("plstm", "amfm.model.mixers.plstm:PlstmMixer", own.PlstmOptions),
    MixerSpec("retnet", "amfm.model.mixers.retention:RetentionMixer", own.RetentionOptions),
    MixerSpec("transnormer", "amfm.model.mixers.feature_maps:TransNormerMixer", own.TransNormerOptions),
    MixerSpec("mla", "amfm.model.mixers.mla:MlaMixer", own.MlaOptions),
    MixerSpec("window", "amfm.model.mixers.window:WindowMixer", own.WindowOptions),
    MixerSpec("window_linear", "amfm.model.mixers.window_linear:WindowLinearMixer", WindowLinearOptions),
)


@cache
def mixer_specs() -> dict[str, MixerSpec]:
    """Collect all mixers by name: ours in the order above, then those of installed packages.

    Raises RuntimeError for an entry point that cannot be imported, is no MixerSpec or takes another mixer's name.
    """
    specs = {spec.name: spec for spec in BUILT_IN}
    for entry, spec in installed_specs(ENTRY_POINTS, MixerSpec):
        if spec.name in specs or spec.name in SECTIONS.values():
            raise RuntimeError(
                f"{describe_entry(entry)} registers a mixer {spec.name!r}, which there is already; uninstall one"
            )
        specs[spec.name] = spec
    return specs


def find_spec(name: str) -> MixerSpec:
    """Look up the mixer of this name. Raises ValueError for a name that nothing registers."""
    specs = mixer_specs()
    if name not in specs:
        raise ValueError(
            f"no mixer is called {name!r}; there are {', '.join(specs)} and what packages register under the entry "
            f"point group {ENTRY_POINTS}: install the package, or take another"
        )
    return specs[name]


def describe_symbol(symbol: str) -> str:
    """Name a kind of block in words, from its symbol in a pattern."""
    return BLOCK_NAMES.get(symbol) or MIXER_LETTERS.get(symbol, symbol.strip("{}")).replace("_", " ")
