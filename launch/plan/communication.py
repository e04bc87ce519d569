"""Seconds of collectives on the declared links: rings for gathers and reductions, all ranks at once for all-to-all."""

from __future__ import annotations

import torch

from launch.plan.activations import FLOAT32_BYTES, Storage
from launch.plan.context_traffic import handed_states
from launch.plan.hardware import Hardware
from launch.plan.layout import Layout, StageShare
from launch.plan.registered import is_registered, registered_block
from pretrain.config.schema import RunConfig


def ring_seconds(moved: float, ranks: int, hardware: Hardware, *, calls: float, stride: int = 1) -> float:
    """A gather or scatter of `moved` bytes in all, in `calls` collectives; `stride`: from one rank of the ring to the next."""
    if ranks == 1 or calls == 0:
        return 0.0
    speed = hardware.ring_bytes_per_second(ranks, stride)
    return moved * (ranks - 1) / ranks / speed + calls * (ranks - 1) * hardware.hop_seconds


def all_to_all_seconds(sent: float, ranks: int, hardware: Hardware, *, stride: int = 1) -> float:
    """Every rank sends `sent` bytes, evenly over all: those that leave the node share its network, the rest its links."""
    if ranks == 1:
        return 0.0
    together = min(ranks, max(1, hardware.gpus_per_node // stride))
    inside = sent * (together - 1) / ranks / hardware.node_link_bytes_per_second
    across = sent * (ranks - together) / ranks / hardware.network_bytes_per_second
    return max(inside, across) / hardware.link_efficiency + hardware.hop_seconds


def pass_seconds(
    config: RunConfig, layout: Layout, hardware: Hardware, storage: Storage, held: StageShare, *, overlap: float
) -> dict[str, float]:
    """Communication inside one micro-batch's forward and backward pass on one rank, by axis."""
    model, e, tokens = config.model, storage.element_bytes, layout.tokens(config)
    stream = tokens * model.hidden_size * e
    seconds = dict.fromkeys(("tensor", "expert", "context", "pipeline"), 0.0)
    # A gather and a scatter each way, or two all-reduces: the same bytes. The head and the embedding do it too.
    crossings = 4 * (len(held.letters) + held.has_embedding + held.has_head)
    seconds["tensor"] = crossings * ring_seconds(stream, layout.tensor, hardware, calls=1)
    experts = held.letters.count("E")
    if layout.expert > 1 and model.moe is not None:
        width = model.moe.latent_size or model.hidden_size
        rows = tokens / layout.tensor * model.moe.top_k * width * e
        one_way = all_to_all_seconds(rows, layout.expert, hardware, stride=layout.expert_tensor)
        beside = ring_seconds(rows * layout.expert_tensor, layout.expert_tensor, hardware, calls=1)
        seconds["expert"] = 4 * experts * (one_way + beside)
    if layout.context > 1:
        if model.attention is not None:
            heads = max(1, model.attention.num_kv_heads / layout.tensor)
            keys = 2 * tokens * layout.context * heads * model.attention.head_dim * e
            ring = ring_seconds(keys, layout.context, hardware, calls=1, stride=layout.tensor)
            seconds["context"] += 2 * held.letters.count("*") * ring
        if model.mamba is not None:
            moved = handed_states(model.mamba, layout.micro_batch_size, layout.tensor) * layout.context
            ring = ring_seconds(moved, layout.context, hardware, calls=2, stride=layout.tensor)
            seconds["context"] += held.letters.count("M") * ring
        for letter in filter(is_registered, held.letters):
            numbers = registered_block(model, letter, torch.bfloat16, config.train.sequence_length).state_numbers
            sent = 2 * FLOAT32_BYTES * layout.micro_batch_size * numbers / layout.tensor * layout.context
            seconds["context"] += ring_seconds(sent, layout.context, hardware, calls=2, stride=layout.tensor)
    if layout.pipeline > 1:
        sent = 2 * layout.virtual_stages * stream / layout.stream_ranks
        seconds["pipeline"] = (1 - overlap) * sent / (hardware.network_bytes_per_second * hardware.link_efficiency)
    return seconds
