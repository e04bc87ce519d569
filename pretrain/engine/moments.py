"""What an optimizer keeps next to the weights, by the label of the parameter group: what checkpoints hold and plans
count.

PyTorch's AdamW for runs that compile nothing.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor


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
