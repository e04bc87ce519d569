"""Checks of the section `low_precision`: what takes effect, what has been shown to compute right, and what a device has.

Rules that read only the configuration are checked with all others. What a GPU must have is checked where the run starts on
one (`check_device`), and left out with `emulate`, which multiplies wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from amfm.model.config.kinds import describe_symbol, kind_of
from amfm.model.config.low_precision import DEFAULT_LETTERS, LowPrecisionConfig
from amfm.model.config.pattern import parse_letters
from amfm.model.config.schema import has_indexer
from amfm.model.config.structure import DENSE
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig

if TYPE_CHECKING:
    import torch

    from amfm.model.low_precision import Matrix

SECTION = "low_precision"
HIDDEN = "experts.up"  # the weight whose products are hidden rows of experts
FIRST = frozenset({HIDDEN, "up_proj.weight"})  # the weights whose products are hidden rows


def low_precision_problems(config: RunConfig) -> Iterator[Problem]:
    """Check the section; the model's own rules must hold."""
    section = config.low_precision
    if section.recipe == "none":
        yield from without_recipe(section)
        return
    if has_indexer(config.model):
        rule = "was not tried with an indexer, whose choice would follow rounded scores"
        yield Problem(f"{SECTION}.recipe", rule, "use none, or leave the indexer out", section.recipe)
    places = list(place_problems(config))
    yield from places
    yield from excluded_problems(config)
    if not places:
        yield from factor_problems(config)
        yield from bias_problems(config)
    if not places and not section.emulate:
        yield from width_problems(config)


def bias_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject experts with biases; letters of the section must be those of kinds."""
    chosen = config.low_precision.chosen(config.model.letters)
    for key, moe in config.model.expert_sections():
        if moe.bias and any(HIDDEN in config.low_precision.recipes_of(symbol) for symbol in chosen):
            rule = "was not tried with biases of experts, which are columns of their matrices"
            yield Problem(
                f"{SECTION}.recipe", rule, f"leave E out of low_precision.block_types, or use {key}.bias: false"
            )


def without_recipe(section: LowPrecisionConfig) -> Iterator[Problem]:
    """Reject settings that nothing reads."""
    for name, value in section:
        if value != type(section).model_fields[name].default:
            rule = "has no effect with low_precision.recipe=none"
            remedy = f"set a recipe: fp8_block on Hopper, mxfp8 or nvfp4 on Blackwell; or remove {name}"
            yield Problem(f"{SECTION}.{name}", rule, remedy, str(value).lower() if value is True else str(value))


def place_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that letters and wide blocks leave some blocks narrow, and that each setting reaches a weight."""
    section, letters = config.low_precision, config.model.letters
    present, key = set(letters), f"{SECTION}.block_types"
    usable = " ".join(sorted(symbol for symbol in present if kind_of(symbol).products.inner))
    try:
        chosen = parse_letters(section.block_types)
    except ValueError as error:
        yield Problem(key, str(error), f"the pattern has {usable or 'no kind with products'}", section.block_types)
        return
    is_default = section.block_types == DEFAULT_LETTERS
    for symbol in [] if is_default else sorted(chosen):
        rule = ""
        if symbol not in present:
            rule = f"names {symbol}, and model.pattern has no such block"
        elif not kind_of(symbol).products.inner:
            rule = f"names {symbol}, and {describe_symbol(symbol)} has no products that use a recipe"
        if rule:
            yield Problem(key, rule, f"use some of {usable}" if usable else "use recipe none", section.block_types)
    if section.bf16_last_layers >= 1 and not section.bf16_last_layers.is_integer():
        yield Problem(
            f"{SECTION}.bf16_last_layers",
            "must be a whole number of blocks, or a part of all below 1",
            f"use {int(section.bf16_last_layers)}, or {section.bf16_last_layers / len(letters):.2f}",
            f"{section.bf16_last_layers:g}",
        )
    if not chosen & present:
        remedy = f"use some of {usable}" if usable else "use recipe none"
        yield Problem(key, "names no block of model.pattern", remedy, section.block_types)
    elif not section.narrow_blocks(letters):
        rule = (
            f"leaves no narrow block: {len(letters)} blocks less low_precision.bf16_first_layers and bf16_last_layers"
        )
        yield Problem(f"{SECTION}.recipe", rule, "lower those two, or use recipe none", section.recipe)
    if section.out_proj_recipe is not None and not any(kind_of(symbol).products.out for symbol in chosen & present):
        rule = "is about output projections of Mamba2 and linear mixers, of which low_precision.block_types names none"
        yield Problem(f"{SECTION}.out_proj_recipe", rule, "remove it", section.out_proj_recipe)
    if section.activation_storage != "bf16" and not any(
        FIRST & set(section.recipes_of(symbol)) for symbol in chosen & present
    ):
        rule = "is about hidden rows of experts and feed-forwards, which low_precision.block_types does not name"
        yield Problem(f"{SECTION}.activation_storage", rule, "remove it, or name E or -", section.activation_storage)
    if section.dispatch != "bf16":
        if not any(HIDDEN in section.recipes_of(symbol) for symbol in chosen & present):
            rule = "is about tokens on their way to experts, which low_precision.block_types does not name"
            yield Problem(f"{SECTION}.dispatch", rule, "remove it, or name E", section.dispatch)
        elif config.parallel.expert == 1:
            rule = "is about tokens on their way to other ranks, and parallel.expert is 1"
            yield Problem(f"{SECTION}.dispatch", rule, "remove it, or spread experts", section.dispatch)
    if section.out_proj_recipe == "mxfp8" and section.recipe == "mxfp8":
        rule = "is what low_precision.recipe=mxfp8 does to all products"
        yield Problem(f"{SECTION}.out_proj_recipe", rule, "remove it, or use bf16", "mxfp8")


