"""Forgetting attention next to its definition, one query after the other, and its sums in rows of several documents."""

from __future__ import annotations

import pytest
import torch
from amfm_mixers.fox import FoxMixer, split_exactly, sum_in_documents
from torch import Tensor

from amfm.model.packing import PackMeta
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.model.mixers.samples import sample_options
from tests.model.small_models import meta_of, packed_batch, small_config, small_model

# float64: the same sums in another order.
EXACT = 1e-10
# float32 carries 2^-24, of sums near 2,000 here: 1e-4 of a score.
FLOAT32 = 5e-4
LENGTHS = (7, 1, 13, 42)


def mixer_of(**options: object) -> FoxMixer:
    mixers = {"fox": sample_options("fox") | options}
    mixer = small_model(small_config("{fox}", mixers=mixers)).blocks[0].mixer
    assert isinstance(mixer, FoxMixer)
    generator = torch.Generator().manual_seed(2)
    # Norms begin at ones, biases at zeros, and matrices are small: make all of them felt.
    for parameter in mixer.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return mixer


def one_head(mixer: FoxMixer, x_TD: Tensor, head: int) -> Tensor:
    """o [T, K] of one head over one document."""
    own, kv_heads = mixer.options, mixer.options.kv_heads()
    rows = x_TD @ mixer.in_proj.weight.T
    heads = rows.unflatten(-1, (own.num_heads + 2 * kv_heads, own.head_dim))
    shared = own.num_heads + head * kv_heads // own.num_heads
    q, k, v = heads[:, head], heads[:, shared], heads[:, shared + kv_heads]
    if own.qk_norm:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + mixer.build.norm_epsilon).sqrt() * norm.weight
            for x, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
    forget = torch.sigmoid(x_TD @ mixer.f_proj.weight[head] + mixer.f_proj.bias[head])
    outputs = []
    for i in range(len(x_TD)):
        # A key's weight has faded by the gates of all tokens after it, up to the query's.
        faded_S = torch.cat([forget.new_ones(1), forget[1 : i + 1].flip(0)]).cumprod(0).flip(0)
        weight_S = (k[: i + 1] @ q[i] / own.head_dim**0.5).exp() * faded_S
        outputs.append(weight_S @ v[: i + 1] / weight_S.sum())
    return torch.stack(outputs)


def by_definition(mixer: FoxMixer, x_BTD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    own, rows = mixer.options, []
    for x_TD in x_BTD:
        documents = [
            torch.stack([one_head(mixer, piece, head) for head in range(own.num_heads)], dim=1)
            for piece in x_TD.split(list(lengths))
        ]
        rows.append(torch.cat(documents))
    o_BTHK = torch.stack(rows)
    if mixer.g_proj is not None:
        o_BTHK = o_BTHK * torch.sigmoid(x_BTD @ mixer.g_proj.weight.T).unflatten(-1, (own.num_heads, -1))
    return o_BTHK.flatten(2) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (63,)], ids=["documents", "one token", "63"])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": False, "gate": "none", "num_kv_heads": None}], ids=["pro", "plain"]
)
def test_outputs_and_gradients_equal_the_definition(options: dict, lengths: tuple[int, ...]) -> None:
    mixer = mixer_of(**options)
    generator = torch.Generator().manual_seed(3)
    x_BTD = torch.randn(1, sum(lengths), 12, dtype=torch.float64, generator=generator, requires_grad=True)
    weight_BTD = torch.randn(x_BTD.shape, dtype=torch.float64, generator=generator)
    meta = meta_of(packed_batch((lengths,))[2])
    inputs = [x_BTD, *mixer.parameters()]
    actual_BTD, expected_BTD = mixer(x_BTD, meta).y_BTD, by_definition(mixer, x_BTD, lengths)
    assert_near(actual_BTD, expected_BTD, EXACT, "output")
    # Softmax over one key is 1 whatever its score is.
    many = max(lengths) > 1
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    actual, expected = (
        torch.autograd.grad((y * weight_BTD).sum(), inputs, allow_unused=True, materialize_grads=True)
        for y in (actual_BTD, expected_BTD)
    )
    for name, ours, theirs in zip(names, actual, expected):
        if many or not name.startswith(("f_proj", "q_norm", "k_norm")):
            assert_near(ours, theirs, EXACT, name)
        else:
            assert ours.abs().max() < EXACT and theirs.abs().max() < EXACT, name


def test_float32_and_bf16_hold_sums_that_their_digits_do_not() -> None:
    """Gates near e^-8: sums reach 500, of which bf16 would keep steps of 2, more than what tells two neighbors apart."""
    exact = mixer_of(qk_norm=False)
    exact.f_proj.bias.data.fill_(-8.0)
    exact.f_proj.weight.data *= 0.1
    x_BTD = torch.randn(1, 63, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    meta = PackMeta.one_document_a_row(1, 63)
    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.bfloat16, 3e-2)):
        rounded = mixer_of(qk_norm=False).to(dtype)
        rounded.load_state_dict(exact.state_dict())
        wide = mixer_of(qk_norm=False)
        wide.load_state_dict(rounded.state_dict())
        x = x_BTD.to(dtype)
        assert_near(rounded(x, meta).y_BTD.double(), wide(x.double(), meta).y_BTD, tolerance, str(dtype))


def test_sums_are_those_of_each_document_and_their_channels_keep_24_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    x_BTH = -5 * torch.rand(2, sum(LENGTHS), 3, generator=generator, dtype=torch.float64)
    ids_BT = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).expand(2, -1)
    sums_BTH = sum_in_documents(x_BTH, ids_BT)
    parts = x_BTH.split(LENGTHS, dim=1)
    assert_near(sums_BTH, torch.cat([part.cumsum(1) for part in parts], dim=1), EXACT, "sums")
    assert_bitwise(sums_BTH, torch.cat([sum_in_documents(part, None) for part in parts], dim=1), "document by document")
    sums = sums_BTH.float().requires_grad_()
    channels = split_exactly(sums, torch.bfloat16).unflatten(-1, (3, -1))
    assert_near(channels.float().sum(-2), sums, 2.0**-23, "channels")
    weight = torch.rand(sums.shape, generator=generator)
    (gradient,) = torch.autograd.grad((split_exactly(sums, torch.float32) * weight.repeat(1, 1, 3)).sum(), sums)
    assert_bitwise(gradient, weight, "a gradient in float32 is not rounded")
