"""What `train.cuda_graphs` does not go with: whatever a replay would leave out, or has other memory or launches for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import RunConfig

if TYPE_CHECKING:
    import torch

KEY = "train.cuda_graphs"
NONE = "or train.cuda_graphs=none"


def graph_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject settings that exclude graphs of blocks, each with what would go wrong. `config`: of one stage."""
    if config.train.cuda_graphs == "none":
        return
    for key, value, allowed, rule in excluded_settings(config):
        if value not in allowed:
            remedy = f"use {str(allowed[0]).lower()}, {NONE}"
            yield Problem(key, f"does not go with {KEY}=blocks: it {rule}", remedy, str(value).lower())
    sections: dict[str, tuple[object, str]] = {
        "train.freeze": (config.train.freeze or None, "has blocks without gradients of weights"),
        "convert": (config.convert, "trains blocks next to those that they replace"),
        "health.check_state_every_steps": (config.health.check_state_every_steps, "computes its own gradients"),
        "model.self_guided_training": (
            config.model.self_guided_training,
            "changes with the step, which a replay does not know",
        ),
        f"model.{config.model.stream_name}": (config.model.stream, "hands on another residual stream than graphs keep"),
        "model.lora_mixer": (config.model.lora_mixer, "changes with the step, which a replay does not know"),
    }
    if config.data.packing == "best_fit":
        rule = "counts the tokens of each micro-batch on the host, where data.packing=best_fit pads sequences"
        sections |= {
            f"{name}.capacity_factor": (moe.capacity_factor, rule) for name, moe in config.model.expert_sections()
        }
    for key, (section, rule) in sections.items():
        if section is not None:
            yield Problem(key, f"does not go with {KEY}=blocks: it {rule}", f"remove it, {NONE}")


def excluded_settings(config: RunConfig) -> Iterator[tuple[str, object, tuple[object, ...], str]]:
    """Settings by key: value, what it may be, and why not something else."""
    parallel, train = config.parallel, config.train
    yield "train.compile", train.compile, (False,), "compiles blocks, which then launch by Inductor's own rules"
    yield "train.recompute", train.recompute, ("none",), "computes blocks again in passes that are not captured"
    sums = "hands gradients to autograd, of which graphs of all blocks would keep a copy"
    yield "train.gradient_sums", train.gradient_sums, ("auto", "product"), sums
    stages = {0: "sums gradients by autograd", 2: "sends the sum of each pass", 3: "gathers weights to other memory"}
    yield "parallel.zero_stage", parallel.zero_stage, (1,), stages.get(parallel.zero_stage, "")
    yield (
        "parallel.pipeline",
        parallel.pipeline,
        (1,),
        "has several micro-batches in flight, each with its own memory",
    )
    halves = "passes the halves of a micro-batch through blocks in turn, each with its own layout and memory"
    yield "parallel.overlap_experts", parallel.overlap_experts, (False, True), halves
    yield "parallel.context", parallel.context, (1,), "cuts sequences into segments, whose sizes a replay does not know"
    recipe = "keeps codes of weights, whose memory changes with each step"
    yield "low_precision.recipe", config.low_precision.recipe, ("none",), recipe
    wide = train.precision == "float32"
    backends = ("triton",) if wide else ("auto", "triton")
    reads = "computes in PyTorch's operations in float32" if wide else "reads numbers on the host"
    yield "kernels.backend", config.kernels.backend, backends, reads


def check_graph_device(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError for graphs on a device that has none."""
    if config.train.cuda_graphs != "none" and device.type != "cuda":
        rule = f"needs a GPU, which replays the passes, and this run is on a {device.type.upper()}"
        raise ConfigError([Problem(KEY, rule, "use none", config.train.cuda_graphs)])
