"""Published training speeds vs. what the plan says of the same model, GPUs, layout, batch and recomputation.

How it works: a published run becomes a configuration and a layout once; the plan's formulas then give its step with any
hardware. What differs from a plan of amfm is in the run's row (`runs.py`) and here. Kernels are theirs (`THEIRS`): CUTLASS and
Transformer Engine multiply experts, FlashAttention-3 attends, and DeepEP sends. The published systems dispatch with DeepEP or
HybridEP, which send a token once to each node that has some of its experts (to each rank inside a node, as amfm always does).
A stand-in for a router counts tokens off to experts, whose experts are next to each other (`counted_off`).
What is computed meanwhile, what recomputation sends again, how often a pipeline drains and to what experts are padded follow from
the recipe and the code of the run. And natural routing is planned with the most loaded rank at 1.2 times the mean.

`fit_halves` fits the efficiencies of the hardware on every other run and plans the rest with them, then the other way round:
what it prints of a run never comes from a fit that knew this run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from amfm.launch.plan.activations import FLOAT32_BYTES, storage_of
from amfm.launch.plan.estimate import Assumptions, Estimate, estimate, memory_of
from amfm.launch.plan.exchanges.seconds import exchange_seconds
from amfm.launch.plan.exchanges.stage import reduction_exchanges
from amfm.launch.plan.hardware import HARDWARE, LIBRARY_GROUPED, LIBRARY_NARROW, Hardware
from amfm.launch.plan.layout import Layout, StageShare, held_by_stages
from amfm.launch.plan.memory import Memory
from amfm.launch.plan.roofline import Roofline
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig, MtpConfig
from amfm.model.flops import flops_per_token
from amfm.model.moe.transfer import expected_ranks
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from benchmarks.calibration.fit import fit_efficiencies
from benchmarks.published.runs import PUBLISHED, PUBLISHED_FP8, PublishedRun

NATURAL_IMBALANCE = 1.2
MULTIPROCESSORS = 132  # of an H100
FITTED = (
    "product_efficiency",
    "grouped_efficiency",
    "attention_efficiency",
    "memory_efficiency",
    "link_efficiency",
)
THEIRS = HARDWARE["h100"].model_copy(
    update={
        "grouped_efficiency": LIBRARY_GROUPED,
        **LIBRARY_NARROW,
        "attention_efficiency": 0.50,
        "attention_backward_efficiency": None,
        "all_to_all_efficiency": None,
    }
)
# Takes back the layout that a preset has for its own cluster.
WITHOUT_LAYOUT = (
    "parallel.tensor=1",
    "parallel.sequence_parallel=false",
    "parallel.expert=1",
    "parallel.overlap_experts=false",
    "parallel.expert_buffer_factor=null",
    "parallel.context=1",
    "parallel.pipeline=1",
    "parallel.schedule=1f1b",
    "parallel.virtual_stages=1",
    "train.recompute_blocks=''",
)
# Of a stand-in for a router, which has none.
WITHOUT_LOSSES = ("model.moe.auxiliary_loss_weight=0", "model.moe.sequence_loss_weight=0", "model.moe.z_loss_weight=0")


@dataclass(frozen=True)
class Anchor:
    """A published run that is ready to be planned; `flops_per_token` is our count of the preset."""

    published: PublishedRun
    config: RunConfig
    layout: Layout
    flops_per_token: float
    assumptions: Assumptions

    @cached_property
    def memory(self) -> Memory:
        """Memory of the most loaded rank, which no efficiency changes."""
        return memory_of(self.config, self.layout, self.assumptions, THEIRS)

    def plan(self, hardware: Hardware) -> Estimate:
        """The step by the plan's formulas, with the multiprocessors that its dispatcher takes, without a router that it has not,
        and with what FSDP and its loss do again.
        """
        number = self.published.multiprocessors
        share = hardware.collective_share if number is None else number / MULTIPROCESSORS
        taken = hardware.model_copy(update={"collective_share": share})
        found = estimate(self.config, self.layout, taken, self.assumptions, self.memory)
        step = found.step
        if not self.published.has_router:
            saved = self.router_seconds(taken)
            idle = step.bubble / (step.total() - step.bubble)
            compute = step.compute | {"moe": step.compute["moe"] - saved}
            step = replace(step, compute=compute, bubble=step.bubble - idle * saved)
        if self.published.heads_again:
            step = replace(
                step, compute=step.compute | {"head": 4 / 3 * step.compute["head"]}
            )  # four products for three
        step = replace(step, exposed_gathers=step.exposed_gathers + self.sent_again(taken))
        ratio = found.step.total() / step.total()
        return replace(found, step=step, mfu=ratio * found.mfu, tokens_per_second=ratio * found.tokens_per_second)

    def router_seconds(self, hardware: Hardware) -> float:
        """Seconds of a step that the plan has for routers, in the pipeline stage with the most of them.

        Their logits, the kernel that chooses, and what PyTorch does between them.
        """
        model, layout, storage = self.config.model, self.layout, storage_of(self.config)
        assert model.moe is not None, "every published run has experts"
        line = Roofline(hardware, "bf16", storage.element_bytes, layout.forwards("E"))
        tokens, experts = layout.tokens(self.config) / layout.tensor, model.moe.num_experts
        line.logits(tokens, model.hidden_size, experts)
        line.passes(5 * tokens * experts * FLOAT32_BYTES)
        # Between: halves of the gradient of logits, and the residual stream's gradient that is added to that of the experts.
        e = storage.element_bytes
        line.backward_passes(tokens * (experts * (2 * FLOAT32_BYTES + 3 * e) + 3 * model.hidden_size * e))
        held = held_by_stages(model, layout, self.config.train.sequence_length)
        return layout.micro_batches(self.config) * max(each.routed_blocks for each in held) * line.seconds

    def sent_again(self, hardware: Hardware) -> float:
        """Seconds of a step that FSDP sends more than ZeRO 1 does, as far as passes do not hide it, of the stage that sends most.

        Gradients of experts, which its code at that time reduced in bf16, and of the rest in float32.
        """
        again = {"all_gather": self.published.gathers - 1, "reduce_scatter": self.published.reductions - 1}
        held = held_by_stages(self.config.model, self.layout, self.config.train.sequence_length)

        def seconds(stage: StageShare) -> float:
            found = 0.0
            for parameters, is_spread in stage.gradient_groups(self.layout):
                for exchange in reduction_exchanges(self.config, self.layout, parameters, is_spread=is_spread):
                    is_narrow = is_spread and exchange.collective == "reduce_scatter"
                    size = exchange_seconds(exchange, self.layout, hardware) / (2 if is_narrow else 1)
                    found += again[exchange.collective] * size
            return found

        return (1 - self.assumptions.overlap) * max(map(seconds, held))

    def ratio(self, found: Estimate) -> float:
        """Planned over published speed: of tokens, or of FLOPs where the preset stands for another model."""
        tokens_per_second = found.tokens_per_second / self.published.gpus
        if self.published.is_stand_in:
            return tokens_per_second * self.flops_per_token / self.published.flops_per_second
        return tokens_per_second / self.published.tokens_per_second


def load_anchors(presets: Path) -> list[Anchor]:
    """All published runs in bf16, with presets from the folder `presets`. Raises FileNotFoundError if one is missing."""
    return [load_anchor(run, presets) for run in PUBLISHED]


def load_fp8_anchors(presets: Path) -> list[Anchor]:
    """Those in FP8, which are planned by a recipe of low precision."""
    return [load_anchor(run, presets) for run in PUBLISHED_FP8]


def load_anchor(run: PublishedRun, presets: Path) -> Anchor:
    """The preset in the published layout, batch and recomputation."""
    recompute = [f"train.recompute={run.recompute}"]
    if run.recompute not in ("none", "full"):
        recompute = ["train.recompute=selective", f"train.recompute_blocks='{run.recompute}'"]
    path = presets / f"{run.preset}.yaml"
    overrides = [
        *WITHOUT_LAYOUT,
        f"model.pattern='{load_config(path).model.pattern.replace('|', '')}'",
        *(f"parallel.{key}={value}" for key, value in run.layout.items()),
        "parallel.zero_stage=1",
        *recompute,
        "train.gradient_sums=hook",  # as the efficiencies were judged, and as FSDP, which cuts some of the rows
        f"train.sequence_length={run.sequence_length}",
        f"train.micro_batch_size={run.micro_batch_size}",
        f"train.global_batch_size={run.global_batch_size}",
        *run.low_precision,
        *(() if run.has_router else WITHOUT_LOSSES),
    ]
    config = load_checked(path, overrides, world_size=run.gpus)
    config = config.model_copy(update={"model": with_depths(config.model, run.depths)})
    layout = Layout.of(config, run.gpus)
    assert config.model.moe is not None, f"{run.preset} has no experts, and every published run has"
    is_padded = run.padding > 1.0  # to a capacity, over which choices are lost
    assumptions = Assumptions(
        imbalance=NATURAL_IMBALANCE if run.routing == "natural" and not is_padded else run.padding,
        sent_rows=sent_rows(config.model.moe, layout.expert, HARDWARE["h100"].gpus_per_node, has_router=run.has_router),
        meanwhile=run.meanwhile,
        repeats=run.repeats,
        drains=run.drains,
    )
    flops = sum(flops_per_token(config.model, run.sequence_length).values())
    return Anchor(run, config, layout, flops, assumptions)


def with_depths(model: ModelConfig, depths: str) -> ModelConfig:
    """The preset's main blocks with the published MTP layers, or none."""
    main = model.without_depths()
    shared = MtpConfig(shared=True) if depths.count("/") > 1 else None
    return main.model_copy(update={"pattern": main.pattern + depths, "mtp": shared})


