"""Check the rules that fields and sections of a model's configuration obey together, before anything is allocated.

pydantic checks each field by itself (type, bounds, unknown keys). What relates one field to another is checked here, and
not in validators of the sections: a rule may need the pattern or the registry of mixers, and every message can name the
full key as it stands in the file (`model.moe.top_k`), its value and the remedy. No torch is imported, so a bad file is
refused before a device is touched. Rules that depend on the number of ranks are checked where shards are made
(parallel/shards.py).
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter

from amfm.model.config.mixer_options import LinearOptions
from amfm.model.config.mixer_registry import describe_symbol, find_spec, mixer_specs
from amfm.model.config.mup import check_mup
from amfm.model.config.pattern import SECTIONS, mixer_name
from amfm.model.config.schema import AttentionConfig, Mamba2Config, ModelConfig, MoeConfig, RopeConfig
from amfm.model.config.structure import DENSE


@lru_cache(maxsize=256)
def check_model(config: ModelConfig) -> None:
    """Raise ValueError with value, rule and remedy for the first broken rule; a configuration that passed is not read again.

    A section whose letter the pattern lacks is not read, so that one file can serve several patterns; its own rules are
    checked all the same.
    """
    try:
        pattern = config.parsed_pattern
    except ValueError as error:
        raise ValueError(f"model.{error}") from error
    if config.mtp is not None and not pattern.num_depths:
        raise ValueError(
            "model.mtp is set but model.pattern has no prediction depth that reads it; put depths behind the main blocks, "
            "such as /*E, or remove model.mtp"
        )
    for letter in dict.fromkeys((*pattern.counts(), *pattern.depth_letters)):
        name = mixer_name(letter)
        if name is not None:
            find_spec(name)
        section = SECTIONS.get(letter, f"mixers.{name}")
        if attrgetter(section)(config) is None:
            raise ValueError(
                f"model.pattern has {letter!r} ({describe_symbol(letter)}) but model.{section} is missing; "
                f"add model.{section} or take {letter!r} out of the pattern"
            )
        if name is not None:
            _check_wrapped(config, name)
    for name in mixer_specs():
        _check_mixer(config, name)
    if config.mup is not None:
        check_mup(config)
    if config.mamba is not None:
        _check_mamba(config.mamba)
    if config.attention is not None:
        _check_attention(config.attention)
    if config.moe is not None:
        _check_moe(config.moe)
        _check_structure(
            config, "model.moe.shared_expert_", config.moe.shared_expert_hidden_size, config.moe.activation
        )
    if config.feed_forward is not None:
        dense = config.feed_forward
        _check_structure(config, "model.feed_forward.", dense.hidden_size, dense.activation)
    routed = config.lora_mixer
    if routed is not None and routed.top_k > routed.num_experts:
        raise ValueError(
            f"model.lora_mixer.top_k={routed.top_k} is more than num_experts={routed.num_experts}; lower it to at most that"
        )
    if config.guide is not None and not config.has_factors():
        raise ValueError(
            "model.guide has no effect: no block of model.pattern has factored matrices; set linear_kind, or remove the guide"
        )


def _check_wrapped(config: ModelConfig, name: str) -> None:
    """A mixer that wraps another one finds that one's options, and it is linear."""
    inside = getattr(config.mixers, name).wraps()
    if inside is None:
        return
    key = f"model.mixers.{name}.mixer={inside}"
    linear = [spec.name for spec in mixer_specs().values() if issubclass(spec.options, LinearOptions)]
    if inside not in linear:
        raise ValueError(f"{key} must be a linear mixer; use one of {', '.join(linear)}")
    if getattr(config.mixers, inside) is None:
        raise ValueError(f"{key} reads model.mixers.{inside}, which is missing; add model.mixers.{inside}")


def _check_mixer(config: ModelConfig, name: str) -> None:
    """Report the first rule that the options of a registered mixer say is broken, under their full key."""
    options = getattr(config.mixers, name)
    for field, rule in () if options is None else options.broken_rules():
        raise ValueError(f"model.mixers.{name}.{field}={getattr(options, field)} {rule}")


def _check_mamba(mamba: Mamba2Config) -> None:
    _check_divides("model.mamba.num_groups", mamba.num_groups, "model.mamba.num_heads", mamba.num_heads)
    for low, high in (("a_init_min", "a_init_max"), ("time_step_min", "time_step_max")):
        if getattr(mamba, low) > getattr(mamba, high):
            raise ValueError(
                f"model.mamba.{low}={getattr(mamba, low)} must not exceed model.mamba.{high}={getattr(mamba, high)}; "
                "swap them"
            )


def _check_attention(attention: AttentionConfig) -> None:
    _check_divides(
        "model.attention.num_kv_heads", attention.num_kv_heads, "model.attention.num_heads", attention.num_heads
    )
    if attention.positions == "rope":
        _check_rope(attention.rope, attention.head_dim)
    elif attention.rope != RopeConfig():
        raise ValueError(
            "model.attention.rope is set but model.attention.positions=none never reads it; "
            "use positions: rope, or remove the rope section"
        )


