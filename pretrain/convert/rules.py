"""What a conversion needs before it starts: blocks that can be converted, and a mixer that keeps the teacher's weights."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.model.config.attention import AttentionConfig
from amfm.model.config.kinds import describe_symbol, registered_kinds
from amfm.model.config.rope import Llama3Stretch
from amfm.model.config.window_linear import WindowLinearOptions
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.convert.stages import ATTENTION, WINDOW_LINEAR, conversion_of, conversion_stages, converted_blocks


def check_conversion(config: RunConfig, world_size: int | None = None) -> None:
    """Refuse a conversion whose settings do not fit together, and any stage of it that could not run.

    Raises ConfigError with every broken rule. Touches no device and reads no file.
    """
    problems = list(rule_problems(config))
    if problems:
        raise ConfigError(problems)
    for stage in conversion_stages(config):
        check_run(stage.config, world_size)


def rule_problems(config: RunConfig) -> Iterator[Problem]:
    """Check the rules that are the conversion's own."""
    if config.convert is None:
        yield Problem("convert", "is missing", "name at least convert.teacher and convert.tune.steps")
        return
    if config.convert.stage is not None:
        rule = "names a stage's own run, which `amfm train` starts"
        yield Problem("convert.stage", rule, "give `amfm convert` the file that has none", config.convert.stage)
    if config.data.probe is not None:
        rule = "is a synthetic task, and a conversion measures text"
        yield Problem(
            "data.probe", rule, "give data.store and data.sources, and a teacher of text", config.data.probe.task
        )
    if config.data.validation_fraction == 0:
        rule = "leaves nothing to measure the converted model on"
        yield Problem("data.validation_fraction", rule, "use for example 0.02", "0")
    for key, value in (("train.steps", config.train.steps), ("run.initial_weights", config.run.initial_weights)):
        if value is not None:
            rule = "has no effect in a conversion, whose stages have their own"
            yield Problem(key, rule, "remove it", str(value))
    if config.model.num_depths:
        rule = "has depths of multi-token prediction, which a conversion does not tune"
        yield Problem("model.pattern", rule, "leave them out: the teacher's are ignored then", config.model.pattern)
    yield from routing_problems(config)
    yield from block_problems(config)
    yield from mixer_problems(config)


def routing_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the updates a router chooses among are the conversion's own, and that it can choose so many."""
    routing = conversion_of(config).tune.routing
    if config.model.lora_mixer is not None:
        rule = "is what convert.tune.routing gives a model, and a teacher has none"
        yield Problem("model.lora_mixer", rule, "remove it, and give the teacher that the updates were made for")
    if routing is not None and routing.top_k > routing.num_experts:
        rule = f"is more than convert.tune.routing.num_experts={routing.num_experts}"
        yield Problem("convert.tune.routing.top_k", rule, "lower it to at most that", str(routing.top_k))
    if routing is not None and routing.hard_from_step is not None:
        key, steps = "convert.tune.routing.hard_from_step", conversion_of(config).tune.steps
        if routing.hard_from_step >= steps:
            rule = (
                f"must be less than convert.tune.steps={steps}, or the choices that the result makes are never trained"
            )
            yield Problem(key, rule, "lower it, or leave it out", str(routing.hard_from_step))
        if routing.top_k == routing.num_experts:
            rule = f"has no effect with convert.tune.routing.top_k={routing.top_k}, by which all updates count anyway"
            yield Problem(key, rule, "lower top_k, or leave it out", str(routing.hard_from_step))


def block_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the blocks are there, and that they are softmax attention."""
    convert, letters = conversion_of(config), config.model.letters
    if convert.blocks is not None and convert.keep:
        yield Problem("convert.keep", "is given beside convert.blocks, which says the same", "remove one of them")
    for key, blocks in (("blocks", convert.blocks or ()), ("keep", convert.keep)):
        for index in blocks:
            if not 0 <= index < len(letters):
                rule = f"must be below {len(letters)}, the number of blocks in model.pattern"
                yield Problem(f"convert.{key}", rule, "count from 0", str(index))
            elif letters[index] != ATTENTION:
                rule = f"is {letters[index]} ({describe_symbol(letters[index])}), and only softmax attention (*) is converted"
                attention = [str(place) for place, letter in enumerate(letters) if letter == ATTENTION]
                yield Problem(f"convert.{key}", rule, f"use some of {', '.join(attention) or 'none'}", str(index))
    if ATTENTION not in letters:
        yield Problem(
            "model.pattern", "has no softmax attention (*) to convert", "give another teacher", config.model.pattern
        )
    elif not converted_blocks(config):
        yield Problem("convert.keep", "keeps every attention block", "leave out those to convert", str(convert.keep))


def mixer_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the new mixer is known, has options, and computes from the teacher's weights what they were trained for."""
    convert = conversion_of(config)
    if convert.to not in registered_kinds():
        yield Problem("convert.to", "is no registered mixer", f"use one of {', '.join(registered_kinds())}", convert.to)
        return
    options = getattr(config.model.mixers, convert.to)
    if options is None:
        rule = f"is missing, and convert.to={convert.to} needs its options"
        yield Problem(f"model.mixers.{convert.to}", rule, "add the section")
        return
    if convert.to != WINDOW_LINEAR:
        if convert.transfer is not None:
            rule = f"trains the features of window_linear, and convert.to={convert.to}"
            yield Problem("convert.transfer", rule, "remove it: convert.tune trains such blocks as a whole")
        return
    assert isinstance(options, WindowLinearOptions), "the options of window_linear"
    if config.model.attention is not None:
        yield from weight_problems(options, config.model.attention)
    if convert.transfer is not None and not has_new_weights(options):
        rule = f"has nothing to train: preset={options.preset} without meta tokens has no weights of its own"
        yield Problem("convert.transfer", rule, "remove it, or use another form")


def weight_problems(options: WindowLinearOptions, attention: AttentionConfig) -> Iterator[Problem]:
    """Compare with the attention whose weights the mixer takes over."""
    rope = attention.rope
    if attention.positions == "rope" and rope.scaling not in ("none", "llama3"):
        rule = "stretches positions, which window_linear cannot, and the teacher's weights were trained for it"
        yield Problem("model.attention.rope.scaling", rule, "give a teacher with none or llama3", rope.scaling)
    wanted: dict[str, object] = {
        "num_heads": attention.num_heads,
        "kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "qk_norm": attention.qk_norm,
        "positions": attention.positions,
        "softmax_scale": attention.softmax_scale,
        "output_gate": attention.gate,
    }
    if attention.positions == "rope":
        wanted |= {"rope_theta": rope.theta, "rope_fraction": rope.fraction, "rope_llama3": rope.llama3}
    for name, value in wanted.items():
        given = options.kv_heads() if name == "kv_heads" else getattr(options, name)
        if given != value:
            field = "num_kv_heads" if name == "kv_heads" else name
            rule = f"must be {value}, as model.attention has it: the teacher's weights were trained for that"
            shown = value.model_dump() if isinstance(value, Llama3Stretch) else value
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else shown
            yield Problem(f"model.mixers.window_linear.{field}", rule, f"use {shown}", str(given))


def has_new_weights(options: WindowLinearOptions) -> bool:
    """Whether the mixer has weights that softmax attention has not."""
    form = options.branches()
    return form.features == "hedgehog" or form.gate == "learned" or form.combine == "joint" or options.meta_tokens > 0
