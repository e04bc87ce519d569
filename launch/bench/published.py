"""Published training speeds, compared with what the plan says of the same model, cards and layout.

How it works: an anchor names a preset and the layout that was published; the preset's own layout is taken back first.
Where a publication leaves the micro-batch or recomputation open, every choice is planned and shown, none picked for its
fit.

Sources: for Nemotron 3 NeMo Automodel's performance summary (H100, bf16, rows of 4,096 tokens, routing balanced by
force); for DeepSeek-V3 Megatron Bridge's (H100, bf16, dropless).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.plan.estimate import Assumptions, estimate
from launch.plan.hardware import HARDWARE
from launch.plan.layout import Layout
from model.flops import flops_per_token
from pretrain.checks.check_run import load_checked

TOKENS_A_ROW = 4096
GIGA, TERA = 1e9, 1e12
# Takes back the layout that a preset has for its own cluster.
WITHOUT_LAYOUT = (
    "parallel.tensor=1",
    "parallel.sequence_parallel=false",
    "parallel.expert=1",
    "parallel.pipeline=1",
    "train.recompute_blocks=''",
)


@dataclass(frozen=True)
class Anchor:
    """One published run: tokens and FLOPs a second and card, and what was said of its layout.

    `micro_batches`: of a data rank and step. `is_like`: the preset stands for a model that has blocks amfm has not.
    """

    name: str
    preset: str
    gpus: int
    tokens_per_second: float
    flops_per_second: float
    layout: tuple[str, ...]
    micro_batch_sizes: tuple[int, ...]
    micro_batches: int
    is_like: bool = False


ANCHORS = (
    Anchor("Nemotron 3 Nano", "nemotron3_nano_30b", 8, 16_789, 328 * TERA, ("parallel.expert=8",), (1, 4), 8),
    Anchor("Nemotron 3 Super", "nemotron3_super_120b", 64, 4_497, 334 * TERA, ("parallel.expert=64",), (1, 4), 8),
    Anchor("Nemotron 3 Ultra", "nemotron3_ultra_550b", 128, 815, 293 * TERA, ("parallel.expert=64",), (1, 4), 8),
    Anchor(
        "DeepSeek-V3",
        "anchors/deepseek_v3_like",
        1024,
        1_297,
        338 * TERA,
        ("parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.pipeline=8", "parallel.expert=64"),
        (1,),
        128,
        is_like=True,
    ),
)


def plan_anchors(presets: Path) -> list[dict[str, Any]]:
    """Planned beside published speed for each anchor, micro-batch size and recomputation.

    `presets` is the folder of the presets' files.
    """
    return [row for anchor in ANCHORS for row in _plan_anchor(anchor, presets)]


def _plan_anchor(anchor: Anchor, presets: Path) -> Iterator[dict[str, Any]]:
    """Rows of one anchor: every micro-batch size, with and without recomputation."""
    hardware = HARDWARE["h100"]
    for size in anchor.micro_batch_sizes:
        for recompute in ("none", "full"):
            overrides = [
                *WITHOUT_LAYOUT,
                *anchor.layout,
                "parallel.zero_stage=1",
                f"train.recompute={recompute}",
                f"train.sequence_length={TOKENS_A_ROW}",
                f"train.micro_batch_size={size}",
            ]
            path = presets / f"{anchor.preset}.yaml"
            # The published batch is given in micro-batches of a data rank; rows of a step follow from the number of
            # these ranks.
            data = Layout.of(load_checked(path, overrides), anchor.gpus).data
            rows = anchor.micro_batches * size * data
            config = load_checked(path, [*overrides, f"train.global_batch_size={rows}"], world_size=anchor.gpus)
            found = estimate(config, Layout.of(config, anchor.gpus), hardware, Assumptions())
            speed = found.tokens_per_second / anchor.gpus
            yield {
                "name": anchor.name,
                "is_like": anchor.is_like,
                "gpus": anchor.gpus,
                "layout": found.layout.describe(),
                "recompute": recompute,
                "published_tokens_per_second_per_gpu": anchor.tokens_per_second,
                "predicted_tokens_per_second_per_gpu": speed,
                "error": speed / anchor.tokens_per_second - 1,
                "published_flops_per_token": anchor.flops_per_second / anchor.tokens_per_second,
                "flops_per_token": sum(flops_per_token(config.model, TOKENS_A_ROW).values()),
                "exchange_share": sum(found.step.communication.values()) / found.step.total(),
                "fits": found.fits(),
            }
