"""Checks of the `parallel` section: what ranks can share, and which axes exclude each other.

Three groups of rules. Those of `layout_problems` and `pipeline_problems` hold for any number of ranks, so `amfm config`
can check them on a laptop. Those of `world_problems` need the number of ranks, and `micro_batch_problems` also that the
batch is shared evenly. Nothing here opens a device or a process group: every rank computes the same answer from the
configuration, before anything is allocated.

Each problem states a fix that works, where one can be computed: the divisors of the size, or the nearest multiples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from amfm.model.config.schema import ModelConfig
from amfm.model.pipeline_split import cut_pieces
from amfm.pretrain.checks.blocks import kinds_in_use, longest_lookback, refusal_problems
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.schema import ParallelConfig, RunConfig
from amfm.pretrain.recompute import recomputed_letters


def layout_problems(config: RunConfig) -> Iterator[Problem]:
    """Check the rules that hold for any number of ranks; the pattern need not parse for it."""
    yield from ineffective_problems(config)
    yield from excluded_problems(config)
    yield from two_batch_problems(config)
    yield from refusal_problems(config.model, config.parallel)
    yield from share_problems(config)


def ineffective_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject settings that nothing would read, because the axis they modify has one rank or no block to work on."""
    section = config.parallel
    if section.sequence_parallel and section.tensor == 1:
        rule = "cuts tokens over the tensor ranks, and parallel.tensor is 1"
        yield Problem("parallel.sequence_parallel", rule, "raise parallel.tensor, or use false", "true")
    if section.expert_tensor is not None and section.expert == 1 and section.expert_tensor != section.tensor:
        rule = f"must be parallel.tensor={section.tensor} while parallel.expert is 1"
        remedy = "remove it, or raise parallel.expert"
        yield Problem("parallel.expert_tensor", rule, remedy, str(section.expert_tensor))
    if section.expert > 1 and not any("expert" in options.cut_evenly() for _, options in kinds_in_use(config.model)):
        rule = "spreads routed experts, and model.pattern has no E block"
        yield Problem("parallel.expert", rule, "use 1", str(section.expert))
    if section.overlap_experts and section.expert == 1:
        rule = "sends tokens between expert ranks while experts compute, and parallel.expert is 1"
        yield Problem("parallel.overlap_experts", rule, "raise parallel.expert, or use false", "true")
    if section.expert_buffer_factor is not None and section.expert == 1:
        rule = "is a buffer for tokens between expert ranks, and parallel.expert is 1"
        yield Problem(
            "parallel.expert_buffer_factor",
            rule,
            "raise parallel.expert, or use none",
            str(section.expert_buffer_factor),
        )
    limits = [(f"{key}.capacity_factor", moe.capacity_factor) for key, moe in config.model.expert_sections()]
    for key, limit in limits if section.expert_buffer_factor is not None and section.expert > 1 else ():
        if limit is not None:
            rule = f"is a buffer for tokens that are not limited, and {key}={limit:g} limits them"
            yield Problem("parallel.expert_buffer_factor", rule, "use none", str(section.expert_buffer_factor))
    if section.offload_optimizer and section.zero_stage == 0:
        rule = "moves what ZeRO spreads, and parallel.zero_stage is 0"
        yield Problem("parallel.offload_optimizer", rule, "use parallel.zero_stage=1 or higher, or false", "true")
    if config.train.gradient_sums == "product" and section.zero_stage not in (1, 2):
        rule = f"adds to the sums of ZeRO 1 and 2, and parallel.zero_stage is {section.zero_stage}"
        yield Problem("train.gradient_sums", rule, "use auto, or parallel.zero_stage=1", "product")
    if config.train.gradient_sums == "product" and config.train.compile:
        rule = "is not for train.compile=true: compiled blocks hand their gradients to autograd"
        yield Problem("train.gradient_sums", rule, "use auto, or train.compile=false", "product")
    if section.schedule != "1f1b" and section.pipeline == 1:
        rule = "orders pipeline stages, and parallel.pipeline is 1"
        yield Problem("parallel.schedule", rule, "remove it, or raise parallel.pipeline", section.schedule)
    if section.virtual_stages > 1 and section.schedule == "1f1b":
        rule = "needs a schedule that interleaves virtual stages, and parallel.schedule is 1f1b"
        remedy = "use parallel.schedule=interleaved with parallel.pipeline above 1, or virtual_stages=1"
        yield Problem("parallel.virtual_stages", rule, remedy, str(section.virtual_stages))
    if section.virtual_stages == 1 and section.schedule == "interleaved":
        rule = "interleaves several model chunks per rank, and parallel.virtual_stages is 1"
        yield Problem("parallel.schedule", rule, "use parallel.virtual_stages=2, or schedule=1f1b", "interleaved")


