"""A RunConfig that trains in a second: every core kind of block, packed documents, experts with a balancing bias."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.hooks.validate import Validation, Validations, validate
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.run import Run
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tiny_store import make_tiny_store

MODEL: dict[str, Any] = {
    "pattern": "ME*-",
    "vocab_size": 448,
    "hidden_size": 32,
    "mamba": {"num_heads": 4, "head_dim": 16, "state_size": 16, "num_groups": 2, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "feed_forward": {"hidden_size": 48},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_hidden_size": 24,
        "shared_expert_hidden_size": 16,
        "expert_bias": True,
        "auxiliary_loss_weight": 0.01,
        "z_loss_weight": 0.001,
    },
}


def tiny_data(folder: Path) -> DataConfig:
    """A store with documents so short that most rows hold several."""
    return make_tiny_store(folder, num_documents=200, mean_words=12)


def tiny_config(data: DataConfig, run_dir: Path, **overrides: Any) -> RunConfig:
    """A config with dotted keys set over it, written with double underscores: train__steps=3."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir), "tensorboard": False},
        "model": MODEL,
        "data": data.model_dump(mode="json"),
        "train": {
            "steps": 4,
            "sequence_length": 48,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "precision": "float32",
            "validation_batches": 1,
            "num_threads": 1,
            "timeout_seconds": PATIENCE_SECONDS,
        },
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "wsd", "warmup_steps": 2},
        "parallel": {"zero_stage": 1},
        "kernels": {"backend": "torch"},
    }
    for key, value in overrides.items():
        section, name = key.split("__")
        tree[section] = {**tree.get(section, {}), name: value}
    return RunConfig.model_validate(tree)


@dataclass(frozen=True)
class Trained:
    """What a run left: its exit code, lines of metrics.jsonl on the main rank, full float32 weights and biases by name."""

    code: int
    metrics: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]

    def series(self, key: str) -> list[float]:
        """One metric over the steps."""
        return [line[key] for line in self.metrics]


def train_and_collect(config: RunConfig) -> Trained:
    """`train`, and the model it ended with. Every rank must call this."""
    with SignalWatch() as signals:
        run = start_run(config, signals)
        code = run_steps(run)
        weights = collect_weights(run)
        close_run(run)
    return Trained(code, read_metrics(run.directory) if run.parallel.is_main else [], weights)


def assert_resumes_bitwise(data: DataConfig, folder: Path, **settings: Any) -> Trained:
    """A run that stops after two steps and is resumed has the losses and weights of one that does not, which is returned."""
    whole = train_and_collect(tiny_config(data, folder / "whole", **settings))
    train_and_collect(tiny_config(data, folder / "two", **settings, train__stop_after_steps=2))
    resumed = train_and_collect(tiny_config(data, folder / "two", **settings))
    assert resumed.series("loss") == whole.series("loss")
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    return whole


def collect_weights(run: Run) -> dict[str, torch.Tensor]:
    """Whole weights, gathered where ZeRO-3 spread them, and buffers. Every rank must call this."""
    run.engine.wait_for_weights()
    parameters = dict(run.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())) if run.engine.zero_stage == 3 else nullcontext():
        weights = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
    return weights | {name: buffer.detach().clone() for name, buffer in run.model.named_buffers()}


def validate_now(run: Run) -> Validation:
    """Validate on the run's held-out text. Every rank must call this."""
    return validate(run, held_out(run))


def held_out(run: Run) -> PretrainLoader:
    """The loader of held-out text."""
    (hook,) = [hook for hook in run.hooks if isinstance(hook, Validations)]
    assert hook.loader is not None
    return hook.loader


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def read_events(directory: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of events.jsonl, all or of one kind."""
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [line for line in events if event in (None, line["event"])]
