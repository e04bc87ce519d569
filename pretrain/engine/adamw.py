"""AdamW in bf16, and as runs that compile nothing have it; what an optimizer keeps next to the weights.

AdamW whose master weights and moments are bf16: 6 bytes per parameter instead of 12, rounded so that small steps are not
lost. bf16 keeps 8 bits of a number. A step smaller than a 256th of a weight would vanish in rounding to the nearest, every time,
and a second moment that decays by a thousandth would never fall. So a chunk of a flat master at a time is widened to
float32, stepped there as torch's AdamW does, and what comes out is rounded up or down by chance, in proportion to how near
it is: on average nothing is lost (stochastic rounding, Gupta et al. 2015, arXiv 1502.02551, section 3).

The chance is not a generator but a hash of the parameter's name, the place in this rank's shard, and the step. So
nothing has to be saved for a run to continue with bitwise identical results, ranks that hold copies round alike, and ZeRO may cut the
master weights anywhere.

What is kept is named by the label of the parameter group: what checkpoints hold and plans count.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from amfm.pretrain.engine.parts import Part


CHUNK_ELEMENTS = 1 << 20  # stepped in float32 at a time
CHUNK_BYTES = 64  # that a number takes meanwhile: five float32, four int64 or their halves
STEP_BYTES = 350  # that a number's step reads and writes: sums over unfused operations, half of them the hash
# Multipliers of a 64-bit mixer (Steele et al. 2014, Fast splittable pseudorandom number generators, OOPSLA, section 3).
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Bf16AdamW(torch.optim.AdamW):
    """Steps bf16 master weights with bf16 moments; `attach` tells it what its flat master weights hold, and a step before does nothing."""

    def __init__(self, groups: list[dict[str, Any]], **adamw: Any) -> None:
        super().__init__(groups, **adamw | {"fused": False})
        self.salts: dict[int, list[tuple[int, int, int | Tensor]]] = {}

    def attach(self, parts: Sequence[Part]) -> None:
        """Learn which ranges of which parameters are in the master weights. No communication."""
        self.salts = {id(part.master): list(_list_salts(part)) for part in parts}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the groups of this call, which DeepSpeed may narrow to one."""
        assert closure is None, "gradients come from the engine"
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None and id(master) in self.salts:
                    self._step(master, master.grad, group)

    def _step(self, master: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One master, a chunk at a time."""
        state = self.state[master]
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        number = state["step"] = int(state["step"]) + 1
        beta1, beta2 = group["betas"]
        rate = group["lr"] / (1 - beta1**number)
        for low, high, salt in self.salts[id(master)]:
            weight, first, second = (flat[low:high] for flat in (master, state["exp_avg"], state["exp_avg_sq"]))
            g = gradient[low:high].float()
            m = first.float().lerp_(g, 1 - beta1)
            v = second.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
            w.addcdiv_(m, (v.sqrt() / math.sqrt(1 - beta2**number)).add_(group["eps"]), value=-rate)
            chance_N4 = draw(low, high, salt, number, master.device)
            for place, (target, value) in enumerate(((weight, w), (first, m), (second, v)), start=1):
                round_by_chance(target, value, chance_N4[:, place])


def draw(low: int, high: int, salt: int | Tensor, step: int, device: torch.device) -> Tensor:
    """Draw four int16 for each number of a range, [N, 4]; the first has the weakest bits."""
    x_N = torch.arange(low, high, device=device).mul_(_signed(GOLDEN)).add_(salt)
    x_N.add_(_signed(step * SECOND))
    x_N.bitwise_xor_(x_N >> 32).mul_(_signed(FIRST))
    x_N.bitwise_xor_(x_N >> 29).mul_(_signed(SECOND))
    return x_N.view(torch.int16).view(-1, 4)


def round_by_chance(target: Tensor, values: Tensor, chance: Tensor) -> None:
    """Round float32 values into a bf16 tensor, up where the 16 bits of chance (int16) carry; overwrites the values.

    What bf16 holds exactly stays as it is. All flat, and the target dense.
    """
    bits = values.view(torch.int32).add_(chance.int().bitwise_and_(0xFFFF))
    # The upper half of a float32 is the bf16 below it: little-endian, the second of its two halves.
    target.view(torch.int16).copy_(bits.view(torch.int16)[1::2])


def _list_salts(part: Part) -> Iterator[tuple[int, int, int | Tensor]]:
    """Cut a flat master into chunks: where each begins and ends, and what makes its numbers' hashes those of their places."""
    salts: list[tuple[int, int, int]] = []  # begin and end in the master, salt
    end = 0
    for span in sorted(part.spans, key=lambda span: span.flat_start):
        salts.append((end, span.flat_start, 0))  # padding, which stays zero
        end = span.flat_start + span.numel
        name = int.from_bytes(hashlib.blake2b(span.name.encode(), digest_size=8).digest(), "little")
        salts.append((span.flat_start, end, _signed(name + (span.start - span.flat_start) * GOLDEN)))
    salts.append((end, part.master.numel(), 0))
    for low in range(0, part.master.numel(), CHUNK_ELEMENTS):
        high = min(low + CHUNK_ELEMENTS, part.master.numel())
        inside = [(min(high, to) - max(low, begin), salt) for begin, to, salt in salts if begin < high and to > low]
        inside = [(numel, salt) for numel, salt in inside if numel > 0]
        if len(inside) == 1:
            yield low, high, inside[0][1]
        else:
            lengths, values = (torch.tensor(column, device=part.master.device) for column in zip(*inside))
            yield low, high, values.repeat_interleave(lengths, output_size=high - low)


def _signed(number: int) -> int:
    """A number modulo 2^64 as int64 holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


class AdamW(torch.optim.AdamW):
    """Without the graph breaks around each step, for which the first one would import torch.compile; the same numbers."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def owned_states(self) -> dict[str, Tensor]:
        """States of whole matrices that this rank owns, by their names in checkpoints: none, unless a rule keeps some."""
        return {}


MUON = "muon"  # label of the groups whose matrices Muon steps
ONE = "one_"  # begins the labels of groups that a package's optimizer steps with one moment
MATRICES = (
    "matrices"  # of groups whose matrices a rule steps that keeps its state at their owners (engine/muon/whole.py)
)
OWNED = "optimizer/"  # begins the names of such states among a checkpoint's buffers
AVERAGE = "ema"  # kind of the moving average of master weights, which no optimizer reads (hooks/weight_averages.py)
FROZEN = "frozen"  # of parameters that no optimizer steps: their weights are saved, without moments


def moments_of(label: str) -> tuple[str, ...]:
    """Name the moments of the parameters in groups with this label: AdamW's two, in torch's words, or one momentum."""
    if label in (FROZEN, MATRICES):
        return ()
    return ("momentum",) if label == MUON or label.startswith(ONE) else ("exp_avg", "exp_avg_sq")
