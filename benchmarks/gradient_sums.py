"""Weight gradients summed in the products that make them vs. after them: seconds of a step, and distance to float32.

    python -m benchmarks.gradient_sums configs/tiny_cpu.yaml [--rounds 5] [train.precision=bf16 ...]

One process builds the model for both ways from the same seed and lets them take steps in turn; printed is the ratio of the
medians. Under bf16 it also compares the gradients of one step with those of the same weights in float32, as products of a
GPU sum them (float32 inside, `as_a_gpu`): relative error over all matrices.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from amfm.kernels.common import gemm_precision
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.parallel import Parallel
from benchmarks.small_steps import accumulate_gradients, begin_ranks, build_for_steps, take_step

WAYS = ("hook", "product")


def with_settings(config: RunConfig, **train: Any) -> RunConfig:
    """The configuration with other settings of `train`."""
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def compare_seconds(config: RunConfig, parallel: Parallel, rounds: int) -> dict[str, float]:
    """Median seconds of a step, by way, taken in turn after one that warms up."""
    engines = {way: build_for_steps(with_settings(config, gradient_sums=way), parallel)[0] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS if number % 2 else reversed(WAYS):
            begun = time.perf_counter()
            take_step(config, parallel, engines[way], None)
            seconds[way].append(time.perf_counter() - begun)
    return {way: statistics.median(found[1:]) for way, found in seconds.items()}


def gradients_of(config: RunConfig, parallel: Parallel, engine: ZeroEngine) -> dict[str, torch.Tensor]:
    """Gradients of all matrices after the passes of one step, by name."""
    accumulate_gradients(config, parallel, engine, None)
    assert engine.buckets is not None, "ZeRO 1 or 2"
    found = {}
    for bucket in engine.buckets.buckets:
        flat = engine.optimizer.averaged_gradients[bucket.index].flat_partition
        for name, weight, start in zip(bucket.names, bucket.parameters, bucket.offsets, strict=True):
            if weight.dim() > 1:
                found[name] = flat[start : start + weight.numel()].double().clone()
    return found


@contextmanager
def as_a_gpu() -> Iterator[None]:
    """Products of bf16 in float32 inside the block, as a GPU sums them; a CPU's own ones are rounded."""
    before, gemm_precision._MULTIPLIES_BF16 = gemm_precision._MULTIPLIES_BF16, False
    try:
        yield
    finally:
        gemm_precision._MULTIPLIES_BF16 = before


def compare_gradients(config: RunConfig, parallel: Parallel) -> dict[str, float]:
    """Relative error of all matrices' gradients against float32 with the same weights, by way."""
    found = {}
    with as_a_gpu():
        for way in WAYS:
            engine, _ = build_for_steps(with_settings(config, gradient_sums=way), parallel)
            found[way] = gradients_of(config, parallel, engine)
        weights = {name: weight.detach().float() for name, weight in engine.module.named_parameters()}
        wide = with_settings(config, precision="float32")
        engine, _ = build_for_steps(wide, parallel)
        with torch.no_grad():
            for name, weight in engine.module.named_parameters():
                weight.copy_(weights[name])
        exact = gradients_of(wide, parallel, engine)
    norm = sum(float(gradient.square().sum()) for gradient in exact.values()) ** 0.5
    return {
        way: sum(float((given[name] - exact[name]).square().sum()) for name in exact) ** 0.5 / norm
        for way, given in found.items()
    }


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    config = load_checked(given.config, given.overrides, world_size=1)
    parallel = begin_ranks(config)
    if given.rounds:
        seconds = compare_seconds(config, parallel, given.rounds)
        print(f"seconds of a step, median of {given.rounds}: " + ", ".join(f"{way} {seconds[way]:.3f}" for way in WAYS))
        print(f"product vs. hook: {seconds['hook'] / seconds['product']:.3f} times as fast")
    if config.train.precision == "bf16":
        errors = compare_gradients(config, parallel)
        print("gradients vs. float32, relative error: " + ", ".join(f"{way} {errors[way]:.3e}" for way in WAYS))


if __name__ == "__main__":
    main()
