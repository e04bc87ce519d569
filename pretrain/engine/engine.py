"""DeepSpeed behind one small class: ZeRO 0-3, float32 and bf16, several backward passes a step, one reduction.

What happens to a gradient in a step:

    loss of a micro-batch               a share of the global batch's loss
        |
        |  backward, once for each micro-batch
        v
    float32 sum                         ZeRO 1 and 2: one for each parameter group (`GradientBuckets`), to which products of
        |                               large weights add in their own kernels, and a hook what autograd was given of the
        |                               others. ZeRO 0 and 3: a hook adds up bf16 gradients (`Float32Accumulator`); their sum
        |                               is rounded to bf16 once, at the end
        v
    sums over tensor, expert            where a rank saw only its tokens, heads or pipeline end, its gradient is a part
    and pipeline ranks                  (`sum_partial_gradients`)
        |
        v
    sum over data x context ranks       ZeRO 1 and 2: of each bucket inside the last backward pass (2: of each pass);
        |                               ZeRO 0 and 3: by DeepSpeed, once, after all micro-batches
        v
    check                               the first parameter with NaN is named; a step to be skipped is poisoned, so that
        |                               every optimizer, on every rank, leaves it out
        |  `step`
        v
    global norm, clipping               `GlobalNorm`: every element of the model counts once, however many ranks hold it
        |
        v
    AdamW on float32 master weights            each data rank its range (ZeRO 1-3); weights follow from the master weights. Muon's
                                        matrices meet at their owners in between (engine/muon); master weights may be bf16
                                        (engine/adamw.py), and DeepSpeed then hands over gradients rounded to bf16

DeepSpeed's own accumulation is not used (it sees one micro-batch per step): it would reduce after every micro-batch under
ZeRO 2 and 3, add up in bf16, and know nothing of partial gradients. Where it reduces (ZeRO 0 and 3) it averages over data
ranks, and `scale` multiplies losses by their number.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from amfm.kernels.runtime.compiling import nothing_compiled
from amfm.model.matrices import list_matrices
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.pretrain.config.schema import OptimizerConfig
from amfm.pretrain.engine.adamw import Bf16AdamW
from amfm.pretrain.engine.buckets import GradientBuckets
from amfm.pretrain.engine.deepspeed_adapters import (
    DataclassOutputHooks,
    is_not_about_types,
    register_experts_with_deepspeed,
)
from amfm.pretrain.engine.grad_norm import GlobalNorm
from amfm.pretrain.engine.gradients import (
    Float32Accumulator,
    GradientFault,
    PartialGradient,
    clip_by_norm,
    find_fault,
    find_partial_gradients,
    poison_gradients,
    sum_partial_gradients,
)
from amfm.pretrain.engine.optimizer import build_optimizer
from amfm.pretrain.engine.parts import list_parts
from amfm.pretrain.parallel import Parallel, set_deepspeed_accelerator

set_deepspeed_accelerator()

import deepspeed  # noqa: E402
from deepspeed.ops import __compatible_ops__  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

Precision = Literal["float32", "bf16"]
BUCKETED = (1, 2)  # ZeRO stages that reduce by parameter groups
# Enough for the links' full speed, few enough to leave most of a backward pass next to them.
BUCKET_ELEMENTS = 50_000_000
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepOutcome:
    """Result of an optimizer step: the global gradient norm before clipping, and whether the weights moved."""

    grad_norm: float
    applied: bool


class ZeroEngine:
    """Runs a module under DeepSpeed. A step is `with engine.accumulate(n):` n times `backward(loss)`, then `step(rate)`.

    Losses must be shares of the global batch's loss (divided by global counts), because gradients are only summed. Every
    rank must enter `accumulate` and call `step`. `fault`: what was wrong with this rank's gradients in the last step.
    """

    def __init__(
        self,
        engine: Any,
        groups: ProcessGroupCollection,
        norm: GlobalNorm,
        *,
        precision: Precision,
        zero_stage: int,
        clip_norm: float | None,
        partials: Sequence[PartialGradient],
        sums_in_products: bool = True,
        record: Callable[[str, int], None] | None = None,
    ) -> None:
        self.deepspeed = engine
        self.groups = groups
        self.norm = norm
        self.partials = partials
        self.buckets: GradientBuckets | None = None
        if zero_stage in BUCKETED:
            self.buckets = GradientBuckets(
                engine.module,
                engine.optimizer,
                [entry.parameter for entry in partials],
                every_pass=zero_stage == 2,
                in_products=sums_in_products,
                record=record,
            )
            self.waits_by_part = hasattr(engine.module, "before_use")
            if self.waits_by_part:
                engine.module.before_use = self.buckets.wait_for
        self.precision = precision
        self.zero_stage = zero_stage
        self.clip_norm = clip_norm
        self.fault: GradientFault | None = None
        self.is_refused = False
        self.refusal: str | None = None
        self.accumulator: Float32Accumulator | None = None

    @property
    def module(self) -> Any:
        """The model itself; its parameters are partitioned under ZeRO-3."""
        return self.deepspeed.module

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer: a ZeRO optimizer, its unfused float32-master wrapper, or AdamW itself."""
        return self.deepspeed.optimizer

    @property
    def adamw(self) -> torch.optim.AdamW:
        """AdamW, or Muon, which is one for what is not a matrix: its groups and, per flat fragment, moments and
        counters.
        """
        return self.deepspeed.basic_optimizer

    @property
    def data_world_size(self) -> int:
        """Ranks over which gradients are summed."""
        return int(self.deepspeed.dp_world_size)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the module's forward pass; under ZeRO each part's new weights are awaited, or gathered, on the way."""
        if self.buckets is not None:
            if not self.waits_by_part:
                self.buckets.wait_for_all()
            return self.module(*inputs, **keywords)
        return self.deepspeed(*inputs, **keywords)

    def wait_for_weights(self) -> None:
        """Wait until every weight on this rank is that of the last step, for those who read them outside of a forward pass."""
        if self.buckets is not None:
            self.buckets.wait_for_all()

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply a loss by the number of data ranks where DeepSpeed divides by it: gradients are to be summed."""
        return loss * self.data_world_size if self.buckets is None else loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to this rank's; nothing is reduced yet."""
        loss = self.scale(loss)
        if self.zero_stage != 3:
            loss.backward()
        else:
            self.deepspeed.backward(loss, scale_wrt_gas=False)

    @contextmanager
    def accumulate(self, num_backwards: int) -> Iterator[None]:
        """Sum gradients inside the block; on leaving it they are reduced over all ranks. Every rank must enter."""
        if self.buckets is not None:
            self.buckets.open(num_backwards)
            yield
            self.fault = self.buckets.close(
                partial(sum_partial_gradients, self.partials, self.groups), refuse=self.is_refused
            )
            self.is_refused = False
            return
        self.accumulator = Float32Accumulator(self.module) if self.precision == "bf16" and num_backwards > 1 else None
        if self.zero_stage > 0:
            with self.deepspeed.coalesce_grad_reduction():
                yield
                self._close_accumulation()
        else:
            yield
            self._close_accumulation()
            self.deepspeed.allreduce_gradients()

    def take_gradient(self, weight: Tensor) -> None:
        """Collect a gradient that a pipeline schedule added past autograd's hooks, inside `accumulate`."""
        if self.buckets is not None:
            self.buckets.collect(weight)
        elif self.accumulator is not None:
            self.accumulator.collect(weight)

    def skip_next_step(self) -> None:
        """Make the coming step move nothing on any rank, as if its gradients were not finite; inside `accumulate`."""
        self.is_refused = True

    def reduced_norm(self) -> float:
        """The global norm of the gradients, after `accumulate` and before `step`. Every rank must call this."""
        if self.zero_stage == 0:
            return float(self.norm.of_whole(list(self.module.parameters())))
        return float(self.norm.of_ranges(self.norm.gradient_pieces(self.deepspeed)))

    def refuse_update(self, reason: str) -> None:
        """Make the coming step move nothing, after `accumulate`; the same on all ranks, which must all call this."""
        self.refusal = reason
        for _, gradient, _ in self.norm.gradient_pieces(self.deepspeed):
            gradient.fill_(float("inf"))

    def take_refusal(self) -> str | None:
        """Why the last update was rejected; None if it was not, or was asked before."""
        reason, self.refusal = self.refusal, None
        return reason

    def _close_accumulation(self) -> None:
        """Complete this rank's gradients before DeepSpeed reduces them: sum, check, and poison a rejected step."""
        if self.accumulator is not None:
            self.accumulator.finish()
        self.accumulator = None
        sum_partial_gradients(self.partials, self.groups)
        self.fault = find_fault(self.module)
        if self.is_refused:
            poison_gradients(self.module)
            self.is_refused = False

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip by the global norm and update the weights at this rate; a non-finite norm updates nothing, on any rank.

        Every rank must call this.
        """
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group.get("rate_scale", 1.0)
        if self.zero_stage == 0 and self.precision == "float32":
            # Plain AdamW: DeepSpeed neither reports the norm nor rejects a bad one here.
            parameters = list(self.module.parameters())
            grad_norm = float(self.norm.of_whole(parameters))
            clip_by_norm([p.grad for p in parameters if p.grad is not None], grad_norm, self.clip_norm)
            if not math.isfinite(grad_norm):
                self.deepspeed.zero_grad()
                return StepOutcome(grad_norm, applied=False)
            self.deepspeed.step()
            return StepOutcome(grad_norm, applied=True)
        with nullcontext() if self.buckets is None else self.buckets.gathering():
            self.deepspeed.step()
        applied = bool(self.deepspeed.was_step_applied())
        return StepOutcome(float(self.deepspeed.get_global_grad_norm()), applied)


def build_engine(
    module: nn.Module,
    *,
    optimizer: OptimizerConfig,
    precision: Literal["auto", "float32", "bf16"],
    zero_stage: int,
    parallel: Parallel,
    offload_optimizer: bool = False,
    bucket_elements: int = BUCKET_ELEMENTS,
    sums_in_products: bool = True,
    record: Callable[[str, int], None] | None = None,
) -> ZeroEngine:
    """Put a module, built in float32 and identically on all data ranks, under DeepSpeed. Every rank must call this.

    With bf16 the weights become bf16 copies of float32 master weights; buffers (such as the router's balancing bias) stay
    float32, because they are state that small steps move. `offload_optimizer` (ZeRO 1-3): master weights and moments stay in
    the memory of the host, where torch's fused AdamW steps them. `bucket_elements` (ZeRO 1 and 2): gradients that are
    reduced together, at least, `sums_in_products`: products add their weights' gradients to those sums, and `record` is told
    of the reductions and gathers (`GradientBuckets`).
    """
    assert precision != "auto", "train.precision is settled at the start of a run"
    quiet_deepspeed()
    if parallel.device.type == "cpu":
        # The shared-memory collectives need a compiler at first use; gloo does the work without them.
        __compatible_ops__["deepspeed_shm_comm"] = False
    # On a GPU it registers passes of a compiler that nothing here uses, for which it imports all of Inductor.
    deepspeed.runtime.engine.is_deepcompile_supported = lambda: False
    module.to(parallel.device)
    # Remembered before DeepSpeed casts the whole module: `restore_buffers` puts the float32 ones back.
    buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    # While parameters have their shapes: ZeRO-3 takes them away.
    matrices = optimizer.matrix_settings()
    stacks = [] if matrices is None else list_matrices(module, parallel.groups, per_head=matrices.per_head)
    bridge = DataclassOutputHooks(module) if zero_stage == 3 else None
    if bridge is not None:
        bridge.open()
    partials = find_partial_gradients(module, parallel.groups)
    buckets: dict[str, Any] = {}
    if zero_stage in BUCKETED:
        buckets = {"bucket_elements": bucket_elements, "apart": [entry.parameter for entry in partials]}
    # Nothing of DeepSpeed's is compiled; a muon of its own would be.
    with register_experts_with_deepspeed(module, parallel.groups), nothing_compiled():
        engine, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, optimizer, stacks, **buckets),
            mpu=parallel.mpu,
            config=describe_for_deepspeed(
                module, optimizer, precision, zero_stage, offload_optimizer=offload_optimizer
            ),
            dist_init_required=False if deepspeed.comm.is_initialized() else None,
        )
    if bridge is not None:
        bridge.close()
    restore_buffers(module, buffers)
    engine.basic_optimizer.state.clear()  # the unfused wrapper has stepped once, with zeros, to allocate
    if stacks:
        engine.basic_optimizer.attach(list_parts(engine), stacks, parallel.groups, precision)
    elif isinstance(engine.basic_optimizer, Bf16AdamW):
        engine.basic_optimizer.attach(list_parts(engine))
    norm = GlobalNorm(module, parallel)
    norm.install(engine)
    return ZeroEngine(
        engine,
        parallel.groups,
        norm,
        precision=precision,
        zero_stage=zero_stage,
        clip_norm=optimizer.clip_grad_norm,
        partials=partials,
        sums_in_products=sums_in_products,
        record=record,
    )


def describe_for_deepspeed(
    module: nn.Module, optimizer: OptimizerConfig, precision: Precision, zero_stage: int, *, offload_optimizer: bool
) -> dict[str, Any]:
    """Build DeepSpeed's configuration, in which a step has one micro-batch: accumulation is done in `ZeroEngine`."""
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    # Reduction buffers are allocated in full; their size must be even.
    bucket_elements = min(num_parameters + num_parameters % 2, 200_000_000)
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Plain AdamW's gradients are clipped in `ZeroEngine.step`; DeepSpeed would clip them again, by its own norm.
        "gradient_clipping": 0.0 if zero_stage == 0 and precision == "float32" else optimizer.clip_grad_norm or 0.0,
        "bf16": {
            "enabled": precision == "bf16",
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": optimizer.state_dtype == "bf16",
            "bf16_optimizer_states": optimizer.state_dtype == "bf16",
        },
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own AdamW for the host needs a compiler at first use.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero_stage,
            **({"offload_optimizer": host} if offload_optimizer else {}),
            "overlap_comm": False,
            "reduce_bucket_size": bucket_elements,
            "allgather_bucket_size": bucket_elements,
            # ZeRO-3 keeps smaller weights whole on every rank: gathering them costs more than they weigh.
            "stage3_param_persistence_threshold": min(100_000, num_parameters // 100),
        },
        "steps_per_print": None,
    }


def restore_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Restore the float32 buffers that a cast of the whole module replaced."""
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, buffer)


def is_not_about_muon(record: logging.LogRecord) -> bool:
    """Filter DeepSpeed's warning of an optimizer that it does not know: our tests know it."""
    return "untested optimizer" not in record.getMessage()


def quiet_deepspeed() -> None:
    """Let DeepSpeed log warnings and errors only, to standard error: standard output belongs to results."""
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed_logger.addFilter(is_not_about_types)
    deepspeed_logger.addFilter(is_not_about_muon)
    deepspeed_logger.handlers.clear()
    deepspeed_logger.propagate = True