def excluded_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject combinations of axes and ZeRO stage that DeepSpeed cannot run, each with its reason."""
    section, stage = config.parallel, config.parallel.zero_stage
    if section.expert > 1 and stage not in (1, 2):
        reason = (
            "gathers weights over ranks that hold other experts"
            if stage == 3
            else "computes the gradient norm without the experts of other ranks"
        )
        rule = f"does not go with parallel.expert={section.expert}: ZeRO {stage} {reason}"
        yield Problem("parallel.zero_stage", rule, "use 1 or 2, or parallel.expert=1", str(stage))
    if section.pipeline > 1 and stage == 3:
        reason = (
            "ZeRO 3 gathers weights in the order of one forward and one backward pass, and a schedule mixes several"
        )
        rule = f"does not go with parallel.pipeline={section.pipeline}: {reason}"
        yield Problem("parallel.zero_stage", rule, "use 0, 1 or 2, or parallel.pipeline=1", str(stage))


def two_batch_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject two-batch overlap if a micro-batch has no half, or a block cannot stop on its way."""
    section, train, key = config.parallel, config.train, "parallel.overlap_experts"
    if section.overlap_experts != "two_batch":
        return
    if train.micro_batch_size % 2:
        rule = "must be even, because parallel.overlap_experts=two_batch cuts each micro-batch into two halves"
        remedy = f"use {train.micro_batch_size + 1}, or parallel.overlap_experts=true"
        yield Problem("train.micro_batch_size", rule, remedy, str(train.micro_batch_size))
    again = "".join(
        sorted(symbol for symbol in recomputed_letters(config) if config.model.block_options(symbol).routed_experts())
    )
    if again:
        rule = f"stops blocks of routed experts on their way, and train.recompute computes {again} again as a whole"
        yield Problem(
            key, rule, f"recompute other blocks only, or use true instead, which leaves {again} whole", "two_batch"
        )
    if train.compile:
        rule = "stops blocks of routed experts on their way, and train.compile=true compiles them as a whole"
        yield Problem(key, rule, "use true, or train.compile=false", "two_batch")
    if config.model.lora_mixer is not None:
        rule = "stops blocks on their way, and the routed updates of model.lora_mixer need whole ones"
        yield Problem(key, rule, "use true", "two_batch")


def share_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the ranks of an axis divide the sizes they share: vocabulary, heads, inner widths, experts.

    Key-value heads and groups are exempt from even division: several ranks may hold a copy (`unit_problems`).
    """
    yield from size_problems(config.model, config.parallel)
    yield from length_problems(config)


def size_problems(model: ModelConfig, section: ParallelConfig) -> Iterator[Problem]:
    """Check the sizes of a model that the ranks of an axis share."""
    # Each entry: axis of the section, the dotted name of the size, and the size.
    ranks_of = {"tensor": section.tensor, "expert_tensor": section.expert_tensor_size(), "expert": section.expert}
    sizes = [("tensor", "model.vocab_size", model.vocab_size)]
    for kind, options in kinds_in_use(model):
        name = f"model.{kind.section}"
        for cut_axis, fields in options.cut_evenly().items():
            sizes += [(cut_axis, f"{name}.{field}", size) for field, size in fields.items()]
        for field, units in options.cut_or_copied().items():
            yield from unit_problems(f"{name}.{field}", units, section.tensor)
    for axis, name, size in sizes:
        ranks = ranks_of[axis]
        if size % ranks:
            yield Problem(f"parallel.{axis}", f"must divide {name}={size}", f"use {divisors(size)}", str(ranks))


def length_problems(config: RunConfig) -> Iterator[Problem]:
    """Check row lengths in tokens: context ranks take two segments of a row each, and tensor ranks share tokens evenly.

    A causal row is cut into 2 x context segments, of which a rank takes one from either end, so that all have the same
    work. A convolution or window reads tokens of the segment before, which must therefore be at least that long.
    """
    section = config.parallel
    window, window_key = longest_lookback(config)
    # Tensor ranks cut tokens for sequence parallelism, and also to send each token to its expert from one rank only.
    reason = "sequence_parallel" if section.sequence_parallel else "expert" if section.expert > 1 else None
    tensor = section.tensor if reason else 1
    parts = tensor if section.context == 1 else math.lcm(2 * section.context, section.context * tensor)
    shares = f"parallel.tensor={tensor} (parallel.{reason})" if reason else ""
    if section.context > 1:
        shares = f"2 x parallel.context={section.context}" + (f" and of parallel.context x {shares}" if reason else "")
    lengths = {"train.sequence_length": config.train.sequence_length}
    for index, phase in enumerate(config.data.phases):
        if phase.sequence_length is not None:
            lengths[f"data.phases.{index}.sequence_length"] = phase.sequence_length
    for key, length in lengths.items():
        if length % parts:
            nearest = " or ".join(
                str(value) for value in (length // parts * parts, (length // parts + 1) * parts) if value
            )
            yield Problem(key, f"must be a multiple of {shares}", f"use {nearest}", str(length))
        elif section.context > 1:
            least = 2 * section.context * window
            if length < least:
                rule = f"gives segments shorter than the tokens that {window_key} looks back on"
                yield Problem(key, rule, f"use at least {least}, or lower parallel.context", str(length))


def unit_problems(name: str, units: int, tensor: int) -> Iterator[Problem]:
    """Check that key-value heads or groups are split evenly over tensor ranks, or each is held by equally many of them."""
    if units % tensor and tensor % units:
        rule = f"must divide {name}={units}, or be a multiple of it"
        yield Problem("parallel.tensor", rule, f"use {divisors(units)} or a multiple of {units}", str(tensor))


def world_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Check that the axes tile the ranks that there are: what is left over after the model's axes is data parallel.

    Dense layers and experts tile the same ranks in two ways (tensor x context x pipeline, expert_tensor x expert x
    pipeline), and both products must divide their number.
    """
    section = config.parallel
    dense = section.model_ranks()
    if world_size % dense:
        rule = f"tensor {section.tensor} x context {section.context} x pipeline {section.pipeline} = {dense} must divide the {ranks(world_size)}"
        yield Problem("parallel", rule, f"start a multiple of {dense} ranks, or lower an axis")
    experts = section.expert_tensor_size() * section.expert * section.pipeline
    # Equal products would report the same fault twice.
    if world_size % experts and experts != dense:
        rule = (
            f"expert_tensor {section.expert_tensor_size()} x expert {section.expert} x pipeline {section.pipeline} = "
            f"{experts} must divide the {ranks(world_size)}"
        )
        yield Problem("parallel", rule, f"start a multiple of {experts} ranks, or lower an axis")


