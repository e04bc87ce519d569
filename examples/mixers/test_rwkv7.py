"""RWKV-7's time mixing next to the equations of its paper, a token and a head at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.numbers import assert_near
from tests.model.mixers.samples import sample_options
from tests.model.small_models import meta_of, packed_batch, small_config, small_model

# float64: the same sums in another order.
EXACT = 1e-10


def mixer_of() -> Any:
    mixer: Any = small_model(small_config("{rwkv7}", mixers={"rwkv7": sample_options("rwkv7")})).blocks[0].mixer
    generator = torch.Generator().manual_seed(2)
    # Many weights begin at zeros and ones, and matrices are small: make all of them felt.
    for parameter in mixer.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return mixer


def one_document(mixer: Any, x_TD: Tensor) -> Tensor:
    """y [T, D] by the paper's section 4, with states [V, K] as it writes them."""
    heads, size = mixer.options.num_heads, mixer.options.head_dim
    weights = [*mixer.in_proj.weight.chunk(3), *mixer.shared_proj.chunk(3)]
    states = [torch.zeros(size, size, dtype=x_TD.dtype) for _ in range(heads)]
    outputs, before_D = [], torch.zeros_like(x_TD[0])
    for x_D in x_TD:
        r, k, v, d, a, g = (
            weight @ (x_D + (before_D - x_D) * shift_D)
            for weight, shift_D in zip(weights, mixer.shift_bias, strict=True)
        )
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(mixer.decay_proj @ d.tanh() + mixer.decay_bias))
        a = torch.sigmoid(mixer.rate_proj @ a + mixer.rate_bias)
        g = mixer.gate_proj @ g.sigmoid()
        removed, written = k * mixer.removal_scale, k * torch.lerp(torch.ones_like(a), a, mixer.write_mix)
        parts = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            c = removed[own] / (removed[own].square().sum() + 1e-6).sqrt()
            states[head] = states[head] @ (w[own].diag() - torch.outer(c, a[own] * c)) + torch.outer(
                v[own], written[own]
            )
            o = states[head] @ r[own]
            normed = (o - o.mean()) / (o.var(correction=0) + 1e-5 * size).sqrt()
            bonus = (r[own] * mixer.bonus[own] * written[own]).sum() * v[own]
            parts.append(normed * mixer.norm_weight[own] + mixer.norm_bias[own] + bonus)
        outputs.append(mixer.out_proj.weight @ (g * torch.cat(parts)))
        before_D = x_D
    return torch.stack(outputs)


@pytest.mark.parametrize("lengths", [(1,), (7, 1, 13, 3), (63,)])
def test_outputs_and_gradients_are_those_of_the_equations(lengths: tuple[int, ...]) -> None:
    mixer = mixer_of()
    _, _, ids_BT = packed_batch((lengths,))
    generator = torch.Generator().manual_seed(3)
    x_BTD, pull_BTD = torch.randn(2, 1, sum(lengths), 12, dtype=torch.float64, generator=generator)
    x_BTD.requires_grad_()
    leaves = [x_BTD, *mixer.parameters()]
    actual_BTD = mixer(x_BTD, meta_of(ids_BT)).y_BTD
    expected_BTD = torch.cat([one_document(mixer, part) for part in x_BTD[0].split(lengths)])[None]
    assert_near(actual_BTD, expected_BTD, EXACT, "outputs")
    actual = torch.autograd.grad((actual_BTD * pull_BTD).sum(), leaves)
    expected = torch.autograd.grad((expected_BTD * pull_BTD).sum(), leaves, allow_unused=True)
    for gradient, other in zip(actual, expected, strict=True):
        assert_near(gradient, torch.zeros_like(gradient) if other is None else other, EXACT, "gradient")
