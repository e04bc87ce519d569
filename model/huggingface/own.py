"""Our own class: the modelling files that an export carries beside its weights and transformers loads through `auto_map`.

It holds every block of ours, under our names. Its code is `pretrain/export/modeling_template`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amfm.model.config.kinds import BUILT_IN
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightEntry, WeightMap
from amfm.model.huggingface.fields import registered_mixers
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.shapes import weight_shapes

OWN_MODEL_TYPE = "amfm"


def unfit_for_own(config: ModelConfig) -> list[str]:
    """List mixers of other packages, which the modelling files have not."""
    ours = {spec.name for spec in BUILT_IN}
    return [
        f"model.pattern has {symbol}: the mixer {name} of another package is not in our modelling file; "
        "use a mixer of ours where the model must leave amfm"
        for symbol, name in registered_mixers(config).items()
        if name not in ours
    ]


def own_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of our own class, whose code is exported beside the weights and loaded through `auto_map`."""
    letters = config.letters
    return {
        "architectures": ["AmfmForCausalLM"],
        "model_type": OWN_MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_amfm.AmfmConfig",
            "AutoModelForCausalLM": "modeling_amfm.AmfmForCausalLM",
        },
        "num_hidden_layers": len(letters),
        "tie_word_embeddings": config.tie_embeddings,
        "pattern": "".join(letters),
        "norm_epsilon": config.norm_epsilon,
        "multipliers": config.multipliers.model_dump(),
        "mamba": config.mamba.model_dump() if config.mamba else None,
        "attention": config.attention.model_dump() if config.attention else None,
        "moe": config.moe.model_dump() if config.moe else None,
        "feed_forward": config.feed_forward.model_dump() if config.feed_forward else None,
        "mixers": {name: getattr(config.mixers, name).model_dump() for name in registered_mixers(config).values()},
    }


def model_config_from_own(fields: Mapping[str, Any]) -> ModelConfig:
    """Invert `own_fields`; validation checks what somebody may have edited."""
    sections = {name: fields.get(name) for name in ("mamba", "attention", "moe", "feed_forward")}
    return ModelConfig.model_validate(
        {
            "pattern": fields["pattern"],
            "vocab_size": fields["vocab_size"],
            "hidden_size": fields["hidden_size"],
            "norm_epsilon": fields["norm_epsilon"],
            "tie_embeddings": fields["tie_word_embeddings"],
            "initializer_range": fields["initializer_range"],
            # Exports of earlier versions have none.
            "mixers": fields.get("mixers") or {},
            "multipliers": fields.get("multipliers") or {},
            **sections,
        }
    )


def own_map(config: ModelConfig) -> WeightMap:
    """Build the map between our names and the same ones."""
    return WeightMap(tuple(WeightEntry(name, (name,)) for name in weight_shapes(config)), {})


CLASS = HfTarget(
    name="own",
    model_type=OWN_MODEL_TYPE,
    class_name="AmfmForCausalLM",
    unfit=unfit_for_own,
    fields=own_fields,
    read=model_config_from_own,
    weights=own_map,
    ships_code=True,
)
