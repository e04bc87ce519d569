"""config.json of a class of `families.py` both ways, and what such a class cannot hold.

Which models fit follows from reading: a model fits where what config.json says of it gives the same model back. So there is no
list of rules that could disagree with the reader, and every setting that differs is named with the value that the class has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from amfm.model.config.key_mixer_options import WindowOptions
from amfm.model.config.moe import MoeConfig
from amfm.model.config.rope import RopeConfig, yarn_of
from amfm.model.config.schema import ModelConfig
from amfm.model.config.section import Section
from amfm.model.huggingface.fields import (
    RARE_OPTIONS,
    flat_rope_fields,
    mamba_fields,
    parameters_of,
    read_mamba,
    read_sizes,
    require_fields,
    rope_from_parameters,
    unfit_expert_sizes,
    unfit_multipliers,
)
from amfm.model.huggingface.hf_class import HfTarget, any_tokenizer, nothing_skipped
from amfm.model.huggingface.plain.families import Experts, Family, plain_map
from amfm.model.huggingface.plain.refusals import RELEASED, none_missing, plain_refusals
from amfm.model.huggingface.refusals import IGNORED_ARGUMENTS, needs_byte_level

LAYER_TYPES = {"W": "sliding_attention", "*": "full_attention"}
MIXERS = {name: symbol for symbol, name in LAYER_TYPES.items()}
SECONDS = {"-": "dense", "E": "sparse"}


def read_plain(family: Family, fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    Raises ValueError if the class uses something that our model does not have.
    """
    field, theirs, activation = family.activation
    require_fields(fields, {field: theirs, **family.refused})
    mixers, seconds = _read_mixers(family, fields), _read_seconds(family, fields)
    pattern = "".join(mixer + second for mixer, second in zip(mixers, seconds, strict=True))
    ropes = {kind: _read_rope(family, fields, name) for kind, name in LAYER_TYPES.items()}
    heads = _read_heads(family, fields)
    sections: dict[str, Any] = {"pattern": pattern, **read_sizes(fields), "norm_placement": family.norm_placement}
    if family.scales_embedding:
        sections["multipliers"] = {"embedding": math.sqrt(fields["hidden_size"])}
    if "*" in mixers:
        sections["attention"] = {"positions": "rope", "rope": ropes["*"], **heads}
    if "M" in mixers:
        sections["mamba"] = read_mamba(fields)
    if "W" in mixers:
        rope = ropes["W"]
        if rope.scaling not in ("none", "yarn"):
            rule = "cannot be imported with sliding windows: ours are stretched only by yarn"
            raise ValueError(f"config.json: rope_type={rope.scaling} {rule}")
        turned = {"positions": "rope", "rope_theta": rope.theta, "yarn": yarn_of(rope)}
        sections["mixers"] = {"window": {"window": fields["sliding_window"], **turned, **heads}}
    if "-" in seconds:
        sections["feed_forward"] = {"hidden_size": fields["intermediate_size"], "activation": activation}
    if family.experts is not None and "E" in seconds:
        sections["moe"] = _read_experts(family.experts, fields)
    return ModelConfig.model_validate(sections)


def _read_rope(family: Family, fields: Mapping[str, Any], kind: str) -> RopeConfig:
    """The rotation of a kind of layer."""
    parameters = dict(fields.get("rope_parameters") or {})
    if family.rope_by_type:
        parameters = dict(parameters[kind])
    said = (
        parameters.pop("partial_rotary_factor", None) or 1.0 if family.partial is True else float(family.partial or 1.0)
    )
    require_fields(parameters, {"partial_rotary_factor": said})
    parameters.pop("partial_rotary_factor", None)
    return rope_from_parameters(parameters).model_copy(update={"fraction": float(said)})


