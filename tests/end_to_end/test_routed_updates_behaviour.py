"""Updates that were trained apart, one for each kind of text, frozen and given a router, vs. one update of equal size.

LoRA-Mixer's claim (arXiv 2507.00029) is that they are better than one. Here they are not: what is asserted is what was seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.schema import LoraMixerConfig, ModelConfig, Projection
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.convert import ConvertConfig, RoutingConfig, TuneConfig
from amfm.pretrain.startup.conversion import UPDATE_ENDS, prepare_stage
from tests.helpers.text.plays import as_it_is, held_out_loss, loss_with_auxiliary, train

Change = Callable[[Tensor], Tensor]
# The base knows plays in two alphabets. A kind changes the text of one of them, so that every byte tells the kind.
KNOWN: tuple[Change, ...] = (as_it_is, lambda rows: rows ^ 128)
KINDS: dict[str, Change] = {"backwards": lambda rows: rows.flip(1), "ciphered": lambda rows: rows ^ 129}
TARGETS: tuple[Projection, ...] = ("q", "k", "v", "o", "in", "out")
RANK, ROUTED_RANK = 8, 4  # one update, or two
BASE, APART, ROUTER = 200, 80, 40  # steps
ROUTING = {"num_experts": 2, "top_k": 1, "specialization_weight": 0.01}


def build(seed: int, routing: dict[str, Any] | None = None) -> HybridModel:
    """Mamba2 and attention, each before a feed-forward."""
    routed = None
    if routing is not None:
        routed = LoraMixerConfig(rank=ROUTED_RANK, alpha=2.0 * ROUTED_RANK, targets=TARGETS, **routing)
    config = ModelConfig(
        pattern="M-*-",
        vocab_size=256,
        hidden_size=64,
        mamba=Mamba2Config(num_heads=4, head_dim=32, state_size=16, num_groups=1),
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=32, positions="rope"),
        feed_forward=FeedForwardConfig(hidden_size=256),
        lora_mixer=routed,
    )
    return HybridModel(config, single_rank_groups(), seed=seed)


def prepared(base: dict[str, Tensor], seed: int, rank: int, routing: dict[str, Any] | None = None) -> HybridModel:
    """The base, frozen, with the updates that a conversion's control trains."""
    model = build(seed, routing)
    model.load_state_dict(base, strict=False)
    routed = None if routing is None else RoutingConfig(**routing)
    tune = TuneConfig(steps=1, rank=rank, alpha=2.0 * rank, targets=TARGETS, routing=routed)
    prepare_stage(model, ConvertConfig(teacher="plays", blocks=(2,), tune=tune, stage="tune-teacher"))
    return model


def tune(model: HybridModel, plays: Path, kinds: tuple[Change, ...], steps: int, seed: int) -> HybridModel:
    """Train what asks for gradients on rows of all kinds in equal parts."""

    def change(rows: Tensor) -> Tensor:
        return torch.cat([kind(rows[number :: len(kinds)]) for number, kind in enumerate(kinds)])

    train(model, plays, steps, peak=5e-3, seed=seed, weight_decay=0.0, loss=loss_with_auxiliary, change=change)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_updates_with_a_router_learn_two_kinds_of_text_and_stay_behind_one_of_equal_size(
    plays: Path, seed: int
) -> None:
    both, steps = tuple(KINDS.values()), 2 * APART + ROUTER
    teacher = tune(build(seed), plays, KNOWN, BASE, seed)
    base = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    apart = {kind: tune(prepared(base, seed, ROUTED_RANK), plays, (KINDS[kind],), APART, seed + 20) for kind in KINDS}
    frozen, states = prepared(base, seed, ROUTED_RANK, ROUTING), [model.state_dict() for model in apart.values()]
    with torch.no_grad():
        for name, parameter in frozen.named_parameters():
            if name.endswith(UPDATE_ENDS):  # as convert.tune.routing.updates puts them
                parameter.copy_(torch.cat([state[name] for state in states], 1 if name.endswith(".up") else 0))
                parameter.requires_grad_(False)
    one = tune(prepared(base, seed, RANK), plays, both, steps, seed + 10)
    together = tune(prepared(base, seed, ROUTED_RANK, ROUTING), plays, both, steps, seed + 10)
    models = {
        "none": dict.fromkeys(KINDS, teacher),
        "one": dict.fromkeys(KINDS, one),
        "together": dict.fromkeys(KINDS, together),
        "frozen": dict.fromkeys(KINDS, tune(frozen, plays, both, ROUTER, seed + 30)),
        "own": apart,  # each kind with its own update, as a router that is never wrong and always sure
    }
    losses = {
        name: [held_out_loss(model, plays, change=KINDS[kind]) for kind, model in by_kind.items()]
        for name, by_kind in models.items()
    }
    means = {name: sum(by_kind) / 2 for name, by_kind in losses.items()}
    shown = (f"{name} {means[name]:.3f} ({a:.3f}, {b:.3f})" for name, (a, b) in losses.items())
    print(f"\nseed {seed}: " + "; ".join(shown))
    # Three seeds: frozen is 1.87 to 1.98 below none and 0.25 to 0.37 above own, together 0.050 to 0.054 above one.
    assert means["frozen"] <= means["none"] - 1.5
    assert means["frozen"] >= means["own"] + 0.1
    assert means["one"] < means["together"] <= means["one"] + 0.1
