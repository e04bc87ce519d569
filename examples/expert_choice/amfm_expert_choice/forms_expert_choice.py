"""The choice of expert choice outside of training, in plain PyTorch: exports carry this file."""

from typing import Any

from torch import Tensor


def choose(logits_RE: Tensor, section: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ids and weights [R, K] of the top_k experts of each token, from float32 logits [R, E]."""
    weights_RK, ids_RK = logits_RE.softmax(-1).topk(section["top_k"], dim=-1)
    return ids_RK, weights_RK