def sent_rows(moe: MoeConfig, expert_ranks: int, gpus_per_node: int, *, has_router: bool = True) -> float:
    """Of rows sent once to each rank, as a router expects, the part that is sent where a token is sent once per node, inside a
    node once per rank.
    """
    places = expert_ranks if expert_ranks <= gpus_per_node else expert_ranks // gpus_per_node
    reached = expected_ranks(moe, places) if has_router else counted_off(moe, places)
    return reached / expected_ranks(moe, expert_ranks)


def counted_off(moe: MoeConfig, places: int) -> float:
    """Of equal `places` of all experts, those with experts of a token to which experts are counted off: token t gets the K from
    number t K on, and after the last expert the first again. The mean over tokens.
    """
    held, top_k = moe.num_experts // places, moe.top_k
    tokens = moe.num_experts // math.gcd(moe.num_experts, top_k)  # after which the numbers are the same again
    reached = ({(token * top_k + k) % moe.num_experts // held for k in range(top_k)} for token in range(tokens))
    return sum(map(len, reached)) / tokens


def fit_halves(anchors: list[Anchor]) -> tuple[tuple[Hardware, Hardware], list[float]]:
    """Hardware fitted to every other run from the first and from the second; and each run's ratio under the other's fit."""
    halves = fit_anchors(anchors[::2]), fit_anchors(anchors[1::2])
    return halves, [anchor.ratio(anchor.plan(halves[1 - place % 2])) for place, anchor in enumerate(anchors)]


def fit_anchors(anchors: list[Anchor]) -> Hardware:
    """H100 with the efficiencies at which the sum of |log(planned / published)| is least.

    Absolute and not squared: a run that was slow for a reason the plan does not know must not bend the others.
    """

    def loss(hardware: Hardware) -> float:
        return sum(abs(math.log(anchor.ratio(anchor.plan(hardware)))) for anchor in anchors)

    return fit_efficiencies(THEIRS, FITTED, loss)


def anchor_as_dict(anchor: Anchor) -> dict[str, Any]:
    """Planned vs. published speed, by the data sheet's numbers, as `python -m benchmarks.published --json` prints
    them.
    """
    run, found = anchor.published, anchor.plan(THEIRS)
    return {
        "name": run.name,
        "is_stand_in": run.is_stand_in,
        "gpus": run.gpus,
        "layout": found.layout.describe(),
        "recompute": run.recompute,
        "routing": run.routing,
        "published_tokens_per_second_per_gpu": run.tokens_per_second,
        "predicted_tokens_per_second_per_gpu": found.tokens_per_second / run.gpus,
        "error": anchor.ratio(found) - 1,
        "exchange_share": sum(found.step.communication.values()) / found.step.total(),
        "published_flops_per_token": run.flops_per_second / run.tokens_per_second,
        "flops_per_token": anchor.flops_per_token,
        "fits": found.fits(),
        "cause": run.cause,
    }
