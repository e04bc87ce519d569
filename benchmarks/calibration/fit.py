"""Calibrate `amfm plan` on this machine: a hardware file fitted to measured training steps.

How it works: peaks are those of a large product and a large copy here (of the data sheet for a GPU in the plan's
table). The four efficiencies are those with which the plan comes nearest to measured steps of small models: one of each
kind of block, all kinds together, and a step of so few tokens that moving its weights is what takes time. At last steps
that were not fitted are planned with the file and compared with measured ones, which shows how far the fit carries.

Why steps and not single kernels: the plan's formulas leave out launches, small operations and the framework;
efficiencies fitted to whole steps take these in.

Fit a machine's efficiencies, so that planned seconds come nearest to measured ones.

One efficiency after the other by golden sections of its logarithm (Kiefer 1953), several times over: planned seconds only
fall with each, so that every one has a single valley.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amfm.kernels.linear.op import linear
from amfm.launch.bench.kernels import multiplies_bf16
from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.hardware import GIB, HARDWARE, Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.time import estimate_step
from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.config.schema import OptimizerConfig, RunConfig
from amfm.pretrain.engine.engine import Precision, build_engine
from amfm.pretrain.monitor.environment import read_processor_name
from amfm.pretrain.parallel import Parallel, initialize_parallel

LEAST = 1e-3  # of an efficiency
SWEEPS, SECTIONS = 12, 24  # at most, over all efficiencies, and of the range of one
SETTLED = 1e-3  # change of each efficiency in a sweep, as a part of it, after which another one is not worth it


def fit_efficiencies(hardware: Hardware, fields: Sequence[str], loss: Callable[[Hardware], float]) -> Hardware:
    """The hardware with `fields` (each in (0, 1]) set so that `loss` is least along each of them."""
    for _ in range(SWEEPS):
        before = [getattr(hardware, field) for field in fields]
        for field in fields:

            def loss_at(power: float, hardware: Hardware = hardware, field: str = field) -> float:
                return loss(hardware.model_copy(update={field: LEAST**power}))

            hardware = hardware.model_copy(update={field: LEAST ** find_valley(loss_at)})
        if all(abs(getattr(hardware, field) / old - 1) < SETTLED for field, old in zip(fields, before)):
            break
    return hardware


def find_valley(loss: Callable[[float], float]) -> float:
    """Where in [0, 1] a function with a single valley is least, by golden sections."""
    ratio = (5**0.5 - 1) / 2
    low, high, left, right = 0.0, 1.0, 1.0 - ratio, ratio
    at_left, at_right = loss(left), loss(right)
    for _ in range(SECTIONS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return low if low < 1e-3 else (low + high) / 2


FITTED = ("product_efficiency", "grouped_efficiency", "attention_efficiency", "memory_efficiency")
KINDS = ("-", "E", "M", "*")
ROWS, TOKENS = 4, 512
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
BLOCKS = 4  # of a model of one kind
FEW_TOKENS = 64
MIXED_WEIGHT = 4  # of the model of all kinds against one of a single kind: it is what is trained


def granite_shape() -> ModelConfig:
    """The model that is measured: 6 Mamba2 and 2 attention layers, each followed by 8 experts, 19.5M parameters."""
    return ModelConfig(
        pattern="(ME)*3 *E (ME)*3 *E",
        vocab_size=8192,
        hidden_size=256,
        tie_embeddings=True,
        mamba=Mamba2Config(num_heads=8, head_dim=64, state_size=128, num_groups=1, chunk_size=64),
        attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=32),
        moe=MoeConfig(
            num_experts=8,
            top_k=2,
            expert_hidden_size=256,
            shared_expert_hidden_size=256,
            activation="swiglu",
            router="softmax",
        ),
    )


@dataclass(frozen=True)
class Check:
    """Seconds of a whole step, planned with the file and measured."""

    name: str
    planned: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the plan, positive when it says more."""
        return self.planned / self.measured - 1