def excluded_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject what has not been built or shown to compute the same together with a recipe."""
    section, model = config.low_precision, config.model
    key, recipe = f"{SECTION}.recipe", section.recipe
    if config.train.precision == "float32" and not section.emulate:
        rule = "narrows products of bf16, and train.precision is float32"
        yield Problem(key, rule, "use train.precision=bf16, or low_precision.emulate=true", recipe)
    if config.parallel.zero_stage == 3:
        rule = f"gathers weights for each pass, and low_precision.recipe={recipe} would quantize them at each gather"
        yield Problem("parallel.zero_stage", rule, "use 0, 1 or 2, or low_precision.recipe=none", "3")
    if config.train.compile:
        rule = f"is not for low_precision.recipe={recipe}, whose products torch.compile does not see"
        yield Problem("train.compile", rule, "use false, or low_precision.recipe=none", "true")
    if config.kernels.backend == "reference":
        rule = f"computes step by step in float32, and low_precision.recipe={recipe} would have no effect"
        yield Problem("kernels.backend", rule, "use auto, or low_precision.recipe=none", "reference")
    refused = {
        "model.self_guided_training": model.self_guided_training,
        "model.lora_mixer": model.lora_mixer,
        "convert": config.convert,
    }
    for name, value in refused.items():
        if value is not None:
            rule = f"changes what weights are on the way, and has not been tried with low_precision.recipe={recipe}"
            yield Problem(name, rule, "use low_precision.recipe=none until it is over")


def factor_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject matrices of two factors in narrow blocks, which would stay wide without a word."""
    section, model = config.low_precision, config.model
    for symbol in sorted(section.chosen(model.letters)):
        if any(part.structure != DENSE for part in model.block_options(symbol).feed_forwards() if part.inner):
            rule = f"has products of two factors a matrix in blocks {symbol}, which no recipe supports"
            yield Problem(
                f"{SECTION}.block_types", rule, f"leave {symbol} out, or use dense matrices", section.block_types
            )


def width_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that products on a rank have operands of whole 16-byte pieces."""
    from amfm.kernels.low_precision.recipe import WIDTH_MULTIPLE
    from amfm.model.low_precision import narrow_matrices

    section = config.low_precision
    for symbol in sorted(section.chosen(config.model.letters)):
        for matrix, recipe in narrow_matrices(config.model, section, symbol):
            multiple, rows, columns = WIDTH_MULTIPLE[recipe], *own_widths(matrix, config)
            if rows % multiple or columns % multiple:
                rule = (
                    f"needs matrices whose widths on a rank are multiples of {multiple}, and {matrix.name} of blocks "
                    f"{symbol} is {rows:,} x {columns:,} there"
                )
                remedy = (
                    f"leave {symbol} out of low_precision.block_types, change the width or the tensor ranks, or emulate"
                )
                yield Problem(f"{SECTION}.recipe", rule, remedy, section.recipe)


def own_widths(matrix: Matrix, config: RunConfig) -> tuple[int, int]:
    """Rows and columns of a weight on a rank."""
    parallel = config.parallel
    sizes = {"tp": parallel.tensor, "expt_tp": parallel.expert_tensor_size()}
    shape = list(matrix.shape)
    for cut in matrix.shard.cuts:
        if cut.axis in sizes:
            shape[cut.dim] = sum(cut.local_segments(sizes[cut.axis]))
    return shape[-2], shape[-1]


def warn_of_recipe(section: LowPrecisionConfig) -> str | None:
    """What a start says of a recipe that may cost accuracy; None for nothing."""
    if section.recipe == "nvfp4" and section.bf16_last_layers == 0:
        return (
            "low_precision.recipe=nvfp4 without bf16_last_layers: models were trained so with the last 15% of their blocks wide; "
            "low_precision.bf16_last_layers=0.15 does that"
        )
    return None


def check_device(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError for a recipe whose products this device does not have."""
    problems = list(device_problems(config, device))
    if problems:
        raise ConfigError(problems)


def device_problems(config: RunConfig, device: torch.device) -> Iterator[Problem]:
    """Find recipes of products that this device does not have."""
    section = config.low_precision
    if section.recipe == "none" or section.emulate:
        return
    import torch

    from amfm.kernels.low_precision.recipe import FIRST_CAPABILITY

    letters = config.model.letters
    recipes = {recipe for symbol in section.chosen(letters) for recipe in section.recipes_of(symbol).values()}
    for recipe in sorted(recipes):
        least = FIRST_CAPABILITY[recipe]
        have = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if have is None or have < least:
            name = "a CPU" if have is None else f"{torch.cuda.get_device_name(device)} (sm_{have[0]}{have[1]})"
            rule = f"has products on sm_{least[0]}{least[1]} and later, and this run is on {name}"
            remedy = "use low_precision.emulate=true to study it here, or recipe none"
            yield Problem(f"{SECTION}.recipe", rule, remedy, recipe)
