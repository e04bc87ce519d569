"""Expert choice (Zhou et al. 2022, arXiv 2202.09368): each expert takes the tokens of a micro-batch that score it highest."""

import math

from pydantic import Field

from amfm.model.config.routers import Routed, RouterInput, RouterSpec
from amfm.model.config.section import Section


class Options(Section):
    """Options of expert choice."""

    capacity_factor: float = Field(1.0, gt=0, description="Tokens of an expert, over num_tokens * top_k / num_experts.")


def choose(given: RouterInput, options: Options) -> Routed:
    """In training experts choose tokens, so their load is even; else a token takes the top_k experts, without the others' future."""
    import torch

    scores_RE = given.logits_RE.softmax(-1)
    num_experts, top_k = given.moe.num_experts, given.moe.top_k
    if not given.is_training:
        weights_RK, ids_RK = scores_RE.topk(top_k, dim=-1)
        return Routed(ids_RK, weights_RK, scores_RE)
    share = given.num_tokens * top_k / num_experts
    taken = min(given.num_tokens, math.ceil(options.capacity_factor * share))
    merit_RE = scores_RE.detach()
    if given.is_padding_R is not None:
        merit_RE = merit_RE.masked_fill(given.is_padding_R[:, None], -1.0)
    tokens_CE = merit_RE.topk(taken, dim=0).indices
    is_chosen_RE = torch.zeros_like(merit_RE, dtype=torch.bool).scatter(0, tokens_CE, True)
    ids_RE = torch.arange(num_experts, device=merit_RE.device).where(is_chosen_RE, num_experts)
    return Routed(ids_RE, scores_RE, scores_RE, most=taken * num_experts)


SPEC = RouterSpec(
    "expert_choice",
    "amfm_expert_choice:choose",
    Options,
    compares_tokens=True,
    modeling="amfm_expert_choice.forms_expert_choice:choose",
)
