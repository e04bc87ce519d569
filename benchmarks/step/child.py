"""One process of `python -m benchmarks.step`: builds its variants, then times a step of each for every line on standard input.

Called as `python -m benchmarks.step.child SETTINGS`, SETTINGS being JSON. Answers: its threads, the first loss of each
variant once that is warm, then the seconds of each in a round.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from amfm.data_pipeline.memory import keep_freed_memory
from amfm.launch.bench.kernels import multiplies_bf16
from amfm.launch.cluster.child import open_answers
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.config.schema import OptimizerConfig
from amfm.pretrain.engine.engine import Precision, build_engine
from amfm.pretrain.engine.optimizer import build_optimizer
from amfm.pretrain.parallel import Parallel, initialize_parallel
from benchmarks.calibration.fit import OPTIMIZER
from benchmarks.in_transformers import build_in_transformers


def serve(settings: dict[str, Any]) -> None:
    """Warm up settings["names"] one after another, an answer each, then answer with a round for every line."""
    answer = open_answers()
    if settings["keep_freed_memory"]:
        assert keep_freed_memory(), "the caller looked whether this process can"
    config = ModelConfig.model_validate(settings["model"])
    parallel = initialize_parallel(timeout_seconds=600, num_threads=settings["threads"])
    torch.manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (settings["rows"], settings["tokens"] + 1), device=parallel.device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    answer({"threads": torch.get_num_threads()})
    variants = []
    for name in settings["names"]:
        sys.stdin.readline()
        variant = build_variant(name, config, parallel, settings["tokens"], settings["micro_batches"])
        loss = variant.run(*batch)
        variant.run(*batch)
        variants.append(variant)
        answer({"first_loss": loss})
    for _ in sys.stdin:
        answer({variant.name: time_step(variant, *batch) for variant in variants})


def time_step(variant: Variant, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
    """Wall seconds of one step, garbage collected before."""
    gc.collect()
    started = time.perf_counter()
    variant.run(tokens_BT, labels_BT)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Variant:
    """One way to do a step: `run` takes tokens and labels [B, T] and returns the loss per token."""

    name: str
    run: Callable[[torch.Tensor, torch.Tensor], float]


def build_variant(
    name: str, config: ModelConfig, parallel: Parallel, num_tokens: int, micro_batches: int = 1
) -> Variant:
    """Build the named variant; all start from the same weights. `micro_batches`: passes of a step under our engine."""
    muon = OPTIMIZER.model_copy(update={"kind": "muon"})
    builders: dict[str, Callable[[], Callable[[torch.Tensor, torch.Tensor], float]]] = {
        "transformers_default": lambda: _transformers_step(config, parallel, num_tokens, tuned=False),
        "transformers_tuned": lambda: _transformers_step(config, parallel, num_tokens, tuned=True),
        "bare_loop": lambda: _bare_step(config, parallel),
        "ours_fp32": lambda: _engine_step(config, parallel, "float32", compiled=False, passes=micro_batches),
        "ours_fp32_muon": lambda: _engine_step(
            config, parallel, "float32", compiled=False, passes=micro_batches, optimizer=muon
        ),
        "ours_bf16": lambda: _engine_step(config, parallel, "bf16", compiled=False),
        "ours_fp32_compiled": lambda: _engine_step(config, parallel, "float32", compiled=True),
        "ours_bf16_compiled": lambda: _engine_step(config, parallel, "bf16", compiled=True),
    }
    return Variant(name, builders[name]())


def _build_model(config: ModelConfig, parallel: Parallel) -> HybridModel:
    return HybridModel(config, parallel.groups, backend="auto", seed=0, device=parallel.device).train()


def _engine_step(
    config: ModelConfig,
    parallel: Parallel,
    precision: Precision,
    *,
    compiled: bool,
    passes: int = 1,
    optimizer: OptimizerConfig = OPTIMIZER,
) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """A step under our engine with ZeRO-1, of this many passes over the batch, its blocks compiled where asked."""
    model = _build_model(config, parallel)
    engine = build_engine(model, optimizer=optimizer, precision=precision, zero_stage=1, parallel=parallel)
    if compiled:
        model.compile_blocks()

    def run(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        meta = PackMeta.one_document_a_row(*tokens_BT.shape, device=tokens_BT.device)
        with engine.accumulate(passes):
            for _ in range(passes):
                loss = engine.forward(tokens_BT, meta, labels=labels_BT).loss
                engine.backward(loss.total / (passes * labels_BT.numel()))
        engine.step(OPTIMIZER.learning_rate)
        return float(loss.nll_sum) / labels_BT.numel()

    return run


def _bare_step(config: ModelConfig, parallel: Parallel) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """A step of our model in a plain PyTorch loop, which shows what the engine costs."""
    model = _build_model(config, parallel)
    adamw = build_optimizer(model, OPTIMIZER)

    def run(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        meta = PackMeta.one_document_a_row(*tokens_BT.shape, device=tokens_BT.device)
        loss = model(tokens_BT, meta, labels=labels_BT).loss
        (loss.total / labels_BT.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return float(loss.nll_sum) / labels_BT.numel()

    return run


def _transformers_step(
    config: ModelConfig, parallel: Parallel, num_tokens: int, *, tuned: bool
) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """transformers' own model and loss. Tuned: chunks of 64, and autocast to bf16 where the processor multiplies it."""
    chunk = {"mamba_chunk_size": 64 if tuned else 256}
    own = _build_model(config, parallel)
    model = build_in_transformers(own, config, "granitemoehybrid", num_tokens, **chunk).to(parallel.device).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=OPTIMIZER.learning_rate, betas=(0.9, 0.95), fused=True)
    autocast = tuned and multiplies_bf16(parallel.device)

    def run(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        with torch.autocast(parallel.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens_BT, labels=labels_BT, shift_labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return float(loss.detach())

    return run


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
