"""What the soak trains: made-up text, a store of it, one small hybrid model, and the layouts that take turns."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.plan import Unit
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.unit import UnitFailure, UnitReport, run_unit
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from tests.soak.faults import LOCAL_KINDS, RAY_KINDS, Kind

STEPS = 60
HEARTBEAT_SECONDS = 45.0  # a machine that does other work too must not look hung


@dataclass(frozen=True)
class Layout:
    """Ranks and how they share the model; `on_ray`: started by `amfm launch --on ray`, not by `amfm train --nproc`."""

    name: str
    num_ranks: int
    parallel: dict[str, int]
    on_ray: bool = False

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Faults that can strike it."""
        return RAY_KINDS if self.on_ray else LOCAL_KINDS


LAYOUTS = (
    Layout("2 ranks, ZeRO 2", 2, {"zero_stage": 2}),
    Layout("4 ranks, tensor 2, ZeRO 1", 4, {"zero_stage": 1, "tensor": 2}),
    Layout("3 ranks, ZeRO 0", 3, {"zero_stage": 0}),
    Layout("4 ranks, expert 2, pipeline 2", 4, {"zero_stage": 1, "expert": 2, "pipeline": 2}),
    Layout("2 ranks on Ray, ZeRO 3", 2, {"zero_stage": 3}, on_ray=True),
)
MODEL: dict[str, Any] = {
    "pattern": "M*-" * 2,
    "vocab_size": 320,
    "hidden_size": 32,
    "mamba": {"num_heads": 4, "head_dim": 16, "state_size": 16, "num_groups": 2, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "feed_forward": {"hidden_size": 48},
}
EXPERTS: dict[str, Any] = {
    "pattern": "ME*-",
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_hidden_size": 24,
        "expert_bias": True,
        "auxiliary_loss_weight": 0.01,
    },
}


def make_store(folder: Path) -> DataConfig:
    """Write made-up text and prepare a store of it, in this process."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=2 + number % 7)) for number in range(200)]
    lines = [json.dumps({"text": " ".join(source.choices(words, k=source.randint(2, 40)))}) for _ in range(600)]
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.jsonl"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = DataConfig(
        store=str(folder / "store"),
        sources=(SourceConfig(name="words", paths=(str(text),)),),
        tokenizer=TokenizerConfig(vocab_size=300, algorithm="bpe"),
        prepare=PrepareConfig(part_bytes=20_000),
        validation_fraction=0.0,
        num_workers=0,
    )
    prepare(config, runner=run_here)
    return config


def run_here(
    units: Sequence[Unit], store: Path, tokenizer: Tokenizer, config: DataConfig
) -> Iterator[tuple[Unit, UnitReport | UnitFailure]]:
    """Write the parts in this process: the text is too small for Ray."""
    for unit in units:
        yield unit, run_unit(unit, store, tokenizer)


def write_config(data: DataConfig, layout: Layout, run_dir: Path) -> Path:
    """Write the configuration of a run of a layout next to its directory, and return the file."""
    config = RunConfig.model_validate(
        {
            "run": {"dir": str(run_dir), "tensorboard": False},
            "model": MODEL | (EXPERTS if layout.parallel.get("expert", 1) > 1 else {}),
            "data": data.model_dump(mode="json"),
            "train": {
                "steps": STEPS,
                "sequence_length": 48,
                "micro_batch_size": 2,
                "global_batch_size": 12,
                "precision": "bf16" if layout.on_ray else "float32",
                "checkpoint_every_steps": 6,
                "num_threads": 1,
                "timeout_seconds": 120,  # short: a rank that is stopped is given up within a round
            },
            "optimizer": {"learning_rate": 3e-3},
            "parallel": layout.parallel,
            # A NaN that a restart does not meet again must leave no trace, so the step must not count as skipped.
            "health": {"on_nonfinite": "stop", "straggler_percent": None, "check_state_every_steps": 1},
            "launch": {"heartbeat_seconds": HEARTBEAT_SECONDS, "max_restarts": 1000, "node_wait_seconds": 10},
            "kernels": {"backend": "torch"},
        }
    )
    path = run_dir.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(resolved_yaml(config), encoding="utf-8")
    return path
