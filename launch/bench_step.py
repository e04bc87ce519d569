"""A training step side by side: our model under our engine, in a bare loop, and the same model in transformers.

All variants start from the same weights, see the same batch and use fused AdamW. They take turns, so that a machine
that drifts slows all of them; a variant's figure is its median.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from model.config import AttentionConfig, Mamba2Config, ModelConfig, MoeConfig
from model.huggingface_config import TokenIds, huggingface_config
from model.huggingface_weights import weight_map
from model.hybrid import HybridModel
from model.packing import PackMeta
from pretrain.config import OptimizerConfig
from pretrain.engine import Precision, build_engine
from pretrain.optimizer import build_adamw
from pretrain.parallel import Parallel, initialize_parallel

ROWS, TOKENS = 4, 512
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
# Losses of the first step, same weights and batch, float32 against float32: sums over 2,048 tokens in another order.
LOSS_TOLERANCE = 1e-4


def granite_shape() -> ModelConfig:
    """The benchmark's model: 6 Mamba2 and 2 attention layers, each followed by 8 experts, 19.5M parameters."""
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
class Variant:
    """One way to do a step: `run` takes tokens and labels [B, T] and returns the loss a token."""

    name: str
    run: Callable[[torch.Tensor, torch.Tensor], float]


def build_variants(names: list[str], config: ModelConfig, num_threads: int | None) -> list[Variant]:
    """The named variants, all from the same first weights."""
    parallel = initialize_parallel(timeout_seconds=600, num_threads=num_threads)
    builders: dict[str, Callable[[], Callable[[torch.Tensor, torch.Tensor], float]]] = {
        "transformers_default": lambda: _transformers_step(config, parallel, tuned=False),
        "transformers_tuned": lambda: _transformers_step(config, parallel, tuned=True),
        "bare_loop": lambda: _bare_step(config, parallel),
        "ours_fp32": lambda: _engine_step(config, parallel, "float32", compiled=False),
        "ours_bf16": lambda: _engine_step(config, parallel, "bf16", compiled=False),
        "ours_fp32_compiled": lambda: _engine_step(config, parallel, "float32", compiled=True),
        "ours_bf16_compiled": lambda: _engine_step(config, parallel, "bf16", compiled=True),
    }
    return [Variant(name, builders[name]()) for name in names]


def _build_model(config: ModelConfig, parallel: Parallel) -> HybridModel:
    return HybridModel(config, parallel.groups, backend="auto", seed=0, device=parallel.device).train()


def _engine_step(
    config: ModelConfig, parallel: Parallel, precision: Precision, *, compiled: bool
) -> Callable[[torch.Tensor, torch.Tensor], float]:
    model = _build_model(config, parallel)
    engine = build_engine(model, optimizer=OPTIMIZER, precision=precision, zero_stage=1, parallel=parallel)
    if compiled:
        model.compile_blocks()

    def run(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        meta = PackMeta.one_document_a_row(*tokens_BT.shape, device=tokens_BT.device)
        with engine.accumulate(1):
            loss = engine.forward(tokens_BT, meta, labels_BT=labels_BT).loss
            engine.backward(loss.total / labels_BT.numel())
        engine.step(OPTIMIZER.learning_rate)
        return float(loss.nll_sum) / labels_BT.numel()

    return run


def _bare_step(config: ModelConfig, parallel: Parallel) -> Callable[[torch.Tensor, torch.Tensor], float]:
    model = _build_model(config, parallel)
    adamw = build_adamw(model, OPTIMIZER)

    def run(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        meta = PackMeta.one_document_a_row(*tokens_BT.shape, device=tokens_BT.device)
        loss = model(tokens_BT, meta, labels_BT=labels_BT).loss
        (loss.total / labels_BT.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return float(loss.nll_sum) / labels_BT.numel()

    return run


def _transformers_step(
    config: ModelConfig, parallel: Parallel, *, tuned: bool
) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """transformers' own model and loss. Tuned: chunks of 64, and autocast to bf16 where the processor multiplies it."""
    from transformers import AutoModelForCausalLM

    fields = huggingface_config(config, "granitemoehybrid", TokenIds(0, 0, 0), max_position_embeddings=TOKENS)
    fields["mamba_chunk_size"] = 64 if tuned else 256
    weights = weight_map(config, "granitemoehybrid").to_theirs(dict(_build_model(config, parallel).named_parameters()))
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_file(
            {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()},
            Path(folder) / "model.safetensors",
            metadata={"format": "pt"},
        )
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(parallel.device).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=OPTIMIZER.learning_rate, betas=(0.9, 0.95), fused=True)
    autocast = tuned and multiplies_bf16(parallel.device)

    def run(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        with torch.autocast(parallel.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens_BT, labels=labels_BT, shift_labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return float(loss)

    return run


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products; a CPU without them emulates them many times slower."""
    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())


def time_variants(variants: list[Variant], *, rounds: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Interleaved timing: one warm-up step each, then `rounds` steps each, taking turns. Seconds a step by variant."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 8192, (ROWS, TOKENS + 1))
    tokens_BT, labels_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    first_losses = {}
    for variant in variants:
        report(f"warming up {variant.name}")
        first_losses[variant.name] = variant.run(tokens_BT, labels_BT)
        variant.run(tokens_BT, labels_BT)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        report(f"round {number + 1} of {rounds}")
        for variant in variants:
            gc.collect()
            started = time.perf_counter()
            variant.run(tokens_BT, labels_BT)
            seconds[variant.name].append(time.perf_counter() - started)
    return {"first_losses": first_losses, "seconds": seconds}


def bench_step(
    names: list[str], *, rounds: int, num_threads: int | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """Measure and return one object: variants with seconds, tokens a second and ratio to transformers' default.

    Raises RuntimeError when float32 variants disagree in their first loss: they would not be the same model.
    """
    config = granite_shape()
    measured = time_variants(build_variants(names, config, num_threads), rounds=rounds, report=report)
    _check_losses(measured["first_losses"])
    medians = {name: statistics.median(times) for name, times in measured["seconds"].items()}
    base = medians.get("transformers_default")
    variants = {
        name: {
            "seconds": median,
            "seconds_min": min(measured["seconds"][name]),
            "seconds_max": max(measured["seconds"][name]),
            "tokens_per_second": ROWS * TOKENS / median,
            "ratio_to_transformers_default": base / median if base else None,
            "first_loss": measured["first_losses"][name],
        }
        for name, median in medians.items()
    }
    return {
        "shape": {"rows": ROWS, "tokens": TOKENS, "model": config.model_dump()},
        "rounds": rounds,
        "hardware": describe_hardware(),
        "variants": variants,
    }


def _check_losses(first_losses: dict[str, float]) -> None:
    exact = {name: loss for name, loss in first_losses.items() if "bf16" not in name and name != "transformers_tuned"}
    if exact and max(exact.values()) - min(exact.values()) > LOSS_TOLERANCE:
        raise RuntimeError(
            f"the float32 variants differ in their first loss by more than {LOSS_TOLERANCE}: {exact}; "
            "they are not the same model, so their speeds say nothing"
        )


def describe_hardware() -> dict[str, Any]:
    """What the numbers were taken on."""
    import transformers

    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "bf16_products": multiplies_bf16(torch.device("cpu")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor_name() -> str:
    """The CPU, as it calls itself."""
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