def ranks(count: int) -> str:
    """Write a number of ranks: 1 rank, 2 ranks."""
    return f"{count} rank{'s' if count > 1 else ''}"


def divisors(number: int) -> str:
    """List the divisors of a number as a fix names them: the first twelve, smallest first."""
    found = [str(part) for part in range(1, number + 1) if number % part == 0]
    return ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")


def pipeline_problems(config: RunConfig) -> Iterator[Problem]:
    """Check the pipeline's rules for any number of ranks; the model's own rules must hold."""
    section, train = config.parallel, config.train
    if section.pipeline == 1:
        return
    try:
        cut_pieces(config.model, section.num_pieces(), train.sequence_length)
    except ValueError as error:
        yield Problem("parallel.pipeline", str(error), "")
    if section.schedule == "zero_bubble" and config.model.num_depths:
        rule = "cuts backward passes in two at the stage's input, and MTP layers of model.pattern have a second one"
        yield Problem("parallel.schedule", rule, "use 1f1b or interleaved", "zero_bubble")
    if section.schedule == "zero_bubble" and train.compile:
        rule = "does not go with parallel.schedule=zero_bubble, which cuts backward passes in two: compiled blocks have one"
        yield Problem("train.compile", rule, "use false, or another schedule", "true")


def micro_batch_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Check that there are enough micro-batches to fill the pipeline, in each batch of a ramp too.

    `pretrain.checks.check_run.batch_problems` must have found none.
    """
    section, train = config.parallel, config.train
    if section.pipeline == 1:
        return
    unit = train.micro_batch_size * section.data_ranks(world_size)
    sizes = {"train.global_batch_size": train.global_batch_size}
    if train.batch_ramp is not None:
        sizes["train.batch_ramp.start_size"] = train.batch_ramp.start_size
        if section.schedule != "1f1b":
            # Interleaved and zero-bubble schedules need whole rounds at every size, so the steps between count too.
            sizes["train.batch_ramp.increment"] = train.batch_ramp.increment
    for key, size in sizes.items():
        yield from fill_problems(section, key, size, unit)


def fill_problems(section: ParallelConfig, key: str, size: int, unit: int) -> Iterator[Problem]:
    """Check the schedule's rule for a batch of `size` rows, of which all data ranks together take `unit` at a time.

    1F1B needs one micro-batch a pipeline rank before the first comes back; the others run in rounds of that many.
    """
    number = size // unit
    given = f"gives each data rank {number} micro-batch{'es' if number > 1 else ''}, and parallel.schedule={section.schedule}"
    if section.schedule == "1f1b" and number < section.pipeline:
        rule = f"{given} needs at least parallel.pipeline={section.pipeline} to fill the pipeline"
        remedy = f"use {section.pipeline * unit} or more, or a smaller train.micro_batch_size"
        yield Problem(key, rule, remedy, str(size))
    elif section.schedule != "1f1b" and number % section.pipeline:
        rule = f"{given} takes them in rounds of parallel.pipeline={section.pipeline}"
        rounds = (number // section.pipeline, number // section.pipeline + 1)
        nearest = " or ".join(str(each * section.pipeline * unit) for each in rounds if each)
        yield Problem(key, rule, f"use {nearest}", str(size))
