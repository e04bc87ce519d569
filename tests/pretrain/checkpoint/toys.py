"""A toy model under the real engine, with everything that a checkpoint must carry, for tests of the format."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from amfm.pretrain.checkpoint.commit import SavedCheckpoint
from amfm.pretrain.checkpoint.engine_layout import EngineLayout
from amfm.pretrain.checkpoint.fragments import collect_fragments
from amfm.pretrain.checkpoint.load import LoadedCheckpoint, load_newest
from amfm.pretrain.checkpoint.save import save_checkpoint
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.engine import ZeroEngine, build_engine
from amfm.pretrain.engine.parts import list_parts
from amfm.pretrain.parallel import Parallel

IDENTITIES = {"dataset": "d" * 8, "tokenizer": "t" * 8}


class Toy(nn.Module):
    """Odd sizes, so that ranges straddle ranks; a stack of experts; vectors that do not decay; a float32 buffer.

    Large enough that ZeRO 3 keeps its smallest parameters whole on every rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 31)
        self.experts = nn.Parameter(torch.randn(3, 31, 31) / 9)
        self.norm = nn.LayerNorm(31)
        self.down = nn.Linear(31, 3, bias=False)
        self.register_buffer("expert_bias", torch.zeros(3))

    def forward(self, x_BD: Tensor) -> Tensor:
        """A scalar loss, the sum over rows."""
        hidden_BD = self.up(x_BD)
        hidden_BD = hidden_BD + torch.einsum("bd,edf->bf", hidden_BD, self.experts)
        out_BD = self.down(self.norm(hidden_BD)) + self.expert_bias.to(x_BD.dtype)
        return out_BD.square().sum()


def toy_config(**changes: Any) -> RunConfig:
    """A valid RunConfig for the toy; changes by names with double underscores: train__seed=1."""
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"pattern": "M", "vocab_size": 8, "hidden_size": 4, "mamba": {"num_heads": 8}},
        "data": {"store": "unused", "sources": [{"name": "plays", "paths": ["unused"]}]},
        "train": {"steps": 10_000, "sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 2},
        "optimizer": {"learning_rate": 1e-2},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return RunConfig.model_validate(tree)


def make_engine(
    parallel: Parallel,
    *,
    stage: int = 1,
    precision: Any = "float32",
    seed: int = 0,
    extra: bool = False,
    frozen: Collection[str] = (),
) -> ZeroEngine:
    """A fresh engine over a fresh toy, with one layer more on demand, or with parameters that nothing steps."""
    torch.manual_seed(seed)
    toy = Toy()
    if extra:
        toy.extra = nn.Linear(3, 3)
    for name in frozen:
        toy.get_parameter(name).requires_grad_(False)
    return build_engine(toy, optimizer=toy_config().optimizer, precision=precision, zero_stage=stage, parallel=parallel)


def run_steps(engine: ZeroEngine, first: int, last: int) -> list[tuple[float, float]]:
    """Step on inputs that depend only on step and rank; returns (loss, gradient norm) a step."""
    results = []
    rank = engine.deepspeed.global_rank
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x_BD = torch.randn(4, 5, generator=generator).to(next(engine.module.parameters()).dtype)
        with engine.accumulate(1):
            loss = (engine.module if engine.zero_stage == 0 else engine.forward)(x_BD)
            engine.backward(loss)
        results.append((float(loss), engine.step(1e-2 / (1 + step)).grad_norm))
        engine.module.expert_bias += 0.001 * (step + 1)
    return results


def digest_state(engine: ZeroEngine) -> str:
    """SHA-256 of all that this rank holds: master weights, moments, counters, model weights, buffers, random state."""
    engine.wait_for_weights()
    digest = hashlib.sha256()
    for fragment in collect_fragments(engine.deepspeed, list_parts(engine.deepspeed)):
        digest.update(f"{fragment.name} {fragment.start} {fragment.numel} {fragment.optimizer_step}".encode())
        for tensor in fragment.tensors.values():
            digest.update(tensor.contiguous().numpy().tobytes())
    for parameter in engine.module.parameters():
        held = getattr(parameter, "ds_tensor", parameter).detach().flatten()
        if hasattr(parameter, "ds_tensor"):  # ZeRO 3 pads the last ranges with whatever was in memory
            held = held[: max(0, parameter.ds_numel - held.numel() * engine.deepspeed.global_rank)]
        digest.update(held.float().contiguous().numpy().tobytes())
    digest.update(engine.module.expert_bias.numpy().tobytes())
    for group in engine.adamw.param_groups:
        digest.update(str([group[key] for key in ("label", "lr", "betas", "eps", "weight_decay")]).encode())
    digest.update(str((torch.rand(3), numpy.random.rand(3), random.random())).encode())
    return digest.hexdigest()


def save(folder: Path, step: int, engine: ZeroEngine, *, keep_last: int = 9, **changes: Any) -> Path:
    """Save with the toy's config and identities; the checkpoint's folder."""
    return save_whole(folder, step, engine, keep_last=keep_last, **changes).path


def save_whole(folder: Path, step: int, engine: ZeroEngine, *, keep_last: int = 9, **changes: Any) -> SavedCheckpoint:
    """The same, with warnings."""
    return save_checkpoint(
        folder,
        step,
        engine,
        state={"cursor": step, "seen": {"tokens": 10 * step}},
        config=toy_config(**changes),
        identities=IDENTITIES,
        keep_last=keep_last,
    )


def load(
    folder: Path, engine: ZeroEngine, *, identities: dict[str, str] | None = None, **changes: Any
) -> LoadedCheckpoint | None:
    """Load with the toy's config and identities."""
    return load_newest(
        folder, EngineLayout.of(engine), config=toy_config(**changes), identities=identities or IDENTITIES
    )
