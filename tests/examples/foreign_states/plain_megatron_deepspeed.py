"""A program without amfm: GPT of Megatron-DeepSpeed's names under DeepSpeed takes a universal checkpoint, and saves its own.

Arguments: a folder with `job.json` (sizes, `kind`: pipeline or plain, `stage` of ZeRO, `ids`), the checkpoint's folder, and
where to save. It writes `logits.pt`, of the model as it was loaded. Modules have the names, forms and sums of
`megatron/model/` at commit 4efb479; the pipeline's numbers are given by DeepSpeed itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
# Needed before DeepSpeed, which would wait half a minute for a compiler.
import deepspeed
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

Linear = partial(nn.Linear, bias=False)


class Attention(nn.Module):
    """Rotary attention with one matrix for queries, keys and values."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.job = job
        heads = job["num_heads"] + 2 * job["num_kv_heads"]
        self.query_key_value = Linear(job["hidden_size"], heads * job["head_dim"])
        self.dense = Linear(job["num_heads"] * job["head_dim"], job["hidden_size"])

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Many heads, causal."""
        mixed, queries, groups, dim = (self.query_key_value(x_BTD), *(self.job[key] for key in SIZES))
        if queries == groups:
            parts = [part.unflatten(-1, (queries, dim)) for part in mixed.chunk(3, dim=-1)]
        else:
            each = mixed.unflatten(-1, (groups, queries // groups + 2, dim))
            parts = [each[..., :-2, :].flatten(-3, -2), each[..., -2, :], each[..., -1, :]]
        query, key, value = (part.transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(
            rotate(query, self.job["theta"]), rotate(key, self.job["theta"]), value, is_causal=True, enable_gqa=True
        )
        return self.dense(mixed.transpose(1, 2).flatten(-2))


SIZES = ("num_heads", "num_kv_heads", "head_dim")


def rotate(x_BHTD: Tensor, theta: float) -> Tensor:
    """Rotary positions whose halves are paired."""
    dim = x_BHTD.shape[-1]
    angles = torch.outer(torch.arange(x_BHTD.shape[-2]), theta ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


class FeedForward(nn.Module):
    """Gate and up in one matrix, or squared ReLU."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.is_gated = job["is_gated"]
        self.dense_h_to_4h = Linear(job["hidden_size"], job["inner_size"] * (1 + self.is_gated))
        self.dense_4h_to_h = Linear(job["inner_size"], job["hidden_size"])

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Two matrices."""
        inner = self.dense_h_to_4h(x_BTD)
        if not self.is_gated:
            return self.dense_4h_to_h(functional.relu(inner).square())
        gate, up = inner.chunk(2, dim=-1)
        return self.dense_4h_to_h(functional.silu(gate) * up)


class Layer(nn.Module):
    """Attention and a feed-forward, each after a norm."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(job["hidden_size"], eps=job["epsilon"])
        self.self_attention = Attention(job)
        self.post_attention_layernorm = nn.RMSNorm(job["hidden_size"], eps=job["epsilon"])
        self.mlp = FeedForward(job)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add both."""
        x_BTD = x_BTD + self.self_attention(self.input_layernorm(x_BTD))
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Words(nn.Module):
    """The embedding, or a head under another name."""

    def __init__(self, job: dict[str, Any], name: str = "word_embeddings") -> None:
        super().__init__()
        sizes = job["padded_vocab_size"], job["hidden_size"]
        self.add_module(name, nn.Embedding(*sizes) if name == "word_embeddings" else Linear(*reversed(sizes)))

    def forward(self, x: Tensor) -> Tensor:
        """Look up, or multiply."""
        return next(self.children())(x)


class Gpt(nn.Module):
    """The model of --no-pipeline-parallel."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.embedding = Words(job)
        self.language_model.encoder = nn.Module()
        self.language_model.encoder.layers = nn.ModuleList(Layer(job) for _ in range(job["num_layers"]))
        self.language_model.encoder.final_layernorm = nn.RMSNorm(job["hidden_size"], eps=job["epsilon"])
        if not job["is_tied"]:
            self.language_model.output_layer = Linear(job["hidden_size"], job["padded_vocab_size"])

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits."""
        own = self.language_model
        x_BTD = own.embedding(ids_BT)
        for layer in own.encoder.layers:
            x_BTD = layer(x_BTD)
        words = getattr(own, "output_layer", own.embedding.word_embeddings)
        return functional.linear(own.encoder.final_layernorm(x_BTD), words.weight)


def pipeline(job: dict[str, Any]) -> PipelineModule:
    """The model of pipeline stages, here one: a cast, the embedding, layers, a norm, the head, a cast."""
    norm = LayerSpec(nn.RMSNorm, job["hidden_size"], eps=job["epsilon"])
    first, last = LayerSpec(Words, job), LayerSpec(Words, job, "lm_head")
    if job["is_tied"]:
        first = TiedLayerSpec("embed", Words, job)
        last = TiedLayerSpec(
            "embed", Words, job, forward_fn=lambda words, x: functional.linear(x, words.word_embeddings.weight)
        )
    layers = [LayerSpec(Layer, job) for _ in range(job["num_layers"])]
    specs = [lambda x: x, first, *layers, norm, last, lambda x: x]
    return PipelineModule(specs, num_stages=1, loss_fn=lambda logits, _: logits.sum())


def checkpoint_info(job: dict[str, Any]) -> dict[str, Any]:
    """What its converter needs to know of names: vocabularies, whose padding it takes off, and gated matrices."""
    if job["kind"] == "plain":
        words = ["language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"]
        layer = r"language_model.encoder.layers.\d+"
    else:
        words = [r"tied_modules.embed.word_embeddings.weight"] if job["is_tied"] else [r"\d+.word_embeddings.weight"]
        words, layer = [*words, r"\d+.lm_head.weight"], r"\d+"
    return {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": job["vocab_size"],
        "vocabulary_parameter_patterns": words[: 1 if job["is_tied"] else 2],
        "parameter_with_2_sub_params_cat_dim_0": [rf"{layer}.mlp.dense_h_to_4h.weight"] if job["is_gated"] else [],
    }


def main(job_folder: str, folder: str, out: str) -> None:
    """Load, compute, and save."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed("gloo")  # a PipelineModule asks for it before `initialize` would
    job = json.loads(Path(job_folder, "job.json").read_text())
    model = Gpt(job) if job["kind"] == "plain" else pipeline(job)
    groups = [
        {"params": [weight for weight in model.parameters() if (weight.dim() > 1) == is_matrix], "wd_mult": decay}
        for is_matrix, decay in ((True, 1.0), (False, 0.0))
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": job["stage"]},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": True},
    }
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.0), config=settings)[0]
    _, client = engine.load_checkpoint(folder)
    assert client["iteration"] == engine.global_steps == 2
    assert client["args"].num_layers == job["num_layers"] and client["args"].num_key_value_heads == job["num_kv_heads"]
    with torch.no_grad():
        torch.save(engine.module(torch.tensor(job["ids"])), Path(job_folder, "logits.pt"))
    newer = {} if job["num_kv_heads"] != job["num_heads"] else {"ds_sequence_parallel_fpdt": False}
    arguments = argparse.Namespace(tensor_model_parallel_size=1, params_dtype=torch.float32, **newer)
    state = {"args": arguments, "iteration": 2, "universal_checkpoint_info": checkpoint_info(job)}
    engine.save_checkpoint(out, client_state=state)
    assert not any(name.partition(".")[0] == "amfm" for name in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
