"""The kinds of mixers of this package; read without torch."""

from __future__ import annotations

from typing import Any

from amfm.model.config.kinds import IN_OUT, Kind
from amfm.model.config.options import MixerOptions
from amfm_mixers.options import (
    CombaOptions,
    FoxOptions,
    Gdn2Options,
    GlaOptions,
    HedgehogOptions,
    LightNetOptions,
    LightningOptions,
    LogLinearOptions,
    MalaOptions,
    Mamba1Options,
    Mamba3Options,
    MesaOptions,
    MomOptions,
    NgramMemoryOptions,
    PlstmOptions,
    RetentionOptions,
    Rwkv7Options,
    TransNormerOptions,
)


def _linear(name: str, module: str, mixer: str, options: type[MixerOptions], form: str, **fields: Any) -> Kind:
    """A mixer of a module of this package, with its form in plain PyTorch in a module of `modeling`."""
    place = f"amfm_mixers.modeling.{form}"
    return Kind(name, f"amfm_mixers.{module}:{mixer}", options, products=IN_OUT, modeling=place, **fields)


COMBA = _linear("comba", "comba", "CombaMixer", CombaOptions, "feedback_amfm:Comba")
FOX = _linear("fox", "fox", "FoxMixer", FoxOptions, "fox_amfm:Fox")
GLA = _linear("gla", "vector_gates", "GlaMixer", GlaOptions, "linear_forms_amfm:Gla")
GDN2 = _linear("gdn2", "vector_gates", "Gdn2Mixer", Gdn2Options, "linear_forms_amfm:Gdn2")
HEDGEHOG = _linear("hedgehog", "feature_maps", "HedgehogMixer", HedgehogOptions, "linear_forms_amfm:Hedgehog")
LIGHTNING = _linear("lightning", "retention", "LightningMixer", LightningOptions, "linear_forms_amfm:Lightning")
LIGHTNET = _linear(
    "lightnet",
    "vector_gates",
    "LightNetMixer",
    LightNetOptions,
    "linear_forms_amfm:LightNet",
    refuses={"context": "its running softmax does not pass between ranks yet"},
)
LOG_LINEAR = _linear(
    "log_linear",
    "log_linear",
    "LogLinearMixer",
    LogLinearOptions,
    "log_linear_amfm:LogLinear",
    refuses={"context": "its states of all levels do not pass between ranks yet"},
)
MALA = _linear("mala", "feature_maps", "MalaMixer", MalaOptions, "linear_forms_amfm:Mala")
MAMBA1 = _linear("mamba1", "mamba1", "Mamba1Mixer", Mamba1Options, "linear_forms_amfm:Mamba1")
MAMBA3 = _linear("mamba3", "mamba3", "Mamba3Mixer", Mamba3Options, "mamba3_amfm:Mamba3")
MESA = _linear(
    "mesa",
    "mesa",
    "MesaMixer",
    MesaOptions,
    "feedback_amfm:Mesa",
    refuses={"context": "what it reads is not linear in the state that another rank sends"},
)
MOM = Kind(
    "mom",
    "amfm_mixers.mom:MomMixer",
    MomOptions,
    refuses={"context": "its memories do not pass between ranks yet"},
    modeling="amfm_mixers.modeling.memories_amfm:Memories",
)
NGRAM_MEMORY = Kind(
    "ngram_memory",
    "amfm_mixers.ngram_memory:NgramMemoryMixer",
    NgramMemoryOptions,
    modeling="amfm_mixers.modeling.ngram_memory_amfm:NgramMemory",
)
PLSTM = _linear("plstm", "retention", "PlstmMixer", PlstmOptions, "linear_forms_amfm:Plstm")
RETNET = _linear("retnet", "retention", "RetentionMixer", RetentionOptions, "linear_forms_amfm:Retention")
RWKV7 = Kind("rwkv7", "amfm_mixers.rwkv7:Rwkv7Mixer", Rwkv7Options, modeling="amfm_mixers.modeling.rwkv7_amfm:Rwkv7")
TRANSNORMER = _linear(
    "transnormer", "feature_maps", "TransNormerMixer", TransNormerOptions, "linear_forms_amfm:TransNormer"
)
SPECS = (
    COMBA,
    FOX,
    GLA,
    GDN2,
    HEDGEHOG,
    LIGHTNING,
    LIGHTNET,
    LOG_LINEAR,
    MALA,
    MAMBA1,
    MAMBA3,
    MESA,
    MOM,
    NGRAM_MEMORY,
    PLSTM,
    RETNET,
    RWKV7,
    TRANSNORMER,
)