def _read_heads(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    heads = fields["num_attention_heads"]
    size = (fields.get("head_dim") if family.has_head_dim else None) or fields["hidden_size"] // heads
    found = {"num_heads": heads, "num_kv_heads": fields["num_key_value_heads"], "head_dim": size}
    found["qk_norm"] = fields.get(str(family.qk_norm), family.qk_norm)
    if family.scale is not None and fields[family.scale] != size:
        found["softmax_scale"] = fields[family.scale] ** -0.5
    if isinstance(family.bias, tuple):
        name, kind = family.bias
        found["bias"] = kind if fields[name] else False
    else:
        found["bias"] = family.bias
    return found


def _read_mixers(family: Family, fields: Mapping[str, Any]) -> list[str]:
    layers = fields["num_hidden_layers"]
    if family.mamba is not None:
        attending = fields[family.mamba] or ()
        return ["*" if layer in attending else "M" for layer in range(layers)]
    is_on = family.window_switch is None or fields[family.window_switch]
    if family.windows == "listed":
        return [MIXERS[name] for name in fields["layer_types"]]
    is_window = family.windows == "all" and is_on and fields["sliding_window"]
    return ["W" if is_window else "*"] * layers


def _read_seconds(family: Family, fields: Mapping[str, Any]) -> list[str]:
    """The second block of each layer."""
    layers, experts = range(fields["num_hidden_layers"]), family.experts
    if experts is None:
        return ["-" for _ in layers]
    said: Any = None if experts.sparse == "all" else fields[experts.sparse]
    if experts.sparse == "mlp_layer_types":
        return ["E" if kind == "sparse" else "-" for kind in said]
    dense = range(said) if experts.sparse == "first_k_dense_replace" else said or ()
    return ["-" if layer in dense else "E" for layer in layers]


def _read_experts(experts: Experts, fields: Mapping[str, Any]) -> MoeConfig:
    settings = {ours: fields[theirs] for ours, theirs in experts.names.items()}
    if experts.shared is not None:
        said = fields[experts.shared.name]
        if not said:
            raise ValueError(f"config.json: {experts.shared.name}={said} cannot be imported; use 1 or more")
        settings["shared_expert_hidden_size"] = said * (settings["expert_hidden_size"] if experts.shared.counts else 1)
    return MoeConfig.model_validate({**settings, **experts.fixed})


def plain_fields(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own, with those that only other programs read."""
    fields = _fields_of_class(family, config)
    return fields | RELEASED.get(family.name, none_missing)({"hidden_size": config.hidden_size, **fields})


def _fields_of_class(family: Family, config: ModelConfig) -> dict[str, Any]:
    mixers, seconds, moe = config.letters[0::2], config.letters[1::2], config.moe
    fields: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.name,
        "num_hidden_layers": len(mixers),
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        family.activation[0]: family.activation[1],
        "attention_dropout": 0.0,
        **family.extra,
        **{name: value for name, value in family.refused.items() if value is not None},
    }
    fields |= _head_fields(family, config)
    if family.mamba is not None:
        assert config.mamba is not None, "the pattern has M, the configuration no mamba section"
        fields |= mamba_fields(config.mamba) | {"mamba_expand": config.mamba.inner_size() // config.hidden_size}
        fields[family.mamba] = [layer for layer, kind in enumerate(mixers) if kind in LAYER_TYPES]
    if family.windows != "none":
        window = _window(config).window if "W" in mixers else family.extra.get("sliding_window")
        fields["sliding_window"] = window
        if family.window_switch is not None:
            fields[family.window_switch] = window is not None
    if family.windows == "listed":
        fields["layer_types"] = [LAYER_TYPES[kind] for kind in mixers]
    if config.feed_forward is not None:
        fields["intermediate_size"] = config.feed_forward.hidden_size
    if family.experts is None or moe is None:
        return fields
    # Readers ask for it if no layer has it, too.
    fields.setdefault("intermediate_size", moe.expert_hidden_size)
    return fields | _expert_fields(family.experts, moe, seconds)


def _head_fields(family: Family, config: ModelConfig) -> dict[str, Any]:
    heads = config.attention if "*" in config.letters else _window(config)
    assert heads is not None, "the pattern has *, the configuration no attention section"
    rope = heads.rope() if isinstance(heads, WindowOptions) else heads.rope
    kv_heads = heads.kv_heads() if isinstance(heads, WindowOptions) else heads.num_kv_heads
    parameters = parameters_of(rope, heads.head_dim)
    if family.partial:
        parameters["partial_rotary_factor"] = rope.fraction if family.partial is True else family.partial
    fields = {
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": kv_heads,
        "rope_parameters": parameters,
        **flat_rope_fields(parameters),
    }
    if family.rope_by_type:
        fields["rope_parameters"] = dict.fromkeys(MIXERS, parameters) | _rope_by_type(config)
    if family.has_head_dim:
        fields["head_dim"] = heads.head_dim
    if family.scale is not None:
        # An integer there; what it cannot say comes back changed.
        fields[family.scale] = max(1, round((heads.softmax_scale or heads.head_dim**-0.5) ** -2))
    if family.qk_norm not in (True, False, "wide"):
        fields[str(family.qk_norm)] = heads.qk_norm
    if isinstance(family.bias, tuple):
        fields[family.bias[0]] = heads.bias == family.bias[1]
    return fields


def _rope_by_type(config: ModelConfig) -> dict[str, Any]:
    """The rotation of each kind of layer that the pattern has."""
    found: dict[str, Any] = {}
    if "*" in config.letters and config.attention is not None:
        found[LAYER_TYPES["*"]] = parameters_of(config.attention.rope, config.attention.head_dim)
    if "W" in config.letters:
        window = _window(config)
        found[LAYER_TYPES["W"]] = parameters_of(window.rope(), window.head_dim)
    return found


def _expert_fields(experts: Experts, moe: MoeConfig, seconds: tuple[str, ...]) -> dict[str, Any]:
    fields = {theirs: getattr(moe, ours) for ours, theirs in experts.names.items()}
    if experts.shared is not None:
        width = moe.expert_hidden_size if experts.shared.counts else 1
        fields[experts.shared.name] = moe.shared_expert_hidden_size // width or 1
    dense = [layer for layer, kind in enumerate(seconds) if SECONDS[kind] == "dense"]
    said = {
        "mlp_only_layers": dense,
        "first_k_dense_replace": len(dense),
        "mlp_layer_types": [SECONDS[kind] for kind in seconds],
    }
    return fields if experts.sparse == "all" else fields | {experts.sparse: said[experts.sparse]}


def _window(config: ModelConfig) -> WindowOptions:
    options = config.block_options("W")
    assert isinstance(options, WindowOptions), f"W has {type(options).__name__}"
    return options


def unfit_for_plain(family: Family, config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    reasons = _unfit_pattern(family, config) or list(_changed_settings(family, config))
    reasons += _unfit_factors(family, config)
    if family.mamba is not None and config.mamba is not None and config.mamba.inner_size() % config.hidden_size:
        rule = (
            f"Mamba2 of {family.name} is a whole number of times as wide as the residual stream, {config.hidden_size}"
        )
        reasons.append(f"model.mamba.num_heads={config.mamba.num_heads}: {rule}; change head_dim, or target own")
    if config.moe is not None and "E" in config.letters:
        reasons += unfit_expert_sizes(config, config.moe)
    return reasons


def _unfit_factors(family: Family, config: ModelConfig) -> list[str]:
    """Constant factors that the class has not, and that of its embeddings where ours is another."""
    wanted, found = math.sqrt(config.hidden_size), config.multipliers.embedding
    if not family.scales_embedding:
        return unfit_multipliers(config, family.name)
    rest = config.multipliers.model_copy(update={"embedding": 1.0})
    reasons = unfit_multipliers(config.model_copy(update={"multipliers": rest}), family.name)
    if found != wanted:
        rule = f"{family.name} multiplies embeddings by the root of the width; use {wanted}, or target own"
        reasons.append(f"model.multipliers.embedding={found}: {rule}")
    return reasons


def _unfit_pattern(family: Family, config: ModelConfig) -> list[str]:
    letters, experts = config.letters, family.experts
    mixers, seconds = letters[0::2], letters[1::2]
    first, second = "*" if family.windows == "none" else "*W", "-" if experts is None else "E"
    first += "M" if family.mamba is not None else ""
    rule = f"layers of {family.name} are pairs, {' or '.join(first)} and then {second}"
    dense = set() if experts is None or experts.sparse == "all" else {"-"}
    fits = len(mixers) == len(seconds) > 0 and set(mixers) <= set(first) and set(seconds) <= {second} | dense
    if dense:
        rule += " or -, at least one of them E"
        fits = fits and second in seconds
    if family.mamba is not None:
        rule += ", some of each"
        fits = fits and len(set(mixers)) == len(first)
    if family.windows == "all":
        rule += ", all of one kind"
        fits = fits and len(set(mixers)) == 1
    if experts is not None and experts.sparse == "first_k_dense_replace":
        rule += ", all - before the first E"
        fits = fits and seconds == tuple(sorted(seconds))
    if fits:
        return []
    return [f"model.pattern={''.join(letters)}: {rule}; use such a pattern, or target own"]


def _changed_settings(family: Family, config: ModelConfig) -> Iterator[str]:
    """Settings that would come back with another value."""
    around = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "initializer_range")}
    try:
        back = read_plain(family, around | plain_fields(family, config))
    except ValueError as error:
        yield f"{family.name} cannot hold this model: {error}; change it, or target own"
        return
    if back.norm_placement != config.norm_placement:
        rule = f"{family.name} has {back.norm_placement} there; use that, or target own"
        yield f"model.norm_placement={config.norm_placement}: {rule}"
    for kind, options in config.kinds_in_use():
        read = back.options_of(kind)
        assert read is not None, "both patterns have the same blocks"
        for name, (value, other) in _differences(_plain_rope(options), _plain_rope(read)):
            yield f"model.{kind.section}.{name}={value}: {family.name} has {other} there; use that, or target own"


def _differences(ours: Section, theirs: Section, prefix: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    """Fields, dotted, in which two sections differ, but for those that only training reads, with both values as YAML has them."""
    unread: frozenset[str] = getattr(ours, "training_only", frozenset())
    for name in type(ours).model_fields:
        value, other = getattr(ours, name), getattr(theirs, name)
        if name in unread or value == other:
            continue
        if isinstance(value, Section) and isinstance(other, Section):
            yield from _differences(value, other, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", (_shown(value), _shown(other))


def _plain_rope(options: Section) -> Section:
    """NTK-aware scaling is a larger base, and is written and read as one; so is what stands for the default of a scale."""
    changes: dict[str, Any] = {}
    rope = getattr(options, "rope", None)
    if isinstance(rope, RopeConfig):
        size = getattr(options, "head_dim", 0)
        changes["rope"] = rope_from_parameters(parameters_of(rope, size)).model_copy(update={"fraction": rope.fraction})
    if getattr(options, "softmax_scale", None) == getattr(options, "head_dim", 1) ** -0.5:
        changes["softmax_scale"] = None
    if isinstance(options, WindowOptions):
        changes["num_kv_heads"] = options.kv_heads()
    if isinstance(options, MoeConfig) and options.router_group_top_k == options.num_router_groups:
        # Every group may be used: there is no limit to rank them for.
        changes["num_router_groups"] = changes["router_group_top_k"] = 1
    return options.model_copy(update=changes)


def _shown(value: object) -> str:
    if isinstance(value, Section):
        return "a section"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def is_behind_the_last(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is of a layer after the last one, which predicts further ahead and is not read here."""
    return name.startswith(f"model.layers.{len(config.letters) // 2}.")


def _limits(config: ModelConfig) -> list[str]:
    return [IGNORED_ARGUMENTS]


def plain_class(family: Family) -> HfTarget:
    """The class of a row."""
    return HfTarget(
        name=family.name,  # type: ignore[arg-type]
        model_type=family.name,
        class_name=family.class_name,
        unfit=partial(unfit_for_plain, family),
        fields=partial(plain_fields, family),
        read=partial(read_plain, family),
        weights=partial(plain_map, family),
        refusals=partial(plain_refusals, family.name),
        limits=_limits,
        unfit_tokenizer=partial(needs_byte_level, family.name, "own") if family.byte_level_alone else any_tokenizer,
        # What it does not hold of them does not come back, which is said once.
        holds=frozenset((*RARE_OPTIONS, "norm_placement")),
        is_skipped=is_behind_the_last if family.depth_layers else nothing_skipped,
    )
