"""The hook that ends components: after the last that counts, a matrix gets zeros, which have no gradient and stay."""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.pretrain.checkpoint.engine_layout import Grouping, MasterView
from amfm.pretrain.hook import Hook
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult
from amfm_maestro.block import MATRICES
from amfm_maestro.spec import SPEC, CutOptions, MaestroOptions


class MaestroHook(Hook):
    """Cuts ranks in steps that are due. What is cut is a function of the master weights: nothing is saved."""

    def __init__(self, options: CutOptions, run: Run) -> None:
        self.options, self.run = options, run
        model = run.config.model
        section = model.block_options(SPEC.symbol)
        assert isinstance(section, MaestroOptions), "the pattern has such blocks"
        self.places: list[tuple[str, int]] = []
        blocks = [index for index, letter in enumerate(model.letters) if letter == SPEC.symbol]
        for number, index in enumerate(blocks):
            for which, rank in zip(MATRICES, section.ranks_of(number)):
                self.places.append((f"blocks.{index}.mixer.{which}", rank))
        # Of each matrix first the rows of its first factor, then the columns of its second.
        self.groupings, self.num_groups = {}, 0
        for place, rank in self.places:
            for name, dim in (("first", 0), ("second", 1)):
                self.groupings[f"{place}_{name}"] = Grouping(dim, rank, 1, self.num_groups)
                self.num_groups += rank

    def after_step(self, result: StepResult) -> None:
        """Look, and end what is after the last component that counts."""
        options, step = self.options, self.run.progress.step
        if step < options.start_step or (step - options.start_step) % options.every_steps:
            return
        view = self.run.open_masters()
        ranks, chosen = self.judge(view)
        if bool(chosen.any()):
            view.zero_groups(self.groupings, chosen)
            self.run.note_edit()
        result.found["maestro_ranks"] = ranks
        self.run.tell("hook", f"step {step}: maestro: ranks {ranks}", name="maestro", ranks=ranks)

    def judge(self, view: MasterView) -> tuple[list[int], Tensor]:
        """The rank that each matrix needs, and the groups after it that are not zero yet."""
        squares = view.sum_groups(self.groupings, self.num_groups)
        chosen, ranks, start = torch.zeros(self.num_groups, dtype=torch.bool), [], 0
        for _, rank in self.places:
            first, second = squares[start : start + rank], squares[start + rank : start + 2 * rank]
            sizes = (first * second).sqrt()
            counts = (sizes >= self.options.threshold * sizes.max()) & (sizes > 0)
            kept = 1 + int(counts.nonzero().max()) if bool(counts.any()) else 1
            ranks.append(kept)
            for begin, own in ((start, first), (start + rank, second)):
                chosen[begin + kept : begin + rank] = own[kept:] > 0
            start += 2 * rank
        return ranks, chosen
