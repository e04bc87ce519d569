"""A small model of each registered mixer, with options made from its own section: registering is enough to be tested."""

from __future__ import annotations

from typing import Any

from amfm.model.config.kinds import registered_kinds
from amfm.model.config.mixer_options import LinearOptions
from amfm.model.config.schema import ModelConfig
from tests.model.small_models import small_config

# What a sample takes of these where the mixer's options have the field.
USUAL: dict[str, Any] = {"num_heads": 4, "head_dim": 6, "value_head_dim": 5, "conv_kernel": 3, "chunk_size": 8}
# What a mixer needs besides, or in other sizes.
SPECIAL: dict[str, dict[str, Any]] = {
    "deltaproduct": {"num_key_heads": 2, "allow_negative_eigenvalues": True},
    "fox": {"num_kv_heads": 2, "qk_norm": True, "gate": "element"},
    "log_linear": {"state_size": 6, "num_groups": 2, "max_tokens": 16},
    "mesa": {"num_iterations": 10},
    "ngram_memory": {"num_heads": 2, "head_dim": 4, "table_size": 20},
    "mamba1": {"inner_size": 10, "state_size": 4},
    "mamba3": {"state_size": 8, "num_groups": 2},
    "mla": {
        "latent_size": 7,
        "query_latent_size": 9,
        "nope_head_dim": 4,
        "rope_head_dim": 4,
        "positions": "rope",
        "gate": "head",
    },
    "window_linear": {
        "window": 3,
        "num_kv_heads": 2,
        "qk_norm": True,
        "positions": "rope",
        "meta_tokens": 2,
        "output_gate": "head",
    },
    "window": {"window": 6, "num_kv_heads": 2, "qk_norm": True, "gate": "element"},
    "gated_deltanet": {"num_key_heads": 2},
    # Of examples/, if they are installed.
    "seqboat": {"inner_size": 10, "window": 3},
    "longvq": {"window": 3, "num_codes": 6},
    "lssl": {"conv_kernel": 0},
    "monarch": {"max_tokens": 40, "filter_size": 6, "bands": 3},
    "s4d": {"conv_kernel": 0},
}

# Forms of window_linear: the presets, with what none of them has.
WINDOW_LINEAR_FORMS: dict[str, dict[str, Any]] = {
    "learned": {},
    "lolcats": {"preset": "lolcats", "feature_size": 3},
    "liger": {"preset": "liger", "meta_tokens": 1},
    "lizard": {"preset": "lizard", "feature_size": 3, "meta_tokens": 2},
    "fading channels in one sum": {"features": "softmax", "gate": "key", "meta_tokens": 2},
    "average without decay": {"preset": "liger", "gate": "none", "linear_weight": 0.3, "linear_positions": "rotary"},
}

# Rotary positions of mixers that forget nothing, by mixer and place.
ROTARY_FORMS = (
    ("hedgehog", "rope_before"),
    ("mala", "rope_before"),
    ("transnormer", "rope_before"),
    ("transnormer", "rope_after"),
)


# Mixers with an option that changes their parts, and two side by side.
OTHERS = ("mla with sinks", "window with sinks", "kda with whole gates", "gated_deltanet next to window")
WITH: dict[str, dict[str, Any]] = {"sinks": {"sinks": True}, "whole gates": {"gates": "full", "decay_floor": -2.0}}


def sample_options(name: str) -> dict[str, Any]:
    """Options of a small mixer."""
    fields = registered_kinds()[name].options.model_fields
    return {key: value for key, value in USUAL.items() if key in fields} | SPECIAL.get(name, {})


def sample_names() -> list[str]:
    """Every registered mixer, `mom over X` for every linear one, and OTHERS."""
    inside = [spec.name for spec in registered_kinds().values() if issubclass(spec.options, LinearOptions)]
    return [*registered_kinds(), *(f"mom over {name}" for name in inside), *OTHERS]


def registered_name(sample: str) -> str:
    """The mixer of a sample, the first of two."""
    return sample.partition(" ")[0]


def mixer_config(sample: str, blocks: int = 2) -> ModelConfig:
    """A model of this many blocks of one mixer and nothing else."""
    if " next to " in sample:
        names = sample.split(" next to ")
        symbols = "&".join(registered_kinds()[name].symbol for name in names)
        return small_config(f"({symbols})" * blocks, mixers={name: sample_options(name) for name in names})
    if " with " in sample:
        name, _, added = sample.partition(" with ")
        mixers = {name: sample_options(name) | WITH[added]}
        return small_config(registered_kinds()[name].symbol * blocks, mixers=mixers)
    name, _, inside = sample.partition(" over ")
    mixers = {name: sample_options(name)}
    if name == "mom":
        inside = inside or "gated_deltanet"
        mixers = {name: mixers[name] | {"mixer": inside}, inside: sample_options(inside)}
    return small_config(registered_kinds()[name].symbol * blocks, mixers=mixers)
