"""A router of a package in a block: calls its function and checks what it chose."""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.moe.grouping import count_experts
from amfm.kernels.moe.op import Routing
from amfm.model.config.moe import MoeConfig
from amfm.model.config.routers import RouterInput, RouterSpec
from amfm.model.packing import PackMeta


class PackageRouter:
    """The router that `model.moe.router` names, with its options."""

    def __init__(self, spec: RouterSpec, moe: MoeConfig) -> None:
        self.spec, self.moe = spec, moe
        self.options = getattr(moe.router_options, spec.name) or spec.options()
        self.choose = spec.load()

    def route(
        self, logits_RE: Tensor, bias_E: Tensor | None, meta: PackMeta, seed: Tensor, *, is_training: bool
    ) -> Routing:
        """Choose experts. Raises ValueError, which names the router, for what cannot be a choice, and to replay choices."""
        if meta.own_choices_BTK is not None:
            raise ValueError(
                f"model.moe.router={self.spec.name} cannot replay choices that were made elsewhere; use ours"
            )
        is_padding_R = None if meta.padding is None else meta.padding.is_padding_BT.flatten()
        num_tokens = len(logits_RE) if meta.padding is None else meta.padding.num_tokens
        given = RouterInput(logits_RE, self.moe, bias_E, num_tokens, is_padding_R, seed, is_training)
        found = self.choose(given, self.options)
        ids_RK, num_experts = found.expert_ids_RK, self.moe.num_experts
        self._check(logits_RE, ids_RK, found.weights_RK, found.scores_RE)
        if found.losses.keys() != set(self.spec.losses):
            raise ValueError(f"the router {self.spec.name} gave losses {sorted(found.losses)}, not {self.spec.losses}")
        return Routing(
            ids_RK,
            found.weights_RK.masked_fill(ids_RK == num_experts, 0.0),
            count_experts(ids_RK, num_experts + 1)[:num_experts],
            found.scores_RE,
            bound=min(ids_RK.numel(), ids_RK.numel() if found.most is None else found.most),
            losses=dict(found.losses),
        )

    def _check(self, logits_RE: Tensor, ids_RK: Tensor, weights_RK: Tensor, scores_RE: Tensor) -> None:
        """Raise ValueError for shapes and dtypes, and on CPUs for ids beyond the experts."""
        rows, num_experts = logits_RE.shape
        given = f"the router {self.spec.name} gave"
        if ids_RK.dim() != 2 or len(ids_RK) != rows or weights_RK.shape != ids_RK.shape or ids_RK.dtype != torch.int64:
            raise ValueError(
                f"{given} expert_ids_RK {list(ids_RK.shape)} {ids_RK.dtype} and weights_RK {list(weights_RK.shape)}; both must "
                f"be [{rows}, K], and ids int64"
            )
        if scores_RE.shape != logits_RE.shape:
            raise ValueError(f"{given} scores_RE {list(scores_RE.shape)}; they must be {list(logits_RE.shape)}")
        if ids_RK.device.type == "cpu" and not torch.compiler.is_compiling() and ids_RK.numel():
            low, high = (int(value) for value in ids_RK.aminmax())
            if low < 0 or high > num_experts:
                raise ValueError(
                    f"{given} experts {low} to {high}; there are 0 to {num_experts - 1}, and {num_experts} for none"
                )
