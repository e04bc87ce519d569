"""Rules of registered mixers: what ranks can share of them, and what they cannot do yet."""

from __future__ import annotations

from collections.abc import Iterator

from model.mixers.options import MixerOptions
from model.mixers.registry import MixerSpec, mixer_specs
from model.pattern import mixer_name, parse_pattern
from pretrain.config import RunConfig
from pretrain.config_errors import Problem


def mixers_in_use(config: RunConfig) -> Iterator[tuple[MixerSpec, MixerOptions]]:
    """The registered mixers of the pattern, and those inside them, that have options.

    The model's own rules report what is wrong with others.
    """
    try:
        letters = parse_pattern(config.model.pattern).letters
    except ValueError:
        return
    specs = mixer_specs()
    for name in dict.fromkeys(mixer_name(letter) for letter in letters):
        options = None if name is None else getattr(config.model.mixers, name, None)
        if name is not None and options is not None:
            yield specs[name], options
            inside = options.wraps()
            if inside in specs and getattr(config.model.mixers, inside) is not None:
                yield specs[inside], getattr(config.model.mixers, inside)


def refusal_problems(config: RunConfig) -> Iterator[Problem]:
    """Axes over which a mixer of the pattern cannot be spread."""
    section = config.parallel
    for spec, _ in mixers_in_use(config):
        for axis, reason in spec.refuses.items():
            ranks = getattr(section, axis)
            if ranks > 1:
                rule = f"cannot spread the mixer {spec.symbol} of model.pattern: {reason}"
                yield Problem(f"parallel.{axis}", rule, "use 1, or another mixer", str(ranks))


def longest_lookback(config: RunConfig) -> tuple[int, str]:
    """The most tokens before a segment that a registered mixer reads, and the setting that says so; (0, "") for none."""
    found = [(options.lookback(), spec.name) for spec, options in mixers_in_use(config)]
    return max(((tokens, f"model.mixers.{name}.{field}") for (tokens, field), name in found), default=(0, ""))