def measure_machine(
    *, rounds: int, num_threads: int | None, report: Callable[[str], None]
) -> tuple[Hardware, list[Check]]:
    """Measure this machine; returns the fitted hardware, and checks that say how well the plan then does.

    Needs a separate process with one rank, since it sets up process groups and threads.
    """
    parallel = initialize_parallel(timeout_seconds=600, num_threads=num_threads)
    precision: Precision = "bf16" if multiplies_bf16(parallel.device) else "float32"
    report("measuring peaks")
    peaks = measure_peaks(parallel.device)
    shape = granite_shape()
    dense = shape.model_copy(update={"feed_forward": FeedForwardConfig(hidden_size=1024, activation="swiglu")})
    fitted = [run_config(dense.model_copy(update={"pattern": BLOCKS * kind}), precision, ROWS) for kind in KINDS]
    fitted += [run_config(_widen(shape), precision, 1, FEW_TOKENS), run_config(shape, precision, ROWS)]
    others = [run_config(shape, precision, ROWS // 2), run_config(_widen(shape), precision, ROWS)]
    measured = time_steps([*fitted, *others], parallel, rounds, report)
    # Only the model of all kinds of blocks is like what people train: it counts for more than models of one kind.
    weights = [1] * (len(fitted) - 1) + [MIXED_WEIGHT]
    hardware = fit(peaks, [*zip(fitted, measured, weights)])
    names = ("the benchmark's step, fitted", "half of its rows", "twice its width")
    checks = [
        Check(name, planned_seconds(config, hardware), seconds)
        for name, config, seconds in zip(names, [fitted[-1], *others], measured[len(fitted) - 1 :])
    ]
    return hardware, checks


def planned_seconds(config: RunConfig, hardware: Hardware) -> float:
    """Seconds of one rank's step by the plan's formulas."""
    return estimate_step(config, Layout.of(config, 1), hardware, storage_of(config), overlap=0.5).total()


def fit(hardware: Hardware, targets: Sequence[tuple[RunConfig, float, int]]) -> Hardware:
    """Fit the efficiencies: least weighted squares of log(planned / measured) over `targets` of (run, seconds, weight)."""

    def loss(found: Hardware) -> float:
        return sum(weight * math.log(planned_seconds(run, found) / seconds) ** 2 for run, seconds, weight in targets)

    return fit_efficiencies(hardware, FITTED, loss)


def time_steps(
    configs: Sequence[RunConfig], parallel: Parallel, rounds: int, report: Callable[[str], None]
) -> list[float]:
    """Least seconds of a step of each run, all taking turns; two rounds warm up.

    The least, not the median: what else the machine does can only add to a step.
    """
    steps = [_build_step(config, parallel) for config in configs]
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(2 + rounds):
        report(f"round {number + 1} of {2 + rounds}" if number > 1 else "warming up")
        for step, times in zip(steps, seconds):
            gc.collect()
            started = now(parallel.device)
            step()
            times.append(now(parallel.device) - started)
    return [min(times[2:]) for times in seconds]


def _build_step(config: RunConfig, parallel: Parallel) -> Callable[[], None]:
    """A training step of the run under our engine, on random tokens that stay the same."""
    device, train = parallel.device, config.train
    model = HybridModel(config.model, parallel.groups, backend="auto", seed=0, device=device).train()
    engine = build_engine(model, optimizer=OPTIMIZER, precision=train.precision, zero_stage=1, parallel=parallel)
    tokens_BT = torch.randint(config.model.vocab_size, (train.micro_batch_size, train.sequence_length), device=device)
    meta = PackMeta.one_document_a_row(*tokens_BT.shape, device=device)

    def step() -> None:
        with engine.accumulate(1):
            engine.backward(engine.forward(tokens_BT, meta, labels=tokens_BT).loss.total / tokens_BT.numel())
        engine.step(OPTIMIZER.learning_rate)

    return step


def now(device: torch.device) -> float:
    """Clock in seconds, read after the device has finished its work.

    One thread's own CPU time on a CPU, so that other work on the machine does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def run_config(model: ModelConfig, precision: Precision, rows: int, tokens: int = TOKENS) -> RunConfig:
    """Configuration of one micro-batch per step on one rank; its data are never read."""
    tree = {
        "run": {"dir": "unused", "tensorboard": False},
        "model": model.model_dump(),
        "data": {
            "store": "none",
            "tokenizer": {"vocab_size": model.vocab_size},
            "sources": [{"name": "none", "paths": ["none.txt"]}],
        },
        "train": {
            "steps": 10,
            "sequence_length": tokens,
            "micro_batch_size": rows,
            "global_batch_size": rows,
            "precision": precision,
        },
        "optimizer": OPTIMIZER.model_dump(),
    }
    return RunConfig.model_validate(tree)


def _widen(model: ModelConfig) -> ModelConfig:
    """The same blocks twice as wide: residual width, heads and inner widths."""
    assert model.mamba is not None and model.attention is not None and model.moe is not None, "granite_shape has all"
    moe = model.moe
    return model.model_copy(
        update={
            "hidden_size": 2 * model.hidden_size,
            "mamba": model.mamba.model_copy(update={"num_heads": 2 * model.mamba.num_heads}),
            "attention": model.attention.model_copy(update={"num_heads": 2 * model.attention.num_heads}),
            "moe": moe.model_copy(
                update={
                    "expert_hidden_size": 2 * moe.expert_hidden_size,
                    "shared_expert_hidden_size": 2 * moe.shared_expert_hidden_size,
                }
            ),
        }
    )


def measure_peaks(device: torch.device) -> Hardware:
    """Peaks, memory and bandwidth, with all fitted efficiencies at 1.

    A GPU of the plan's table keeps its data sheet and links; only its memory is read here.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory, name = properties.total_memory / GIB, properties.name
        for key, known in HARDWARE.items():
            if key.upper() in name.upper():
                return known.model_copy(update={"name": name, "memory_gib": round(memory, 1)})
    else:
        memory, name = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, read_processor_name()
    copied = copied_bytes_per_second(device)
    return Hardware(
        name=f"{name}, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else name,
        bf16_flops=product_flops(device, torch.bfloat16),
        float32_flops=product_flops(device, torch.float32),
        memory_gib=round(memory, 1),
        memory_bytes_per_second=copied,
        gpus_per_node=max(1, torch.cuda.device_count()),
        # Ranks of one machine without links of their own: what one hands over is written and read once.
        node_link_bytes_per_second=copied / 2,
        network_bytes_per_second=copied / 2,
        product_efficiency=1.0,
        grouped_efficiency=1.0,
        attention_efficiency=1.0,
        memory_efficiency=1.0,
    )


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of large square products by our `linear`, FLOPs per second."""
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    return max(2 * size**3 / _least_seconds(partial(linear, *_squares(size, device, dtype)), device) for size in sizes)


def _squares(size: int, device: torch.device, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    return [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]


def copied_bytes_per_second(device: torch.device) -> float:
    """Memory bandwidth of copies far larger than any cache, bytes read and written a second."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _least_seconds(lambda: target.copy_(source), device)


def _least_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Least seconds of a piece of work over five runs, after one that warms up."""
    seconds = []
    for _ in range(6):
        started = now(device)
        work()
        seconds.append(now(device) - started)
    return min(seconds[1:])


def write_hardware(hardware: Hardware, checks: Sequence[Check], path: Path) -> None:
    """Write the YAML file for `amfm plan --gpu`, the checks as comments."""
    lines = [
        "# Written by `python -m benchmarks.calibration`. Links were not measured, and are those of the plan's table or a copy",
        "# through memory; `amfm doctor --nproc N` measures them.",
        *(
            f"# {check.name}: planned {check.planned:.3f} s, measured {check.measured:.3f} s ({check.error:+.0%})"
            for check in checks
        ),
    ]
    for field, value in hardware.model_dump().items():
        lines.append(f"{field}: {value:.5e}" if isinstance(value, float) else f"{field}: {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
