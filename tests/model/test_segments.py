"""Documents of a context rank's segments, as variable-length attention takes them: what each query sees, and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amfm.kernels.attention.op import attention_reference
from amfm.kernels.attention.varlen import DocumentEnds
from amfm.model.packing import PackMeta


def attend_by_ends(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, ends: DocumentEnds) -> Tensor:
    """What FlashAttention declares: by document, the last query sees the last key, each one before it one key less."""
    assert ends.key_offsets is not None
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BSHK, v_BSHK))
    outputs = []
    queries, keys = (places.tolist() for places in (ends.offsets, ends.key_offsets))
    for begin, end, key_begin, key_end in zip(queries, queries[1:], keys, keys[1:]):
        size, seen = end - begin, key_end - key_begin
        assert (0 <= size <= ends.longest, size <= seen <= ends.longest_keys) == (True, True)
        scores = torch.einsum("qhk,shk->hqs", q[begin:end], k[key_begin:key_end]) * q.shape[-1] ** -0.5
        is_hidden = torch.arange(seen) > torch.arange(size)[:, None] + seen - size
        weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqs,shk->qhk", weights, v[key_begin:key_end]))
    assert (queries[-1], keys[-1]) == (len(q), len(k))
    return torch.cat(outputs).view(q_BTHK.shape)


LENGTHS = {
    "one document": [(18,), (18,)],
    "edges on and next to cuts": [(3, 3, 5, 1, 6), (7, 11)],
    "documents of one token": [(1,) * 18, (9, 1, 1, 7)],
    "one over all cuts but the last token": [(17, 1), (1, 17)],
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_segment_attends_to_its_documents_keys_in_whole_rows(name: str, rank: int) -> None:
    """Segments of three tokens of three ranks."""
    generator = torch.Generator().manual_seed(rank)
    ids_BT = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS[name]])
    segments = PackMeta.from_document_ids(ids_BT).cut(rank, 3).find_bounds().segments
    assert segments is not None
    q, k, v = (torch.randn(2, 18, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    for number, ends in zip(segments.own, segments.document_ends, strict=True):
        seen = (number + 1) * segments.length
        leaves = [x.clone().requires_grad_() for x in (q[:, seen - segments.length : seen], k[:, :seen], v[:, :seen])]
        found = attend_by_ends(*leaves, ends)
        wanted = attention_reference(
            *leaves, document_ids_BS=segments.document_ids_BT[:, :seen], scale=0.5, window=None
        )
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        slope = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
        for one, other in zip(torch.autograd.grad(found, leaves, slope), torch.autograd.grad(wanted, leaves, slope)):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
