"""Our own class: the modelling files that an export carries next to its weights and transformers loads through
`auto_map`.

It holds every block of ours. Its code is `pretrain/export/modeling_template`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from amfm.model.config.kinds import BUILT_IN, find_kind
from amfm.model.config.schema import ModelConfig, read_saved_model
from amfm.model.config.streams import STREAMS
from amfm.model.huggingface.entries import WeightEntry, WeightMap
from amfm.model.huggingface.fields import registered_mixers
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.refusals import ClientName, Refusal
from amfm.model.shapes import weight_shapes

OWN_MODEL_TYPE = "amfm"
# Of the modelling files and their names of weights: 2 since they have a base model (1: without `model.`).
MODELING_VERSION = 2
_NAMES = {
    "embedding.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    "final_norm.": "model.norm.",
    "final_stream.": "model.final_stream.",
    "head.": "lm_head.",
}


def unfit_for_own(config: ModelConfig) -> list[str]:
    """List mixers of packages that bring no modelling file."""
    ours = {spec.name for spec in BUILT_IN}
    return [
        f"model.pattern has {symbol}: the mixer {name} of another package is not in our modeling file; "
        "use a mixer of ours if the model must leave amfm"
        for symbol, name in registered_mixers(config).items()
        if find_kind(name).base not in ours and not find_kind(name).modeling
    ] + list(_unfit_router(config))


def _unfit_router(config: ModelConfig) -> Iterator[str]:
    for key, moe in config.expert_sections() if config.routed_experts() else ():
        spec = moe.package_router()
        if spec is None or spec.modeling:
            continue
        yield (
            f"{key}.router={spec.name}: the router of another package brings no form for our modeling file "
            "(RouterSpec.modeling); use a router of ours if the model must leave amfm"
        )


def own_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of our own class, whose code is exported next to the weights and loaded through `auto_map`."""
    letters = config.letters
    return {
        "architectures": ["AmfmForCausalLM"],
        "model_type": OWN_MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_amfm.AmfmConfig",
            "AutoModel": "modeling_amfm.AmfmModel",
            "AutoModelForCausalLM": "modeling_amfm.AmfmForCausalLM",
            "AutoModelForSequenceClassification": "modeling_amfm.AmfmForSequenceClassification",
        },
        "modeling_version": MODELING_VERSION,
        "num_hidden_layers": len(letters),
        "tie_word_embeddings": config.tie_embeddings,
        "pattern": "".join(letters),
        "norm_epsilon": config.norm_epsilon,
        "norm_kind": config.norm,
        "norm_placement": config.norm_placement,
        # What follows from it, for the modelling files.
        "norms_after": [index for index, is_after in enumerate(config.norms_after()) if is_after],
        "multipliers": config.multipliers.model_dump(),
        "mamba": config.mamba.model_dump() if config.mamba else None,
        "attention": config.attention.model_dump() if config.attention else None,
        "moe": config.moe.model_dump() if config.moe else None,
        "feed_forward": config.feed_forward.model_dump() if config.feed_forward else None,
        "mixers": {
            name: getattr(find_kind(name).read(config), "model_dump")()  # noqa: B009
            for name in (*registered_mixers(config).values(), *([config.head] if config.head else []))
        },
        **({"head": config.head} if config.head else {}),
        **({config.stream_name: config.stream.model_dump()} if config.stream and config.stream_name else {}),
    }


def model_config_from_own(fields: Mapping[str, Any]) -> ModelConfig:
    """Invert `own_fields`; validation checks what someone may have edited."""
    sections = {name: fields.get(name) for name in ("mamba", "attention", "moe", "feed_forward")}
    mixers = fields.get("mixers") or {}  # exports of earlier versions have none
    variants = {name: options for name, options in mixers.items() if "of" in options}
    saved = read_saved_model(
        {
            "pattern": fields["pattern"],
            "vocab_size": fields["vocab_size"],
            "hidden_size": fields["hidden_size"],
            "norm_epsilon": fields["norm_epsilon"],
            "tie_embeddings": fields["tie_word_embeddings"],
            "initializer_range": fields["initializer_range"],
            "mixers": {name: options for name, options in mixers.items() if name not in variants},
            "variants": variants,
            "head": fields.get("head"),
            **{name: fields.get(name) for name in STREAMS},
            "norm": fields.get("norm_kind") or "rmsnorm",
            "norm_placement": fields.get("norm_placement") or "before",
            "multipliers": fields.get("multipliers") or {},
            **sections,
        },
        {},
    )
    return ModelConfig.model_validate(saved)


def own_map(config: ModelConfig) -> WeightMap:
    """Build the map between our names and those that programs look for; files of version 1 have ours."""
    theirs = {name: _their_name(name) for name in weight_shapes(config)}
    return WeightMap(tuple(WeightEntry(name, (other,)) for name, other in theirs.items()), {}, theirs)


def _their_name(name: str) -> str:
    start = next(start for start in _NAMES if name.startswith(start))
    return _NAMES[start] + name.removeprefix(start)


def own_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that read no modelling file of another's; vLLM has a plug-in (`pretrain/export/plugin_files.py`)."""
    rule = "it reads classes that it has itself; use a pattern that a native class holds if it must read the model"
    programs: tuple[ClientName, ...] = ("llama.cpp", "mlx-lm")
    return [Refusal(program, rule) for program in programs]


def _limits(config: ModelConfig) -> list[str]:
    limits = [
        "States cannot go back to an earlier token: assisted generation and prefix tuning are rejected, prompt tuning is not.",
        "Attention weights and router logits are not returned; asking for them is an error, as is every unknown argument.",
    ]
    if any(getattr(options, "indexer", None) for _, options in config.kinds_in_use()):
        limits.append("The loss of an indexer is not part of this class: fine-tuning leaves its weights as they are.")
    return limits


CLASS = HfTarget(
    name="own",
    model_type=OWN_MODEL_TYPE,
    class_name="AmfmForCausalLM",
    unfit=unfit_for_own,
    fields=own_fields,
    read=model_config_from_own,
    weights=own_map,
    refusals=own_refusals,
    limits=_limits,
    ships_code=True,
)
