"""Two-batch overlap, halves of a micro-batch that alternate: the numbers of two micro-batches, and rows that are sent in parallel with the
other half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.model.config.schema import ModelConfig, MtpConfig
from amfm.model.hybrid import HybridModel, ModelOutput
from amfm.model.mtp import Ahead
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.model.moe.test_dispatch import BASE
from tests.model.small_models import loss_of, packed_batch, small_config

DOCUMENTS = ((7, 1, 12, 4), (24,), (3, 21), (1, 1, 22))


def config_of(pattern: str = "ME*E", **changes: object) -> ModelConfig:
    return small_config(pattern, moe=BASE.model_copy(update=changes))


CASES: dict[str, tuple[ParallelConfig, ModelConfig]] = {
    "counted": (ParallelConfig(expert=2), config_of()),
    "slots, recycled": (ParallelConfig(expert=2), config_of("ME", capacity_factor=1.0, overflow="recycle")),
    "a depth ahead": (
        ParallelConfig(expert=2),
        config_of("E/*E").model_copy(update={"mtp": MtpConfig(loss_weight=0.3)}),
    ),
    "context ranks": (ParallelConfig(expert=2, context=2), config_of("ME", latent_size=6)),
}


@dataclass
class Outcome:
    """Loss, auxiliary losses and counts, and gradients by name, added up over micro-batches."""

    loss: torch.Tensor
    auxiliary: dict[str, torch.Tensor]
    counts: dict[int, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def run_rows(config: ModelConfig, groups: ProcessGroupCollection, seed: int, *, in_turns: bool) -> Outcome:
    """Forward and backward of four rows: in one micro-batch whose halves take turns, or as two micro-batches, averaged.

    In turns blocks make their norms again, as those with `low_precision.activation_storage: fp8` do.
    """
    model = HybridModel(config, groups, seed=3).double()
    for block in model.blocks:
        block.keeps_norm = not in_turns
    tokens_BT, labels_BT, ids_BT = packed_batch(DOCUMENTS, seed=seed)
    outcome = Outcome(torch.zeros((), dtype=torch.float64), {}, {}, {})
    for rows in (slice(None),) if in_turns else (slice(2), slice(2, None)):
        own = tokens_BT[rows], labels_BT[rows], ids_BT[rows]
        meta = PackMeta.from_document_ids(own[2]).cut(groups.cp.rank(), groups.cp.size())
        take = (lambda rows_BT: rows_BT) if meta.segments is None else meta.segments.take
        ahead = [Ahead.of_rows(*own, 1).map_tensors(take)] if config.num_depths else []
        output: ModelOutput = model(take(own[0]), meta.with_halves() if in_turns else meta, take(own[1]), ahead=ahead)
        # A sum over tokens, and auxiliary losses that are means of their micro-batch.
        share = 1 if in_turns else 2
        losses = [output.loss.total, *(each.total for each in output.mtp)]
        total = sum(losses) / 10 + sum(output.auxiliary.values()) / share
        total.backward()
        outcome.loss += total.detach()
        for name, value in output.auxiliary.items():
            outcome.auxiliary[name] = outcome.auxiliary.get(name, 0) + value.detach() / share
        for block, counts_E in output.expert_counts.items():
            outcome.counts[block] = outcome.counts.get(block, 0) + counts_E
    outcome.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return outcome


def compare_turns() -> dict[str, tuple[Outcome, Outcome]]:
    found = {}
    for name, (section, config) in CASES.items():
        parallel = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
        seed = parallel.groups.dp.rank()
        found[name] = tuple(run_rows(config, parallel.groups, seed, in_turns=each) for each in (True, False))
    return found


def test_halves_in_turns_are_two_micro_batches() -> None:
    for ranks in run_ranks(compare_turns, num_ranks=4):
        assert ranks.keys() == CASES.keys()
        for name, (own, expected) in ranks.items():
            # float64: only the order in which gradients of a weight are added differs.
            torch.testing.assert_close(own.loss, expected.loss, rtol=1e-12, atol=0, msg=name)
            torch.testing.assert_close(own.auxiliary, expected.auxiliary, rtol=1e-12, atol=0)
            torch.testing.assert_close(own.counts, expected.counts, rtol=0, atol=0)
            for key, gradient in expected.gradients.items():
                torch.testing.assert_close(own.gradients[key], gradient, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")


class Events(TorchDispatchMode):
    """What starts, in order: `rows` an all-to-all of rows, `experts` and `mixer` what computes in either kind of block."""

    KINDS: ClassVar = {"alltoall_base_": "rows", "expert_feed_forward": "experts", "causal_conv1d": "mixer"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for name, kind in self.KINDS.items():
            if func._opname.startswith(name) and (kind != "rows" or args[1].shape[1:] == (12,)):
                self.found.append(kind)
        return func(*args, **(kwargs or {}))


def order_of_events() -> list[str]:
    """Forward and backward of two blocks of each kind, without balance losses, whose gradients come at other times."""
    parallel = initialize_parallel(ParallelConfig(expert=2), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    model = HybridModel(config_of("MEME", auxiliary_loss_weight=0.0, sequence_loss_weight=0.0), parallel.groups, seed=3)
    tokens_BT, labels_BT, ids_BT = packed_batch(DOCUMENTS, seed=parallel.rank)
    with Events() as events:
        loss_of(model(tokens_BT, PackMeta.from_document_ids(ids_BT).with_halves(), labels_BT)).backward()
    return events.found


def test_rows_of_a_half_travel_beside_the_other_half_in_both_directions() -> None:
    for found in run_ranks(order_of_events, num_ranks=2):
        out, home = ["mixer", "rows"], ["experts", "rows"]
        forward = 2 * [*out, *out, *home, *home]
        # The same turns backwards: a half's gradients set out before the other half's experts or mixers are differentiated.
        turn, between = ["experts", "rows"], ["mixer", "rows"]
        backward = ["rows", "rows", *turn, *turn, *between, *between, *turn, *turn, "mixer", "mixer"]
        assert found == forward + backward, found
