"""Size of a model's decode state: what one sequence keeps in memory between tokens.

It is the number that hybrids are built for: attention keeps keys and values of every token, a recurrence a state of fixed
size. It is measured on the meta device and not computed from formulas, so that it holds for plugins too and cannot differ
from what decoding allocates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups


def state_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Measure the bytes of one sequence's decode state after `num_tokens` tokens, with weights of `dtype`.

    The model reads the tokens on the meta device, so whatever a state does (a cache grows, a window fills, a recurrence
    stays) is counted, and nothing is computed or allocated.
    """
    model = HybridModel(config, single_rank_groups(), device="meta").to(dtype).eval()
    tokens_BT = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    with torch.no_grad():
        output = model(
            tokens_BT,
            PackMeta.one_document_a_row(1, num_tokens, device="meta"),
            state=model.empty_state(1),
        )
    assert output.state is not None, "a state was given"
    return count_bytes(output.state.blocks)


def count_bytes(state: object) -> int:
    """Sum the bytes of all tensors in nested tuples and dictionaries."""
    return sum(tensor.nbytes for tensor in state_tensors(state))


def state_tensors(state: object) -> Iterator[Tensor]:
    """Iterate over all tensors in nested tuples and dictionaries."""
    if isinstance(state, Tensor):
        yield state
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ()
    for part in parts:
        yield from state_tensors(part)
