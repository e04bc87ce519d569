"""QK-clip: after a step, heads of attention whose scores have grown beyond a limit get smaller queries.

Forward passes note the largest log-sum-exp of each head (kernels/attention/log_sums.py), a bound of its scores; one MAX over all
ranks makes it that of the whole step. A head that is above the limit has its scores multiplied by limit over that: exactly,
because scores are linear in the rows of weights that the mixer names. It happens to the master weights right after the
optimizer has stepped them, before ZeRO gathers model weights. So it sends nothing more, moments stay as they are, and a step
that is skipped clips nothing. Nothing is saved: what the next step clips is its own function scores.

Source: Kimi Team 2025 (arXiv 2507.20534), section 2.1, algorithm 1, by log-sum-exp in place of the largest score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from amfm.model.hybrid import HybridModel
from amfm.model.mixers.interface import SoftmaxMixer
from amfm.pretrain.checkpoint.save import ranks_of
from amfm.pretrain.config.hook_sections import QkClipConfig
from amfm.pretrain.engine.parts import list_parts, name_parameters, parameter_shape
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult


class QkClip(Hook):
    """Notes the largest log-sum-exps of a step, and scales the rows of queries, and of keys in latent attention, of high heads."""

    def __init__(self, section: QkClipConfig, run: Run) -> None:
        self.limit = section.limit
        self.heads = HeadMaxima(run.model, ranks_of(run.engine), run.parallel.device)
        self.names, self.parts = name_parameters(run.model), list_parts(run.engine.deepspeed)
        self.factors: dict[str, tuple[Tensor, int]] = {}
        self.waiting: set[int] = set()
        self.found: dict[str, Any] = {}
        self.handle = run.engine.adamw.register_step_post_hook(lambda optimizer, *_: self.scale(optimizer))

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Forget the step before; passes that are taken again start over."""
        self.heads.flat.fill_(-torch.inf)

    def before_update(self) -> None:
        """Learn the highest of all ranks, and prepare the factors of what this step is to scale."""
        highest = self.heads.of_all_ranks()
        is_high = (highest > self.limit) & highest.isfinite()  # a step with scores that are not finite is skipped
        self.found = {"max_logit": self.heads.largest_by_block(highest), "clipped_heads": int(is_high.sum())}
        self.factors = dict(self._factors_of_rows(torch.where(is_high, self.limit / highest, 1.0)))
        self.waiting = {id(part.master) for part in self.parts}

    def _factors_of_rows(self, factors: Tensor) -> Iterator[tuple[str, tuple[Tensor, int]]]:
        """Yield the weights here with the factor of each row and a row's length."""
        for mixer, place in self.heads.mixers:
            for weight, rows in mixer.scale_logits(factors[place]).items():
                if not bool((rows == 1).all()):
                    yield self.names[id(weight)], (rows, math.prod(parameter_shape(weight)[1:]))

    @torch.no_grad()
    def scale(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the master weights that this call of the optimizer has stepped; a step may take several, and come by one twice."""
        stepped = {id(master) for group in optimizer.param_groups for master in group["params"]} & self.waiting
        self.waiting -= stepped
        for part in self.parts:
            for span in part.spans if id(part.master) in stepped else ():
                if span.name in self.factors:
                    rows, width = self.factors[span.name]
                    first, last = span.start // width, -(-(span.start + span.numel) // width)
                    each = rows[first:last].to(part.master).repeat_interleave(width)
                    own = part.master.view(-1)[span.flat_start : span.flat_start + span.numel]
                    own.mul_(each[span.start - first * width :][: span.numel])

    def after_step(self, result: StepResult) -> None:
        """Report what was seen; a skipped step has clipped nothing."""
        result.found["qk_clip"] = self.found if result.applied else self.found | {"clipped_heads": 0}
        self.factors = {}

    def close(self) -> None:
        """Let go of the optimizer."""
        self.handle.remove()


class HeadMaxima:
    """A number for each head of softmax attention of the whole model, in one tensor: mixers raise those of their heads in it.

    Every rank must make one alike.
    """

    def __init__(self, model: HybridModel, ranks: RankGroup, device: torch.device) -> None:
        tensor = model.groups.tp
        own = {
            (index, name): module
            for index, block in model.all_blocks()
            for name, module in block.named_modules()
            if isinstance(module, SoftmaxMixer)
        }
        sizes = {place: mixer.num_heads * tensor.size() for place, mixer in own.items()}
        self.sizes = dict(sorted(ranks.merge(sizes, lambda known, more: known | more).items()))
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self.flat = torch.full((sum(self.sizes.values()),), -torch.inf, dtype=dtype, device=device)
        self.mixers: list[tuple[SoftmaxMixer, slice]] = []
        begin = 0
        for name, size in self.sizes.items():
            if name in own:
                mixer = own[name]
                first = begin + tensor.rank() * mixer.num_heads
                place = slice(first, first + mixer.num_heads)
                mixer.highest_logits_H = self.flat[place]
                self.mixers.append((mixer, place))
            begin += size

    def of_all_ranks(self) -> Tensor:
        """The largest of each head in the whole step, on the CPU; the same on all ranks, which must all call this."""
        highest = self.flat.clone()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        return highest.cpu()

    def largest_by_block(self, highest: Tensor) -> dict[str, float | None]:
        """The largest of each block's heads, by its number; None where it is not finite."""
        found: dict[str, float] = {}
        for (index, _), part in zip(self.sizes, highest.split(list(self.sizes.values()))):
            found[str(index)] = max(float(part.max()), found.get(str(index), -torch.inf))
        return {index: finite(value) for index, value in found.items()}
