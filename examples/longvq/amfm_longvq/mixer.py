"""Attention over a codebook on amfm's decay scan; see the README for the formulas and how far it is LongVQ."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.packing import PackMeta
from amfm.model.parallel.regions import sum_values
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_longvq.spec import LongVqOptions


class LongVqMixer(LinearMixer):
    """Each key is its nearest code: what a query reads is a softmax over codes, each weighted by its keys so far."""

    options: LongVqOptions
    recurrence = DecayRecurrence()

    def __init__(self, options: LongVqOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        self.codes = nn.Parameter(torch.empty(self.num_heads, options.num_codes, self.key_dim))
        self.shards["codes"] = Shard((ShardSpec(0, "tp", (options.num_heads,)),))
        self.commit: Tensor | None = None

    def parts(self) -> dict[str, Part]:
        """q, k, v and the gate of the output, by head."""
        heads = self.options.num_heads
        keys, values = Part(heads * self.key_dim, heads), Part(heads * self.value_dim, heads)
        return {"q": keys, "k": keys, "v": values, "gate": values}

    def convolved(self) -> tuple[str, ...]:
        """All of them."""
        return ("q", "k", "v", "gate")

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """As in the base class, with the loss `commit` in training."""
        output = super().forward(x_BTD, meta, state)
        commit, self.commit = self.commit, None
        return output if commit is None else output._replace(auxiliary={"commit": commit})

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Queries are their weights of all codes, keys the choice of one, values have a one for the count.

        Norms bound the scores by sqrt(K), so that no weight is lost beside the largest in float32.
        """
        wide = torch.promote_types(parts["q"].dtype, torch.float32)
        q_BTHK, k_BTHK, codes_HSK = (
            functional.rms_norm(x.to(wide), (self.key_dim,))
            for x in (self.heads(parts["q"]), self.heads(parts["k"]), self.codes)
        )
        scores_BTHS, nearness_BTHS = (
            torch.einsum("bthk,hsk->bths", x, codes_HSK) * self.key_dim**-0.5 for x in (q_BTHK, k_BTHK)
        )
        weights_BTHS = (scores_BTHS - scores_BTHS.amax(-1, keepdim=True).detach()).exp()
        code_BTH = nearness_BTHS.argmax(-1)
        choice_BTHS = functional.one_hot(code_BTH, self.options.num_codes).to(wide)
        # The gradient of a soft choice for the hard one, which has none.
        soft_BTHS = nearness_BTHS.softmax(-1)
        choice_BTHS = choice_BTHS + (soft_BTHS - soft_BTHS.detach())
        if self.training and self.options.commit_weight:
            self.commit = self._distance(k_BTHK, codes_HSK, code_BTH)
        dtype = parts["v"].dtype
        v_BTHV = functional.pad(self.heads(parts["v"]), (0, 1), value=1.0)
        no_decay_BTH = weights_BTHS.new_zeros(weights_BTHS.shape[:3])
        return ScanRows(weights_BTHS.to(dtype), choice_BTHS.to(dtype), v_BTHV, no_decay_BTH)

    def _distance(self, k_BTHK: Tensor, codes_HSK: Tensor, code_BTH: Tensor) -> Tensor:
        """Weighted mean square between keys and their codes, each drawn to the other, over all ranks' heads and tokens."""
        head_H = torch.arange(self.num_heads, device=code_BTH.device)
        nearest_BTHK = codes_HSK[head_H, code_BTH]
        apart = (k_BTHK - nearest_BTHK.detach()).square().sum() + (k_BTHK.detach() - nearest_BTHK).square().sum()
        groups = self.build.groups
        numbers = k_BTHK.numel() * groups.tp.size() * groups.cp.size()
        return sum_values(apart * (self.options.commit_weight / numbers), groups)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Divide the weighted values by the sum of weights, times the gate."""
        mixed_BTI = (o_BTHV[..., :-1] / o_BTHV[..., -1:]).flatten(-2)
        return mixed_BTI * (parts["gate"] if self.conv is not None else functional.silu(parts["gate"]))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Codes in all directions."""
        return torch.randn(shape, generator=generator) if name == "codes" else None
