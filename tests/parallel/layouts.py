"""Layouts of ranks that must train as one rank does, and the runner that trains a tiny model under each of them.

A layout is a row of `LAYOUTS`. All layouts of one number of ranks run in one set of rank processes, which build and give
back the groups of each in turn.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.hooks.inspection import Inspection
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.run import Run
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from tests.helpers.shards import join_parts
from tests.helpers.spawn import run_ranks
from tests.parallel.models import SETTINGS, VARIANTS
from tests.pretrain.tiny_run import tiny_config, tiny_data

STEPS = 3
# Ranks wait for each other's compiler, minutes if nothing is compiled yet and other programs run.
TIMEOUT_SECONDS = 300
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Layout:
    """One way to spread a run: how many ranks, the `parallel` section, the model, and other settings (`train__x`).

    `quick` ones run in `make test`, two steps of half the batch of the rest, which run in `make test-slow`.
    """

    num_ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: str = "core"
    settings: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def steps(self) -> int:
        """Of training: the second is that of the first one's moments, and the last that is inspected."""
        return STEPS - self.quick

    @property
    def name(self) -> str:
        """What a test is called."""
        parts = [f"{key}={value}" for key, value in (self.parallel | self.settings).items()]
        return "-".join([f"{self.num_ranks}ranks", self.model, *parts])


@dataclass(frozen=True)
class Outcome:
    """What a layout computed in each step, and the whole weights and buffers after the last, by global name."""

    losses: list[float]
    grad_norms: list[float]
    mtp_losses: list[tuple[float, ...]]
    auxiliary: list[dict[str, float]]
    expert_counts: list[dict[int, list[int]]]
    weights: dict[str, Tensor]
    inspected: dict[str, Any]


def layout_config(layout: Layout, data: DataConfig, run_dir: Path) -> RunConfig:
    """The run of a layout: three steps of four micro-batches of packed documents, in float32; a quick one has two steps of two."""
    settings = {
        "train__global_batch_size": 4 if layout.quick else 8,
        "train__sequence_length": 64,
        "train__steps": layout.steps,
        "train__timeout_seconds": TIMEOUT_SECONDS,
        "optimizer__learning_rate": LEARNING_RATE,
        # AdamW would make a step of full length of a gradient that is nothing but rounding; of sums that cancel, too.
        "optimizer__epsilon": 1e-3,
        "train__inspect_every_steps": 2,
        "schedule__warmup_steps": layout.steps - 1,
    }
    settings |= SETTINGS.get(layout.model, {}) | layout.settings
    config = tiny_config(data, run_dir, **settings)
    tree = config.model_dump(mode="json")
    tree["model"] = VARIANTS[layout.model]
    tree["parallel"] = {"zero_stage": 1} | layout.parallel
    return RunConfig.model_validate(tree)


def run_layout(config: RunConfig) -> Outcome:
    """Train under one layout. Every rank must call this; the outcome is the same on all."""
    with SignalWatch() as signals:
        run = start_run(config, signals)
        results = [train_step(run) for _ in range(2)]
        for hook in run.hooks:
            if isinstance(hook, Inspection):
                hook.after_step(results[1])
        results += [train_step(run) for _ in range(config.train.steps - 2)]
        weights = gather_weights(run)
        close_run(run)
    return Outcome(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        mtp_losses=[result.mtp_losses for result in results],
        auxiliary=[result.auxiliary for result in results],
        expert_counts=[result.expert_counts for result in results],
        weights=weights,
        inspected=results[1].found["inspect"],
    )


