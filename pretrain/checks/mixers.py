"""Checks of registered mixers: over which axes ranks can share them, and which kernels take their sizes.

A mixer says in its registration what it cannot do (`MixerSpec.refuses`) and in its options which sizes its scan has, so
these rules name no mixer but Mamba2, which has a section of its own. A wrapper such as mixture of memories runs another
mixer inside, and that one's limits hold too.
"""

from __future__ import annotations

from collections.abc import Iterator

from amfm.kernels.common.limits import DECAY_LIMITS, ScanLimits
from amfm.model.config.mixer_options import MixerOptions
from amfm.model.config.mixer_registry import MixerSpec, mixer_specs
from amfm.model.config.pattern import mixer_name
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig


def mixers_in_use(config: RunConfig) -> Iterator[tuple[MixerSpec, MixerOptions]]:
    """Iterate over the registered mixers of the pattern, and those they wrap, that have options.

    The model's own rules report what is wrong with others.
    """
    try:
        letters = config.model.built_letters
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
    """Refuse axes over which a mixer of the pattern cannot be spread."""
    section = config.parallel
    for spec, _ in mixers_in_use(config):
        for axis, reason in spec.refuses.items():
            ranks = getattr(section, axis)
            if ranks > 1:
                rule = f"cannot spread the mixer {spec.symbol} of model.pattern: {reason}"
                yield Problem(f"parallel.{axis}", rule, "use 1, or another mixer", str(ranks))


def longest_lookback(config: RunConfig) -> tuple[int, str]:
    """Find the most tokens before a segment that a registered mixer reads, and the setting that says so; (0, "") for none."""
    found = []
    for spec, options in mixers_in_use(config):
        tokens, field = options.lookback()
        found.append((tokens, f"model.mixers.{spec.name}.{field}={getattr(options, field)}" if field else ""))
    return max(found, default=(0, ""))


def check_kernels(config: RunConfig, backend: str) -> None:
    """Raise ConfigError for sizes that the kernels of this backend do not take; `auto` must be resolved."""
    problems = list(kernel_problems(config, backend))
    if problems:
        raise ConfigError(problems)


def kernel_problems(config: RunConfig, backend: str) -> Iterator[Problem]:
    """Check that the Triton kernels take the chunks and states of all scans; nothing for other backends.

    A kernel keeps a head's state and a chunk's products on chip, so both have bounds (`kernels/common/limits.py`).
    """
    if backend != "triton":
        return
    for key, limits, chunk_size, (rows, columns) in _scans(config):
        if not limits.takes_chunk(chunk_size):
            rule = f"must be {limits.describe_chunks()} for Triton kernels"
            yield Problem(f"{key}.chunk_size", rule, "use 64, or kernels.backend=torch", str(chunk_size))
        if not limits.takes_state(rows, columns):
            rule = (
                f"has heads with a state of {rows} x {columns}, and Triton kernels hold up to {limits.describe_state()}"
            )
            yield Problem(key, rule, "use smaller heads or states, or kernels.backend=torch")


def _scans(config: RunConfig) -> Iterator[tuple[str, ScanLimits, int, tuple[int, int]]]:
    """Find each kind of block that scans: its section, kernel limits, tokens a chunk, and a head's state (rows, columns)."""
    mamba = config.model.mamba
    if mamba is not None and "M" in config.model.pattern:
        yield "model.mamba", DECAY_LIMITS, mamba.chunk_size, (mamba.state_size, mamba.head_dim)
    for spec, options in mixers_in_use(config):
        scan = options.scan()
        if scan is not None:
            yield f"model.mixers.{spec.name}", *scan
