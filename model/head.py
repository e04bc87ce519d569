"""A head of an installed package: what gives probabilities of tokens instead of one matrix and a softmax.

Its kind is a row of the table like a mixer's, with `mixes="logits"` (config/kinds.py), and `model.head` names it. Everything
that is special to the matrix (ties, shards of the vocabulary, the fused loss) does not apply: the head sees whole rows of
the normed stream, and says log probabilities or losses. Names of its parameters begin with `head.`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.linear_cross_entropy.op import CrossEntropy
from amfm.model.config.kinds import find_kind
from amfm.model.config.schema import ModelConfig
from amfm.model.parallel.layers import Float32Buffers


@dataclass(frozen=True)
class HeadOutput:
    """Without labels log_p_BTV [B, T, V]; with labels the sums of the loss, and weighted auxiliary losses by name, each a mean
    over the micro-batch, in training."""

    log_p_BTV: Tensor | None
    loss: CrossEntropy | None = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)


class Head(Float32Buffers):
    """Built as `Class(options, config)`. Parameters are replicated, with equal gradients on all ranks."""

    weight: Tensor  # one of its parameters: readers ask it for device and dtype

    @abstractmethod
    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None = None) -> HeadOutput:
        """Read the normed stream [B, T, D]; labels [B, T] int64, -100 if there is none."""

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw the whole initial value of a parameter, float32 on the CPU; None: as init.py says for its name."""
        return None


def build_head(config: ModelConfig) -> Head | None:
    """Build the head that `model.head` names; None if the model has the matrix."""
    if config.head is None:
        return None
    kind = find_kind(config.head)
    options: Any = config.options_of(kind)
    head: Head = kind.load()(options, config)
    return head


def head_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List names and shapes of a package's head under its own names; nothing is allocated."""
    with torch.device("meta"):
        head = build_head(config)
    return {} if head is None else {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