def _check_rope(rope: RopeConfig, head_dim: int) -> None:
    """Check that whole pairs of channels rotate, and that only the fields of the chosen scaling are set."""
    rotated = head_dim * rope.fraction
    if rotated != int(rotated) or int(rotated) % 2 or rotated < 2:
        raise ValueError(
            f"model.attention.rope.fraction={rope.fraction} of head_dim={head_dim} rotates {rotated:g} channels; "
            "they must be an even whole number of at least 2: change fraction or head_dim"
        )
    if rope.scaling == "ntk" and rotated < 4:
        raise ValueError(
            f"model.attention.rope.scaling=ntk needs at least 4 rotated channels, not {rotated:g}; raise head_dim or fraction"
        )
    if rope.theta <= 1:
        raise ValueError(f"model.attention.rope.theta={rope.theta} must be above 1; use 10000")
    # A field of another scaling would be read by nothing, so it is refused and not ignored.
    needed = {
        "ntk": ("ntk_alpha",),
        "yarn": ("yarn_factor", "yarn_original_length"),
        "llama3": ("llama3",),
        "none": (),
    }
    for scaling, fields in needed.items():
        for field in fields:
            value = getattr(rope, field)
            if rope.scaling == scaling and value is None:
                raise ValueError(f"model.attention.rope.scaling={scaling} needs model.attention.rope.{field}; set it")
            if rope.scaling != scaling and value is not None:
                raise ValueError(
                    f"model.attention.rope.{field}={value} is only read with scaling: {scaling}, not {rope.scaling}; "
                    f"remove it or set scaling: {scaling}"
                )
    if rope.scaling != "yarn" and (rope.yarn_beta_fast, rope.yarn_beta_slow) != (32.0, 1.0):
        raise ValueError(
            "model.attention.rope.yarn_beta_fast and yarn_beta_slow are only read with scaling: yarn, "
            f"not {rope.scaling}; remove them or set scaling: yarn"
        )
    if rope.llama3 is not None and rope.llama3.slow_turns >= rope.llama3.fast_turns:
        raise ValueError(
            f"model.attention.rope.llama3.slow_turns={rope.llama3.slow_turns} must be under "
            f"fast_turns={rope.llama3.fast_turns}; use 1 and 4"
        )
    if rope.yarn_beta_slow >= rope.yarn_beta_fast:
        raise ValueError(
            f"model.attention.rope.yarn_beta_slow={rope.yarn_beta_slow} must be under yarn_beta_fast={rope.yarn_beta_fast}; "
            "use 1 and 32"
        )


def _check_moe(moe: MoeConfig) -> None:
    """Check that every token finds top_k different experts in the groups it may use, and that options have an effect."""
    if moe.top_k > moe.num_experts:
        raise ValueError(
            f"model.moe.top_k={moe.top_k} must be at most model.moe.num_experts={moe.num_experts}; lower top_k"
        )
    _check_divides("model.moe.num_router_groups", moe.num_router_groups, "model.moe.num_experts", moe.num_experts)
    if moe.router_group_top_k > moe.num_router_groups:
        raise ValueError(
            f"model.moe.router_group_top_k={moe.router_group_top_k} must be at most "
            f"model.moe.num_router_groups={moe.num_router_groups}; lower it"
        )
    group_size = moe.num_experts // moe.num_router_groups
    if moe.num_router_groups > 1 and group_size < 2:
        raise ValueError(
            f"model.moe.num_router_groups={moe.num_router_groups} leaves {group_size} expert a group; a group is judged by "
            "its two best experts: use fewer groups"
        )
    reachable = moe.router_group_top_k * group_size
    if moe.top_k > reachable:
        raise ValueError(
            f"model.moe.top_k={moe.top_k} must be at most the {reachable} experts that router_group_top_k="
            f"{moe.router_group_top_k} groups of {group_size} hold; lower top_k or raise router_group_top_k"
        )
    if moe.shared_expert_gate and not moe.shared_expert_hidden_size:
        raise ValueError(
            "model.moe.shared_expert_gate=true needs model.moe.shared_expert_hidden_size above 0: there is no shared "
            "expert to gate; set its size, or remove the gate"
        )
    if moe.expert_bias and moe.router != "sigmoid":
        raise ValueError(
            f"model.moe.expert_bias=true needs model.moe.router=sigmoid, not {moe.router}; "
            "use router: sigmoid, or balance with auxiliary_loss_weight"
        )
    if moe.overflow == "recycle" and moe.capacity_factor is None:
        raise ValueError(
            "model.moe.overflow=recycle needs model.moe.capacity_factor: without it no expert is ever full; "
            "set capacity_factor: 1.5, or remove overflow"
        )
    if moe.overflow == "recycle" and moe.capacity_factor is not None and moe.capacity_factor < 1:
        raise ValueError(
            f"model.moe.overflow=recycle needs model.moe.capacity_factor of at least 1, not {moe.capacity_factor}: "
            "experts have room for fewer choices than there are; raise it, or use overflow: drop"
        )


def _check_structure(config: ModelConfig, prefix: str, inner: int, activation: str) -> None:
    """Check the form of the matrices of a feed-forward whose settings begin with `prefix`, `inner` wide; 0: there is none."""
    is_shared = prefix.startswith("model.moe")
    if is_shared:
        assert config.moe is not None, "the caller has checked it"
        structure = config.moe.shared_structure()
    else:
        assert config.feed_forward is not None, "the caller has checked it"
        structure = config.feed_forward.structure()
    if is_shared and not inner and structure != DENSE:
        raise ValueError(
            f"{prefix}linear_kind={structure.kind} has no effect with model.moe.shared_expert_hidden_size=0: there is no "
            "shared expert, and routed experts are dense; set its size, or remove this"
        )
    rows = 2 * inner if activation == "swiglu" else inner
    values = {"linear_rank": structure.rank, "linear_blocks": structure.blocks}
    for field, rule in structure.broken_rules(config.hidden_size, inner, rows):
        raise ValueError(f"{prefix}{field}={values[field]} {rule}")


def _check_divides(part_name: str, part: int, whole_name: str, whole: int) -> None:
    """Raise ValueError with the divisors to choose from where `part` does not divide `whole`."""
    if whole % part:
        divisors = [number for number in range(1, whole + 1) if whole % number == 0]
        shown = ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")
        raise ValueError(f"{part_name}={part} must divide {whole_name}={whole}; use one of {shown}")
