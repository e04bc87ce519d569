"""Trains a GPTModel of megatron-core on a CPU with its own dataset, optimizer, clipping and schedule.

`mamba_ssm` and Transformer Engine have no CPU, so layers are attention with a feed-forward and attention with experts.
What megatron-core puts on `cuda` by name (scales, norms of gradients) goes to the CPU; no number depends on it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.overrides import TorchFunctionMode

from tests.examples.foreign_states import megatron_models as models

# One process: rows of a micro-batch are those of the global batch.
BATCH, PEAK, LOWEST, WARMUP, DECAY = 2, 3e-3, 3e-4, 4, 40


class WithoutGpu(TorchFunctionMode):
    """Makes on the CPU what is asked for on a GPU by name, and gives types the names that clipping asks for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call with another device."""
        if func is torch.Tensor.cuda:
            return args[0]
        given = dict(kwargs or {})
        if given.get("device") == "cuda":
            given["device"] = "cpu"
        found = func(*args, **given)
        return found.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and isinstance(found, str) else found


class Training:
    """A model with megatron-core's optimizer (FP32Optimizer around AdamW), schedule and rows of its GPTDataset."""

    def __init__(self, config: dict[str, Any], prefix: str) -> None:
        self.config = models.transformer_config(**config)
        self.model = models.gpt(self.config, num_experts=self.config.num_moe_experts).train()
        for weight in self.model.parameters():
            if weight.dim() > 1:
                weight.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(weight.numel()))
        matrices = [weight for weight in self.model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in self.model.parameters() if weight.dim() <= 1]
        shared = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
        groups = [{"params": matrices, "wd_mult": 1.0, **shared}, {"params": vectors, "wd_mult": 0.0, **shared}]
        self.adamw = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)
        settings = OptimizerConfig(optimizer="adam", lr=PEAK, min_lr=LOWEST, clip_grad=1.0, weight_decay=0.1)
        self.optimizer = FP32Optimizer(self.adamw, settings, lambda *_: None)
        self.optimizer.grad_stats_parallel_group = torch.distributed.group.WORLD
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=PEAK,
            min_lr=LOWEST,
            lr_warmup_steps=WARMUP * BATCH,
            lr_decay_steps=DECAY * BATCH,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=DECAY * BATCH,
            wd_incr_style="constant",
            override_opt_param_scheduler=True,
            use_checkpoint_opt_param_scheduler=False,
        )
        self.rows = read_rows(prefix)
        self.done = 0

    def step(self) -> float:
        """One iteration; returns the loss before it."""
        rows = [self.rows[(self.done * BATCH + each) % len(self.rows)] for each in range(BATCH)]
        tokens_BT, labels_BT = (torch.stack([row[name] for row in rows]) for name in ("tokens", "labels"))
        length = tokens_BT.shape[1]
        mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
        self.optimizer.zero_grad()
        loss = self.model(tokens_BT, torch.arange(length).expand(BATCH, -1), mask, labels=labels_BT).mean()
        loss.backward()
        with torch.no_grad():
            _update_router_expert_bias([self.model], self.config)
        for module in self.model.modules():
            if hasattr(module, "local_tokens_per_expert"):
                module.local_tokens_per_expert.zero_()
        assert self.optimizer.step()[0]
        self.schedule.step(increment=BATCH)
        self.done += 1
        return float(loss)

    def save(self, folder: Path) -> None:
        """Write weights, moments and counters as megatron-core saves them."""
        folder.mkdir(parents=True)
        whole = self.sharded(metadata={})
        dist_checkpointing.save(whole, str(folder))

    def load(self, folder: Path) -> None:
        """Continue from a folder: weights, moments, iteration and place in the schedule."""
        for weight in self.model.parameters():
            self.adamw.state[weight] = {"step": torch.tensor(0.0)} | {
                kind: torch.zeros_like(weight) for kind in models.MOMENTS
            }
        whole = self.sharded(metadata=dist_checkpointing.load_content_metadata(str(folder)))
        del whole["opt_param_scheduler"], whole["iteration"]
        # What layers keep for other precisions is not exported: `--dist-ckpt-strictness log_unexpected` leaves it out.
        extra = {name: None for name in whole["model"] if name.endswith("_extra_state")}
        whole["model"] = {name: value for name, value in whole["model"].items() if name not in extra}
        loaded = dist_checkpointing.load(whole, str(folder))
        self.model.load_state_dict(loaded["model"] | extra)
        (step,) = {group["step"] for group in loaded["optimizer"]["optimizer"]["param_groups"]}
        weights = [weight for group in self.adamw.param_groups for weight in group["params"]]
        for index, weight in enumerate(weights):
            moments = {kind: loaded["optimizer"]["state"][index][kind] for kind in models.MOMENTS}
            self.adamw.state[weight] = {"step": torch.tensor(float(step)), **moments}
        self.schedule.load_state_dict(loaded["opt_param_scheduler"])
        self.done = step

    def sharded(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """What is saved and loaded."""
        of_model = models.sharded(self.model, None, **metadata)["model"]
        optimizer = self.optimizer.sharded_state_dict(of_model)
        return {
            "model": of_model,
            "optimizer": optimizer,
            "opt_param_scheduler": self.schedule.state_dict(),
            "iteration": self.done,
        }


def read_rows(prefix: str) -> GPTDataset:
    """The rows of megatron-core's GPTDataset over one dataset, of which all trains."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=models.LENGTH,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=f"{prefix}-cache",
        tokenizer=SimpleNamespace(eod=2, vocab_size=models.VOCAB, unique_identifiers={"identity": "plain"}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(prefix, mmap=True)
    documents = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    return GPTDataset(indexed, prefix, documents, len(documents) - 1, Split.train, config)
