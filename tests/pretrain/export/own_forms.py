"""What any model of our own class must keep to, whatever its blocks: texts in pieces, and padding before a text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from amfm.model.config.kinds import all_kinds
from amfm.model.config.plugins import load_named
from amfm.pretrain.export.modeling_template.modeling_amfm import AmfmForCausalLM
from amfm.pretrain.export.modeling_template.package_mixers_amfm import PACKAGE_MIXERS
from tests.helpers.numbers import assert_near

# float32 on both sides: chunks here, token after token there. The largest of MALA's difference of large sums. Our
# own float32 gradients are 1.1e-4 from float64 for LightNet in a mixture of memories on one processor, theirs 2.2e-5.
FLOAT32 = 2e-5

# What an export writes into its own copy of that file.
PACKAGE_MIXERS |= {kind.name: load_named(kind.modeling) for kind in all_kinds().values() if kind.modeling}


@torch.no_grad()
def assert_pieces_are_the_whole(model: AmfmForCausalLM, tokens_BT: Tensor, lengths: Iterable[int]) -> None:
    """A text that is read in pieces of these lengths has the logits that it has at once."""
    whole_BTV = model(tokens_BT).logits
    cache, start = None, 0
    for length in lengths:
        output = model(tokens_BT[:, start : start + length], cache=cache, use_cache=True)
        cache = output.cache
        assert_near(output.logits, whole_BTV[:, start : start + length], FLOAT32, f"tokens from {start}")
        start += length
    assert start == tokens_BT.shape[1]


@torch.no_grad()
def assert_padding_changes_nothing(model: AmfmForCausalLM, tokens_BT: Tensor, cut: int) -> None:
    """The second of two rows, whose first eight tokens are padding, has the logits of only its text, read in two pieces."""
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, :8] = 0
    output = model(tokens_BT[:, :cut], attention_mask=mask_BT[:, :cut], use_cache=True)
    following = model(tokens_BT[:, cut:], attention_mask=mask_BT, cache=output.cache).logits
    alone = model(tokens_BT[1:, 8:]).logits
    assert output.logits.isfinite().all()
    assert_near(torch.cat([output.logits[1:, 8:], following[1:]], dim=1), alone, FLOAT32, "the padded row")
    assert_near(following[:1], model(tokens_BT[:1]).logits[:, cut:], FLOAT32, "the other row")
