"""What a conversion needs before it starts: blocks that can be converted, and a mixer that keeps the teacher's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.kinds import describe_symbol, registered_kinds
from amfm.model.config.rope import Llama3Stretch
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.convert import UpcycleConfig
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.startup.conversion import adapter_specs, how_to_get
from amfm_convert.spec import WindowLinearOptions
from amfm_convert.stages import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    WINDOW_LINEAR,
    conversion_of,
    conversion_stages,
    converted_blocks,
)

if TYPE_CHECKING:
    pass


def check_conversion(config: RunConfig, world_size: int | None = None) -> None:
    """Reject a conversion whose settings do not fit together, and any stage of it that could not run.

    Raises ConfigError with every broken rule. Touches no device and reads no file.
    """
    problems = list(rule_problems(config))
    if problems:
        raise ConfigError(problems)
    if config.convert is not None and config.convert.upcycle is not None:
        return
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
    if config.data.synthetic is not None:
        rule = "is a synthetic task, and a conversion measures text"
        yield Problem(
            "data.synthetic",
            rule,
            "give data.store and data.sources, and a teacher of text",
            config.data.synthetic.task,
        )
    if config.data.validation_fraction == 0:
        rule = "leaves nothing to measure the converted model on"
        yield Problem("data.validation_fraction", rule, "use for example 0.02", "0")
    for key, value in (("train.steps", config.train.steps), ("run.initial_weights", config.run.initial_weights)):
        if value is not None:
            rule = "has no effect in a conversion, whose stages have their own"
            yield Problem(key, rule, "remove it", str(value))
    if config.model.num_depths:
        rule = "has MTP layers, which a conversion does not tune"
        yield Problem("model.pattern", rule, "leave them out: the teacher's are ignored then", config.model.pattern)
    if config.model.stream is not None:
        rule = "is a residual stream that no conversion was tried on"
        yield Problem(f"model.{config.model.stream_name}", rule, "give a teacher without it")
    if config.convert.upcycle is not None:
        yield from upcycle_problems(config, config.convert.upcycle)
        yield from block_problems(config, FEED_FORWARD)
        return
    if config.convert.tune is None:
        yield Problem("convert.tune", "is missing", "name at least convert.tune.steps, or convert.upcycle")
        return
    for name in config.convert.tune.adapters:
        if name not in adapter_specs():
            yield Problem("convert.tune.adapters", "is not a registered adapter", how_to_get(name), name)
    yield from routing_problems(config)
    yield from block_problems(config, ATTENTION)
    yield from mixer_problems(config)


def upcycle_problems(config: RunConfig, upcycle: UpcycleConfig) -> Iterator[Problem]:
    """Check that feed-forwards can be cut so, that tokens can take so many, and that nothing else is asked for."""
    convert, dense = conversion_of(config), config.model.feed_forward
    for name, given in (("to", convert.to), ("transfer", convert.transfer), ("tune", convert.tune)):
        if given not in (None, WINDOW_LINEAR):
            yield Problem(f"convert.{name}", "has no effect with convert.upcycle, which trains nothing", "remove it")
    if EXPERTS in config.model.letters or config.model.moe is not None:
        rule = "has experts already, and a model has one section for them"
        yield Problem("model.pattern", rule, "give a dense teacher", config.model.pattern)
    if upcycle.top_copies > upcycle.num_copies:
        rule = f"is more than convert.upcycle.num_copies={upcycle.num_copies}"
        yield Problem("convert.upcycle.top_copies", rule, "lower it to at most that", str(upcycle.top_copies))
    if dense is None:
        return
    if dense.linear_kind != "dense":
        rule = "are products of factors, and experts are dense"
        yield Problem("model.feed_forward.linear_kind", rule, "give a teacher with dense matrices", dense.linear_kind)
    if dense.hidden_size % upcycle.num_slices:
        rule = f"must divide model.feed_forward.hidden_size={dense.hidden_size}"
        yield Problem("convert.upcycle.num_slices", rule, "use a divisor", str(upcycle.num_slices))
    if config.model.mup is not None:
        yield Problem("model.mup", "has no rates for experts that were a feed-forward", "give a teacher without it")


def routing_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the updates a router chooses among are the conversion's own, and that it can choose so many."""
    routing = conversion_of(config).tuning().routing
    if config.model.lora_mixer is not None:
        rule = "is what convert.tune.routing gives a model, and a teacher has none"
        yield Problem("model.lora_mixer", rule, "remove it, and give the teacher that the updates were made for")
    if routing is not None and routing.top_k > routing.num_experts:
        rule = f"is more than convert.tune.routing.num_experts={routing.num_experts}"
        yield Problem("convert.tune.routing.top_k", rule, "lower it to at most that", str(routing.top_k))
    if routing is not None and routing.updates and len(routing.updates) != routing.num_experts:
        rule = f"names {len(routing.updates)}, and convert.tune.routing.num_experts={routing.num_experts}"
        yield Problem("convert.tune.routing.updates", rule, "give one for each", ", ".join(routing.updates))
    if routing is not None and routing.hard_from_step is not None:
        key, steps = "convert.tune.routing.hard_from_step", conversion_of(config).tuning().steps
        if routing.hard_from_step >= steps:
            rule = (
                f"must be less than convert.tune.steps={steps}, or the choices that the result makes are never trained"
            )
            yield Problem(key, rule, "lower it, or leave it out", str(routing.hard_from_step))
        if routing.top_k == routing.num_experts:
            rule = f"has no effect with convert.tune.routing.top_k={routing.top_k}, by which all updates count anyway"
            yield Problem(key, rule, "lower top_k, or leave it out", str(routing.hard_from_step))


