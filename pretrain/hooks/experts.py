"""Now and then, the MoE blocks in which the same experts take nearly every token (monitor/experts.py)."""

from __future__ import annotations

from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.experts import EXPERT_STEPS, find_collapsed
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult


class Experts(Hook):
    """Reports a block that collapsed, once until it recovers."""

    def __init__(self, run: Run) -> None:
        self.run, self.num_retired = run, 0
        self.collapsed: frozenset[int] = frozenset()

    def before_update(self) -> None:
        """Ask how many experts of a block could get no token in this step by design: equally many in all blocks."""
        if self.run.config.model.moe is not None and is_due(self.run.progress.step + 1, EXPERT_STEPS):
            retired = max((block.mixer.num_retired() for _, block in self.run.model.all_blocks()), default=0)
            (self.num_retired,) = self.run.parallel.max_over_all([retired])  # a pipeline rank may hold no such block

    def after_step(self, result: StepResult) -> None:
        """Compare the loads when that is due; retired experts get no tokens, and are left out."""
        moe = self.run.config.model.moe
        if moe is None or not is_due(self.run.progress.step, EXPERT_STEPS):
            return
        living = {block: sorted(counts)[self.num_retired :] for block, counts in result.expert_counts.items()}
        shares = find_collapsed(living, moe.top_k)
        if shares.keys() - self.collapsed:
            blocks = ", ".join(f"{block} ({share:.0%} of tokens)" for block, share in shares.items())
            self.run.tell(
                "experts_collapsed",
                f"warning: step {self.run.progress.step}: routing has collapsed: the same experts receive nearly all tokens in block {blocks}; "
                "see model.moe.expert_bias, bias_update_rate (2e-2 for runs below about 1,000 steps) and "
                "auxiliary_loss_weight",
                token_share={str(block): share for block, share in shares.items()},
            )
        self.collapsed = frozenset(shares)