def gather_weights(run: Run) -> dict[str, Tensor]:
    """Whole weights and buffers by global name. Every rank must call this.

    Fails where two ranks that should hold the same values do not, bitwise.
    """
    run.engine.wait_for_weights()
    parameters = list(run.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if run.engine.zero_stage == 3 else nullcontext():
        own = {
            name: join_parts(parameter.detach(), shard, run.parallel.groups)
            for name, parameter, shard in parameter_shards(run.model)
        }
    own |= {name: buffer.detach() for name, buffer in run.model.named_buffers()}
    whole: dict[str, Tensor] = {}
    for rank, tensors in enumerate(run.parallel.gather_objects(own)):
        for name, tensor in tensors.items():
            known = whole.setdefault(name, tensor)
            assert torch.equal(known, tensor), f"{name} of rank {rank} differs from that of a rank before it"
    return {name: tensor.clone() for name, tensor in whole.items()}


def run_all(layouts: list[Layout], data: DataConfig, folder: str) -> list[Outcome]:
    """The outcomes of layouts of one number of ranks, one after the other."""
    return [
        run_layout(layout_config(layout, data, Path(folder, f"run{number}"))) for number, layout in enumerate(layouts)
    ]


def outcomes_of(layouts: list[Layout]) -> list[Outcome]:
    """Start ranks and run layouts that have the same number of them."""
    with TemporaryDirectory() as folder:
        data = tiny_data(Path(folder, "data"))
        return run_ranks(run_all, layouts, data, folder, num_ranks=layouts[0].num_ranks)[0]


def outcome_of(layout: Layout) -> Outcome:
    """The outcome of one layout; its neighbours in the table, as many as end in a minute or so, run in parallel with
    it.
    """
    peers = [other for other in LAYOUTS if (other.num_ranks, other.quick) == (layout.num_ranks, layout.quick)]
    number, size = peers.index(layout), 32 // layout.num_ranks
    first = number // size * size
    return outcomes_between(layout.num_ranks, layout.quick, first, first + size)[number - first]


@cache
def outcomes_between(num_ranks: int, quick: bool, first: int, end: int) -> list[Outcome]:
    """The outcomes of some of the quick, or of the other, layouts of this many ranks, by their place among them."""
    layouts = [layout for layout in LAYOUTS if layout.num_ranks == num_ranks and layout.quick == quick]
    return outcomes_of(layouts[first:end])


@cache
def one_rank(quick: bool) -> dict[str, Outcome]:
    """What one rank computes, by the models of the quick layouts, or of the others."""
    models = sorted({layout.model for layout in LAYOUTS if layout.quick == quick})
    return dict(zip(models, outcomes_of([Layout(1, model=model, quick=quick) for model in models])))


LAYOUTS = [
    # Data parallel and ZeRO.
    Layout(2, {"zero_stage": 0}),
    Layout(2, {"zero_stage": 2}),
    Layout(4, {"zero_stage": 3}),
    Layout(2, {"zero_stage": 3, "offload_optimizer": True}),
    # Tensor parallel.
    Layout(2, {"tensor": 2}, "latent", quick=True),
    Layout(2, {"tensor": 2, "zero_stage": 0}),
    Layout(4, {"tensor": 4}),
    Layout(4, {"tensor": 2, "zero_stage": 2}, "latent"),
    Layout(4, {"tensor": 2, "zero_stage": 3}),
    # Tensor and sequence parallel.
    Layout(2, {"tensor": 2, "sequence_parallel": True}),
    Layout(2, {"tensor": 2, "sequence_parallel": True, "zero_stage": 0}),
    Layout(2, {"tensor": 2}, settings={"train__compile": True}),
    Layout(2, {"tensor": 2, "sequence_parallel": True}, settings={"train__compile": True}),
    Layout(4, {"tensor": 4, "sequence_parallel": True}, "latent"),
    Layout(4, {"tensor": 2, "sequence_parallel": True, "zero_stage": 2}),
    Layout(4, {"tensor": 2, "sequence_parallel": True, "zero_stage": 3}),
    Layout(4, {"tensor": 2, "sequence_parallel": True, "zero_stage": 2, "offload_optimizer": True}),
    Layout(8, {"tensor": 8, "sequence_parallel": True, "zero_stage": 2}),
    Layout(8, {"tensor": 4, "sequence_parallel": True, "zero_stage": 3}, "latent"),
    # Expert parallel, with whole and with cut experts.
    Layout(2, {"expert": 2}, "latent"),
    Layout(2, {"expert": 2, "zero_stage": 2}, "latent", quick=True),
    Layout(2, {"expert": 2, "zero_stage": 2}, "recycle"),
    Layout(4, {"expert": 2, "zero_stage": 2}),
    Layout(4, {"expert": 4}, "recycle"),
    Layout(4, {"expert": 2, "expert_tensor": 2}),
    Layout(4, {"tensor": 2, "expert": 2, "zero_stage": 2}, "latent"),
    Layout(4, {"tensor": 2, "sequence_parallel": True, "expert": 4}),
    Layout(4, {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 2}, "recycle"),
    Layout(4, {"pipeline": 2, "expert": 2, "zero_stage": 2}, "latent"),
    Layout(8, {"tensor": 2, "sequence_parallel": True, "expert": 4, "zero_stage": 2}),
    Layout(8, {"tensor": 2, "expert": 2, "expert_tensor": 2}, "latent"),
    Layout(8, {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "expert": 2}, "recycle"),
    Layout(4, {"expert": 2, "zero_stage": 2, "offload_optimizer": True}),
    # In halves, of which one is sent while experts compute the other.
    Layout(2, {"expert": 2, "overlap_experts": True}, "latent", {"train__recompute": "full"}),
    Layout(
        4, {"tensor": 2, "sequence_parallel": True, "expert": 4, "overlap_experts": True, "zero_stage": 2}, "recycle"
    ),
    Layout(4, {"pipeline": 2, "expert": 2, "overlap_experts": True, "schedule": "zero_bubble"}),
    # In turns: halves of four rows are the micro-batches of one rank.
    Layout(2, {"expert": 2, "overlap_experts": "two_batch", "zero_stage": 2}, "mtp", {"train__micro_batch_size": 4}),
    Layout(
        4,
        {"pipeline": 2, "context": 2, "expert": 2, "overlap_experts": "two_batch", "schedule": "zero_bubble"},
        "latent",
        {"train__micro_batch_size": 4},
    ),
    # With room for rows, which suffices or does not.
    Layout(4, {"tensor": 2, "sequence_parallel": True, "expert": 4, "expert_buffer_factor": 4.0, "zero_stage": 2}),
    Layout(
        4, {"pipeline": 2, "expert": 2, "expert_buffer_factor": 1.1, "overlap_experts": True, "schedule": "zero_bubble"}
    ),
    Layout(4, {"context": 2, "expert": 2, "expert_buffer_factor": 1.05}, settings={"train__recompute": "full"}),
    # Rows with padding.
    Layout(4, {"context": 2, "expert": 2}, "padded"),
    Layout(2, {"tensor": 2, "sequence_parallel": True}, "padded"),
    Layout(4, {"pipeline": 2, "expert": 2, "schedule": "zero_bubble"}, "padded"),
    Layout(2, {"expert": 2, "overlap_experts": "two_batch"}, "padded", {"train__micro_batch_size": 4}),
    Layout(4, {"expert": 4, "expert_buffer_factor": 2.0}, "padded"),
    Layout(2, {"expert": 2, "zero_stage": 2}, "padded_recycle"),
    Layout(4, {"context": 2, "expert": 2}, "padded_recycle", {"train__recompute": "full"}),
    Layout(2, {"context": 2, "expert": 2}, "padded_recycle", {"train__recompute": "full"}, quick=True),
    # Pipeline.
    Layout(2, {"pipeline": 2}),
    Layout(2, {"pipeline": 2, "zero_stage": 0}),
    # The last rank's other chunk makes up for the head: other blocks per chunk than with `balance: chunks`.
    Layout(
        2,
        {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2, "balance": "ranks"},
        "latent",
    ),
    Layout(4, {"pipeline": 2, "expert": 2, "schedule": "zero_bubble", "virtual_stages": 2, "balance": "ranks"}),
    Layout(2, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 3}, "latent"),
    Layout(2, {"pipeline": 2, "schedule": "zero_bubble"}),
    Layout(2, {"pipeline": 2, "schedule": "zero_bubble", "virtual_stages": 2}, "latent"),
    Layout(4, {"pipeline": 4, "zero_stage": 2}, "latent"),
    Layout(4, {"pipeline": 2, "zero_stage": 1}),
    Layout(4, {"pipeline": 2, "zero_stage": 2}, "latent"),
    Layout(4, {"pipeline": 2, "zero_stage": 0, "schedule": "interleaved", "virtual_stages": 2}, "latent"),
    Layout(4, {"pipeline": 2, "tensor": 2}, "latent"),
    Layout(4, {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "schedule": "zero_bubble"}),
    Layout(4, {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "schedule": "zero_bubble"}, "latent", quick=True),
    Layout(4, {"pipeline": 2, "tensor": 2, "expert": 2, "schedule": "zero_bubble"}, "latent"),
    Layout(8, {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "zero_stage": 2}, "latent"),
    Layout(8, {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "context": 2, "schedule": "zero_bubble"}),
    Layout(8, {"pipeline": 2, "context": 2, "expert": 2, "schedule": "interleaved", "virtual_stages": 2}, "latent"),
    Layout(4, {"pipeline": 2, "tensor": 2, "zero_stage": 2, "offload_optimizer": True}),
    # Two of the four stages have no experts.
    Layout(8, {"pipeline": 4, "tensor": 2, "expert": 2, "zero_stage": 2}),
    # Context parallel.
    Layout(2, {"context": 2}),
    Layout(2, {"context": 2, "zero_stage": 2}, "latent"),
    Layout(4, {"context": 4}, "latent"),
    Layout(4, {"context": 2, "zero_stage": 2}),
    Layout(4, {"context": 2, "tensor": 2, "sequence_parallel": True}),
    Layout(4, {"context": 2, "tensor": 2}, "latent"),
    Layout(4, {"context": 2, "expert": 2}, "recycle"),
    Layout(4, {"context": 2, "expert": 4}),
    Layout(4, {"context": 2, "pipeline": 2}, "latent"),
    Layout(4, {"context": 2, "pipeline": 2, "schedule": "zero_bubble", "zero_stage": 2}),
    Layout(8, {"context": 4, "zero_stage": 3}, "latent"),
    Layout(8, {"context": 2, "tensor": 2, "sequence_parallel": True, "expert": 2, "zero_stage": 2}),
    Layout(8, {"context": 2, "pipeline": 2, "expert": 4}, "latent"),
    # Registered mixers together with the core blocks.
    Layout(4, {"context": 2, "tensor": 2, "sequence_parallel": True, "expert": 2}, "mixers"),
    Layout(4, {"tensor": 4, "zero_stage": 2}, "mixers"),
    Layout(4, {"pipeline": 2, "context": 2, "expert": 2}, "mixers"),
    Layout(4, {"zero_stage": 3}, "mixers"),
    Layout(8, {"context": 2, "tensor": 2, "expert": 2, "zero_stage": 2}, "mixers"),
    # Latent attention, whose latents are made before tensor ranks part and gathered over a row.
    Layout(4, {"context": 2, "tensor": 2, "sequence_parallel": True}, "mla"),
    Layout(4, {"tensor": 4, "sequence_parallel": True, "zero_stage": 2}, "mla"),
    Layout(4, {"pipeline": 2, "context": 2}, "mla"),
    # Chosen keys: tensor ranks choose alike, context ranks among the keys of whole rows.
    Layout(4, {"context": 2, "tensor": 2, "sequence_parallel": True}, "chosen_keys"),
    Layout(4, {"pipeline": 2, "zero_stage": 2}, "chosen_keys", {"train__recompute": "full"}),
    Layout(2, {"pipeline": 2, "schedule": "zero_bubble"}, "chosen_keys"),
    Layout(4, {"zero_stage": 3}, "chosen_keys"),
    Layout(2, {"tensor": 2, "sequence_parallel": True}, "chosen_keys", {"train__compile": True}),
    # Mixers side by side, each with ranks of its own kind.
    Layout(2, {"context": 2}, "parallel"),
    Layout(4, {"pipeline": 2, "zero_stage": 2}, "parallel", {"train__recompute": "full"}),
    Layout(4, {"zero_stage": 3}, "parallel"),
    # Matrices that Muon steps as wholes.
    Layout(2, {"zero_stage": 3}, "normuon"),
    Layout(4, {"tensor": 2, "pipeline": 2, "zero_stage": 2}, "normuon"),
    Layout(4, {"context": 2, "expert": 2}, "normuon"),
    Layout(4, {"context": 2, "expert": 2}, "quantile"),
    Layout(4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, "quantile"),
    Layout(2, {"zero_stage": 0}, "muon"),
    Layout(2, {"expert": 2}, "muon"),
    Layout(2, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 3}, "muon"),
    Layout(4, {"tensor": 2, "sequence_parallel": True, "zero_stage": 2}, "muon"),
    Layout(4, {"zero_stage": 3}, "muon"),
    Layout(4, {"tensor": 4, "sequence_parallel": True}, "muon"),
    Layout(4, {"tensor": 2, "zero_stage": 3}, "muon"),
    Layout(4, {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 2}, "muon"),
    Layout(4, {"context": 2, "pipeline": 2, "zero_stage": 2}, "muon"),
    Layout(8, {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "expert": 2, "zero_stage": 2}, "muon"),
    # Hyper-connections: pieces send several tensors.
    Layout(
        2,
        {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 3, "balance": "ranks"},
        "streams",
        quick=True,
    ),
    Layout(2, {"tensor": 2, "sequence_parallel": True, "zero_stage": 0}, "streams"),
    Layout(2, {"expert": 2, "overlap_experts": "two_batch"}, "streams", {"train__micro_batch_size": 4}),
    Layout(4, {"zero_stage": 3}, "streams"),
    Layout(4, {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "schedule": "zero_bubble"}, "streams"),
    Layout(4, {"context": 2, "expert": 2, "zero_stage": 2}, "streams", {"train__recompute": "full"}),
    # Attention residuals: pieces send several tensors, cut inside of groups and between them.
    Layout(2, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 3}, "sources"),
    Layout(2, {"tensor": 2, "sequence_parallel": True, "zero_stage": 0}, "sources"),
    Layout(2, {"expert": 2, "overlap_experts": "two_batch"}, "sources", {"train__micro_batch_size": 4}),
    Layout(4, {"zero_stage": 3}, "sources"),
    Layout(4, {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "schedule": "zero_bubble"}, "sources"),
    Layout(4, {"pipeline": 4, "zero_stage": 2}, "sources", {"train__recompute": "full"}),
    Layout(4, {"context": 2, "expert": 2, "zero_stage": 2}, "sources", {"train__recompute": "full"}),
    # N-gram memory: blocks read tokens, of neighbours too.
    Layout(2, {"context": 2, "zero_stage": 3}, "ngrams", quick=True),
    Layout(2, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 3}, "ngrams"),
    Layout(2, {"expert": 2, "overlap_experts": "two_batch"}, "ngrams", {"train__micro_batch_size": 4}),
    Layout(4, {"context": 2, "pipeline": 2, "zero_stage": 2}, "ngrams", {"train__recompute": "full"}),
    Layout(2, {"tensor": 2, "zero_stage": 0}, "ngrams"),
    Layout(4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, "ngrams"),
    Layout(4, {"context": 2, "tensor": 2, "sequence_parallel": True, "zero_stage": 2}, "ngrams"),
    # Multi-token prediction.
    Layout(2, {"pipeline": 2}, "mtp"),
    Layout(4, {"context": 2, "tensor": 2, "sequence_parallel": True}, "mtp_shared"),
    Layout(2, {"zero_stage": 2}, "mtp_shared"),
    Layout(2, {"zero_stage": 3}, "mtp"),
    Layout(2, {"zero_stage": 3}, "mtp_shared"),
    Layout(2, {"zero_stage": 0, "tensor": 2}, "mtp"),
    Layout(2, {"expert": 2}, "mtp_shared"),
    Layout(2, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2}, "mtp"),
    Layout(2, {"pipeline": 2}, "mtp_shared", {"train__recompute": "full"}, quick=True),
    Layout(8, {"context": 2, "tensor": 2, "sequence_parallel": True, "expert": 2, "zero_stage": 2}, "mtp_shared"),
    Layout(4, {"tensor": 2, "sequence_parallel": True, "expert": 4, "zero_stage": 2}, "mtp"),
    Layout(4, {"pipeline": 2, "tensor": 2, "sequence_parallel": True}, "mtp"),
    Layout(4, {"context": 2, "zero_stage": 3}, "mtp_shared"),
    Layout(8, {"pipeline": 2, "context": 2, "expert": 2, "schedule": "interleaved", "virtual_stages": 2}, "mtp"),
    # Blocks computed again in backward passes.
    Layout(2, {"context": 2, "zero_stage": 0}, settings={"train__recompute": "full"}),
    Layout(2, {"expert": 2}, "recycle", {"train__recompute": "full"}),
    Layout(2, {"pipeline": 2}, settings={"train__recompute": "selective", "train__recompute_blocks": "ME"}),
    Layout(4, {"context": 2, "zero_stage": 3}, settings={"train__recompute": "full"}),
    Layout(4, {"tensor": 2, "sequence_parallel": True, "expert": 2}, "latent", {"train__recompute": "full"}),
]
