"""Check the rules that fields and sections of a model's configuration obey together, before anything is allocated.

pydantic checks each field on its own (type, bounds, unknown keys). What relates one field to another is checked here,
and not in validators of the sections: a rule may need the pattern or the registry of mixers, and every message can name the
full key as it stands in the file (`model.moe.top_k`), its value and the fix. No torch is imported, so a bad file is
rejected before a device is touched. Rules that depend on the number of ranks are checked where shards are made
(parallel/shards.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from operator import attrgetter

from amfm.model.config.kinds import Kind, all_kinds, describe_symbol, find_kind, kind_of, registered_kinds
from amfm.model.config.mixer_options import LinearOptions
from amfm.model.config.mup import check_mup
from amfm.model.config.plugins import until_registered
from amfm.model.config.schema import ModelConfig
from amfm.model.config.section import Section
from amfm.model.config.streams import STREAMS

MOST = 2**31 - 1  # of any size in a section


@until_registered
@lru_cache(maxsize=256)
def check_model(config: ModelConfig) -> None:
    """Raise ValueError with value, rule and fix for the first broken rule; a configuration that passed is not read again.

    A section whose letter the pattern lacks is not read, so that one file can serve several patterns; its own rules are
    checked anyway.
    """
    try:
        pattern = config.parsed_pattern
    except ValueError as error:
        raise ValueError(f"model.{error}") from error
    if config.mtp is not None and not pattern.num_depths:
        raise ValueError(
            "model.mtp is set but model.pattern has no MTP layer that reads it; put one after the main blocks, "
            "such as /*E, or remove model.mtp"
        )
    for symbol in dict.fromkeys((*pattern.counts(), *pattern.depth_letters)):
        for kind in kind_of(symbol).parts:
            if config.options_of(kind) is None:
                raise ValueError(
                    f"model.pattern has {symbol!r} ({describe_symbol(symbol)}) but model.{kind.section} is missing; "
                    f"add model.{kind.section} or remove {symbol!r} out of the pattern"
                )
            _check_wrapped(config, kind)
    if sum(getattr(config, name) is not None for name in STREAMS) > 1:
        keys = " and ".join(f"model.{name}" for name in STREAMS)
        raise ValueError(f"{keys} are both set, and a model has one kind of residual stream; remove one of the two")
    if config.mup is not None:
        check_mup(config)
    if config.megatron_init and any(True for _ in config.variants.items()):
        raise ValueError(
            "model.megatron_init=true draws by model.mamba and has no rule for model.variants; use false, or remove the variants"
        )
    _check_head(config)
    for kind, options in config.sections():
        _check_rules(f"model.{kind.section}", options, _beyond(options))
        _check_rules(f"model.{kind.section}", options, options.broken_rules())
        _check_rules(f"model.{kind.section}", options, options.broken_widths(config.hidden_size))
    if config.lora_mixer is not None:
        _check_rules("model.lora_mixer", config.lora_mixer, config.lora_mixer.broken_rules())
    if config.self_guided_training is not None and not config.has_factors():
        raise ValueError(
            "model.self_guided_training has no effect: no block of model.pattern has factored matrices; set linear_kind, or remove the guide"
        )


def _check_head(config: ModelConfig) -> None:
    """A head of a package has its section, stands in no pattern, and goes with nothing that is said of the matrix."""
    heads = {kind.symbol for kind in all_kinds().values() if kind.mixes == "logits"}
    for symbol in config.built_letters:
        if symbol in heads:
            raise ValueError(
                f"model.pattern has {symbol}, which is a head; set model.head: {symbol.strip('{}')} instead"
            )
    if config.head is None:
        return
    kind = find_kind(config.head)
    if kind.symbol not in heads:
        raise ValueError(f"model.head={config.head} is a block, not a head; put {kind.symbol} into model.pattern")
    if config.options_of(kind) is None:
        raise ValueError(
            f"model.head={config.head} reads model.{kind.section}, which is missing; add model.{kind.section}"
        )
    of_matrix = {
        "tie_embeddings": config.tie_embeddings,
        "mup": config.mup is not None,
        "logits_z_loss_weight": config.logits_z_loss_weight != 0,
        "multipliers.logits": config.multipliers.logits != 1,
        "pattern (its MTP layers)": config.num_depths > 0,
    }
    for name in (name for name, is_set in of_matrix.items() if is_set):
        raise ValueError(
            f"model.{name} is of a head that is a matrix, and model.head={config.head} is none; remove one"
        )


def _check_wrapped(config: ModelConfig, kind: Kind) -> None:
    """A kind that wraps another one finds that one's options, and it is linear."""
    options = config.options_of(kind)
    inside = None if options is None else options.wraps()
    if inside is None:
        return
    key = f"model.{kind.section}.mixer={inside}"
    linear = {each.name: each for each in registered_kinds().values() if issubclass(each.options, LinearOptions)}
    if inside not in linear:
        raise ValueError(f"{key} must be a linear mixer; use one of {', '.join(linear)}")
    section = linear[inside].section
    if config.options_of(linear[inside]) is None:
        raise ValueError(f"{key} reads model.{section}, which is missing; add model.{section}")


def _beyond(options: Section) -> Iterator[tuple[str, str]]:
    """Sizes with which PyTorch can no longer count a tensor's numbers."""
    for name, value in options:
        if type(value) is int and value > MOST:
            yield name, f"must be at most {MOST:,}; lower it"


def _check_rules(key: str, section: Section, broken: Iterator[tuple[str, str]]) -> None:
    """Report the first rule that the fields of a section break, under their full key and with their value."""
    for field, rule in broken:
        value = attrgetter(field)(section)
        shown = "" if isinstance(value, Section) else f"={str(value).lower() if isinstance(value, bool) else value}"
        raise ValueError(f"{key}.{field}{shown} {rule}")
