"""Small models on the bytes of Shakespeare's plays, of which two are held out: steps, and the loss on those."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from amfm.data_pipeline.prepare.sample_text import fetch_corpus
from amfm.model.hybrid import HybridModel, ModelOutput
from amfm.model.packing import PackMeta
from amfm.pretrain.step import set_step

ROWS, TOKENS, WARMUP = 16, 64, 20


@functools.cache
def play_bytes(folder: Path) -> tuple[Tensor, Tensor]:
    """Training bytes, and those of the last two plays."""
    texts = [path.read_bytes() for path in fetch_corpus("shakespeare", folder)]
    parts = b"".join(texts[:-2]), b"".join(texts[-2:])
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)


def mean_loss(output: ModelOutput) -> Tensor:
    """The language model's loss per byte."""
    return output.loss.total / (ROWS * TOKENS)


def loss_with_auxiliary(output: ModelOutput) -> Tensor:
    """That, and what blocks add to it, such as losses of balance."""
    return mean_loss(output) + sum(output.auxiliary.values())


def as_it_is(rows: Tensor) -> Tensor:
    """Rows of bytes [rows, tokens], unchanged."""
    return rows


def train(
    model: HybridModel,
    folder: Path,
    steps: int,
    *,
    peak: float,
    seed: int,
    weight_decay: float = 0.1,
    loss: Callable[[ModelOutput], Tensor] = mean_loss,
    change: Callable[[Tensor], Tensor] = as_it_is,
) -> None:
    """AdamW on what asks for gradients, with warm-up and a cosine to a tenth of the peak; `change` makes other text of rows."""
    training, _ = play_bytes(folder)
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95))
    meta = PackMeta.one_document_a_row(ROWS, TOKENS)
    model.train()
    for step in range(steps):
        set_step(model, step, steps)
        rate = peak * min((step + 1) / WARMUP, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(training) - TOKENS - 1, (ROWS,), generator=generator)
        rows = change(torch.stack([training[start : start + TOKENS + 1] for start in starts.tolist()]))
        loss(model(rows[:, :-1].contiguous(), meta, rows[:, 1:].contiguous())).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    set_step(model, steps, steps)
    model.eval()


@torch.no_grad()
def held_out_loss(
    model: HybridModel, folder: Path, count: int = 256, *, change: Callable[[Tensor], Tensor] = as_it_is
) -> float:
    """Nats per byte on this many rows of held-out plays, changed likewise."""
    _, held_out = play_bytes(folder)
    rows = change(held_out[: count * (TOKENS + 1)].view(count, TOKENS + 1))
    output = model(rows[:, :-1].contiguous(), PackMeta.one_document_a_row(count, TOKENS), rows[:, 1:].contiguous())
    return float(output.loss.nll_sum) / (count * TOKENS)