def block_problems(config: RunConfig, wanted: str) -> Iterator[Problem]:
    """Check that the blocks are there, and that they are of the kind that is converted: attention or feed-forward."""
    what = "softmax attention" if wanted == ATTENTION else "feed-forward"
    convert, letters = conversion_of(config), config.model.letters
    if convert.blocks is not None and convert.keep_blocks:
        yield Problem(
            "convert.keep_blocks", "is given together with convert.blocks, which states the same", "remove one of them"
        )
    for key, blocks in (("blocks", convert.blocks or ()), ("keep_blocks", convert.keep_blocks)):
        for index in blocks:
            if not 0 <= index < len(letters):
                rule = f"must be below {len(letters)}, the number of blocks in model.pattern"
                yield Problem(f"convert.{key}", rule, "count from 0", str(index))
            elif letters[index] != wanted:
                rule = (
                    f"is {letters[index]} ({describe_symbol(letters[index])}), and only {what} ({wanted}) is converted"
                )
                places = [str(place) for place, symbol in enumerate(letters) if symbol == wanted]
                yield Problem(f"convert.{key}", rule, f"use some of {', '.join(places) or 'none'}", str(index))
    if wanted not in letters:
        yield Problem(
            "model.pattern", f"has no {what} ({wanted}) to convert", "give another teacher", config.model.pattern
        )
    elif not converted_blocks(config):
        yield Problem(
            "convert.keep_blocks",
            f"keeps every {what.rsplit(maxsplit=1)[-1]} block",
            "leave out those to convert",
            str(convert.keep_blocks),
        )


def mixer_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the new mixer is known, has options, and computes from the teacher's weights what they were trained for."""
    convert = conversion_of(config)
    if convert.to not in registered_kinds():
        yield Problem(
            "convert.to", "is not a registered mixer", f"use one of {', '.join(registered_kinds())}", convert.to
        )
        return
    options = getattr(config.model.mixers, convert.to)
    if convert.to != WINDOW_LINEAR and config.model.norm_placement == "after_attention":
        rule = f"places norms by which blocks are attention, and convert.to={convert.to} is none"
        yield Problem("model.norm_placement", rule, "convert to window_linear", "after_attention")
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
        rule = f"has nothing to train: preset={options.preset} without meta tokens has no weights to train"
        yield Problem("convert.transfer", rule, "remove it, or use another form")


def weight_problems(options: WindowLinearOptions, attention: AttentionConfig) -> Iterator[Problem]:
    """Compare with the attention whose weights the mixer takes over."""
    rope = attention.rope
    if attention.positions == "rope" and rope.scaling not in ("none", "llama3"):
        rule = "stretches positions, which window_linear cannot, and the teacher's weights were trained for it"
        yield Problem("model.attention.rope.scaling", rule, "give a teacher with none or llama3", rope.scaling)
    if attention.sinks:
        rule = "gives heads a sink, which window_linear has not, and the teacher's weights were trained with it"
        yield Problem("model.attention.sinks", rule, "give a teacher without sinks", "true")
    if attention.bias:
        rule = (
            "adds biases to projections, which window_linear has not, and the teacher's weights were trained with them"
        )
        yield Problem("model.attention.bias", rule, "give a teacher without biases", "true")
    if attention.qk_norm == "wide":
        rule = "norms all heads together, which window_linear does not, and the teacher's weights were trained with it"
        yield Problem("model.attention.qk_norm", rule, "give a teacher with norms of heads, or none", "wide")
    if attention.indexer is not None:
        rule = "chooses keys, and window_linear imitates attention to all of them"
        yield Problem("model.attention.indexer", rule, "give a teacher without one")
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
    has_gate = form.gate in ("learned", "channel")
    return form.features == "hedgehog" or has_gate or form.combine == "joint" or options.meta_tokens > 0
