"""Mamba-3 next to its definition, one token after the other, and what its angles are in long documents."""

import math

import pytest
import torch
from amfm_mixers.mamba3 import Mamba3Mixer
from amfm_mixers.running_angles import sum_angles
from torch.nn import functional

from tests.helpers.numbers import assert_near
from tests.model.mixers.samples import sample_options
from tests.model.small_models import meta_of, packed_batch, small_config, small_model

# float64: the same sums in another order.
EXACT = 1e-10
LENGTHS = (7, 1, 13, 20)


def mixer_of(**options):
    mixers = {"mamba3": sample_options("mamba3") | {"conv_kernel": 0} | options}
    mixer = small_model(small_config("{mamba3}", mixers=mixers)).blocks[0].mixer
    assert isinstance(mixer, Mamba3Mixer)
    generator = torch.Generator().manual_seed(2)
    # First values of biases, norms and D are ones, and matrices are small: make all of them felt.
    for parameter in mixer.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return mixer


def turn_pair(pair, angle):
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos])


def turned(vectors, angles):
    """Rotate channels 2 a and 2 a + 1 by angle a."""
    pairs = [turn_pair(vectors[2 * a : 2 * a + 2], angle) for a, angle in enumerate(angles)]
    return torch.cat([*pairs, vectors[2 * len(pairs) :]])


def normed(vector, weight, epsilon=1e-5):
    return vector / (vector.square().mean() + epsilon).sqrt() * weight


def one_head(mixer, x_TD, head):
    """y [T, P] of one head over one document, as the equations of the paper have it."""
    own, groups = mixer.options, mixer.options.num_groups
    N, P, H = own.state_size, own.head_dim, own.num_heads
    rows = (x_TD @ mixer.in_proj.weight.T).split([H * P, groups * N, groups * N, H * P, H, H, H], dim=-1)
    xs, Bs, Cs, zs = (part.unflatten(-1, (-1, size)) for part, size in zip(rows, (P, N, N, P)))
    dts, rates, blends = (part[:, head] for part in rows[4:])
    speeds = math.pi * (x_TD @ mixer.shared_proj.T).tanh()
    group = head * groups // H
    state, angle, before = x_TD.new_zeros(N, P), x_TD.new_zeros(own.num_angles()), x_TD.new_zeros(N, P)
    outputs = []
    for t in range(len(x_TD)):
        dt, blend = functional.softplus(dts[t] + mixer.dt_bias[head]), blends[t].sigmoid()
        a = -(1 + rates[t] if rates[t] > 0 else 1 / (1 - rates[t])).clamp(min=1e-4)
        angle = angle + dt * speeds[t]
        B, C = (
            turned(normed(part[t, group], norm.weight) + bias.view(H, N)[head], angle)
            for part, norm, bias in ((Bs, mixer.B_norm, mixer.B_bias), (Cs, mixer.C_norm, mixer.C_bias))
        )
        x = xs[t, head]
        state = (a * dt).exp() * (state + (1 - blend) * dt * before) + blend * dt * B.outer(x)
        outputs.append((state.T @ C + mixer.D[head] * x) * functional.silu(zs[t, head]))
        before = B.outer(x)
    return torch.stack(outputs)


def by_definition(mixer, x_BTD, lengths):
    rows = []
    for row_TD in x_BTD:
        documents = [
            torch.cat([one_head(mixer, piece, head) for head in range(mixer.num_heads)], dim=-1)
            for piece in row_TD.split(list(lengths))
        ]
        rows.append(torch.cat(documents))
    return torch.stack(rows) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("options", [{}, {"rotated": "all", "num_groups": 1, "num_heads": 3}], ids=["half", "all"])
def test_packed_documents_equal_the_definition_with_gradients(options):
    mixer = mixer_of(**options)
    x_BTD = torch.randn(1, sum(LENGTHS), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    meta = meta_of(packed_batch((LENGTHS,))[2])
    weight_BTD = torch.randn(x_BTD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    inputs = [x_BTD.requires_grad_(), *mixer.parameters()]
    actual_BTD, expected_BTD = mixer(x_BTD, meta).y_BTD, by_definition(mixer, x_BTD, LENGTHS)
    assert_near(actual_BTD, expected_BTD, EXACT, "output")
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    actual, expected = (torch.autograd.grad((y * weight_BTD).sum(), inputs) for y in (actual_BTD, expected_BTD))
    for name, ours, theirs in zip(names, actual, expected):
        assert_near(ours, theirs, EXACT, name)


def test_angles_of_a_long_document_keep_their_digits_and_restart_with_the_next():
    generator = torch.Generator().manual_seed(5)
    angles_BTX = 3 * torch.rand(1, 50_000, 2, generator=generator, dtype=torch.float64)
    ids_BT = (torch.arange(50_000) >= 20_011).int()[None]
    exact_BTX = torch.cat([part.cumsum(1) for part in angles_BTX.split([20_011, 29_989], dim=1)], dim=1)
    assert_near(sum_angles(angles_BTX, ids_BT).cos(), exact_BTX.cos(), EXACT, "float64")
    # A running sum of float32 near 45,000 moves in steps of 0.004.
    rounded_BTX = sum_angles(angles_BTX.float(), ids_BT)
    assert (rounded_BTX.double() - exact_BTX).cos().min() > math.cos(1e-3)
    assert rounded_BTX.abs().max() < 64 * 64 * 2 * math.pi
