"""One token in C, for decoding: Mamba2's mixer and experts of few rows against PyTorch's parts."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.causal_conv1d.op import causal_conv1d_step
from amfm.kernels.common.few_rows import MOST_ROWS
from amfm.kernels.decay_scan.op import mamba2_step
from amfm.kernels.mamba2.native_impl import continue_native, mix_native, step_native
from amfm.kernels.moe.op import SCORES, expert_feed_forward, route
from amfm.kernels.norm.op import gated_rms_norm, rms_norm
from amfm.kernels.runtime.native import refuse_native
from tests.helpers.mixers import NAMES, MixerCase, make_leaves
from tests.helpers.numbers import assert_bitwise, assert_near

pytestmark = pytest.mark.skipif(refuse_native(torch.device("cpu")) is not None, reason="no C compiler")


@pytest.mark.parametrize(
    "case",
    [MixerCase(B=3, H=4, G=2, N=32, norm_groups=2), MixerCase(B=1, P=32, width=2, bias=False), MixerCase(B=2, width=3)],
)
@torch.no_grad()
def test_a_token_of_mamba2_equals_its_parts_whatever_rows_are_next_to_it(case: MixerCase) -> None:
    leaves, sizes = make_leaves(case, torch.float32), case.sizes()
    projected, *weights = (leaves.get(name) for name in NAMES[:-1])
    conv_weight, conv_bias, A_log, D, dt_bias, norm_weight = weights
    projected = projected[:, 0]
    window = torch.randn(case.B, case.width - 1, sizes.channels)
    state = torch.randn(case.B, case.H, case.P, case.N)
    z, inputs, dt = projected.split(sizes.parts(), dim=-1)
    convolved, next_window = causal_conv1d_step(inputs, window, conv_weight, conv_bias)
    y, next_state = mamba2_step(*_split(convolved, dt, sizes, A_log), D, dt_bias, state)
    expected = gated_rms_norm(y.flatten(1), z, norm_weight, sizes.epsilon, num_groups=sizes.norm_groups)
    found = step_native(projected, *weights, window, state, sizes)
    assert_near(found[0], expected, 1e-6, "normed")
    assert_bitwise(found[1], next_window, "window")
    assert_near(found[2], next_state, 1e-6, "state")
    for row in range(case.B):
        alone = step_native(projected[row : row + 1], *weights, window[row : row + 1], state[row : row + 1], sizes)
        for one, all_rows in zip(alone, found):
            assert_bitwise(one[0], all_rows[row])


@pytest.mark.parametrize("cut", [1, 2, 70])
@torch.no_grad()
def test_a_prompt_in_pieces_leaves_the_state_of_the_whole(cut: int) -> None:
    case = MixerCase(B=2, T=100, H=4, G=2, N=32, norm_groups=2, width=4 - cut % 2)
    leaves, sizes = make_leaves(case, torch.float32), case.sizes()
    projected, *weights = (leaves.get(name) for name in NAMES[:-1])
    window, state = torch.zeros(2, case.width - 1, sizes.channels), torch.zeros(2, case.H, case.P, case.N)
    whole = continue_native(projected, *weights, window, state, sizes)
    assert_near(whole[0], mix_native(projected, *weights, sizes, None, 64), 1e-6)
    first, *after = continue_native(projected[:, :cut], *weights, window, state, sizes)
    then, *last = continue_native(projected[:, cut:], *weights, *after, sizes)
    assert_near(torch.cat([first, then], dim=1), whole[0], 1e-5)
    assert_bitwise(last[0], whole[1], "window")
    assert_near(last[1], whole[2], 1e-5, "state")
    by_token, kept = [], (window, state)
    for token in range(cut):
        row, *kept = step_native(projected[:, token], *weights, *kept, sizes)
        by_token.append(row)
    assert_near(torch.stack(by_token, dim=1), first, 1e-5)
    assert_near(kept[1], after[1], 1e-5, "state by token")


def _split(convolved, dt, sizes, A_log):
    x, B, C = sizes.split(convolved)
    return x, dt, A_log, B, C


@pytest.mark.parametrize(("activation", "factor"), [("squared_relu", 1), ("swiglu", 2)])
@torch.no_grad()
def test_experts_of_few_rows_equal_pytorchs_whatever_rows_are_next_to_them(activation: str, factor: int) -> None:
    x, ids, weights = torch.randn(5, 40), torch.randint(6, (5, 2)), torch.rand(5, 2)
    up, down = torch.randn(6, factor * 70, 40) / 6, torch.randn(6, 40, 70) / 8

    def run(rows: slice, backend: str) -> torch.Tensor:
        return expert_feed_forward(x[rows], ids[rows], weights[rows], up, down, activation=activation, backend=backend)

    found = run(slice(None), "native")
    assert_near(found, run(slice(None), "torch"), 1e-6)
    for row in range(5):
        assert_bitwise(run(slice(row, row + 1), "native")[0], found[row])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert_bitwise(run(slice(None), "native"), found)
    torch.set_num_threads(before)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_the_routers_choice_for_few_rows_equals_pytorchs(score: str, has_bias: bool) -> None:
    logits = 3 * torch.randn(7, 9)
    logits[2, 4] = logits[2, 7] = 9.0  # equal ones go to the lower id
    logits[3] = torch.tensor([-300.0, 100.0, *range(7)])  # probabilities of zero
    bias = torch.randn(9) if has_bias else None
    settings = {"score": score, "top_k": 3, "normalize": True, "scaling": 1.7}
    found, expected = (route(logits, bias, **settings, backend=name) for name in ("native", "torch"))
    assert_bitwise(found.expert_ids_RK, expected.expert_ids_RK)
    assert_bitwise(found.counts_E, expected.counts_E)
    assert_near(found.weights_RK, expected.weights_RK, 1e-6)
    assert_near(found.scores_RE, expected.scores_RE, 1e-6)


@torch.no_grad()
def test_a_score_that_is_not_a_number_is_chosen_and_stays_visible() -> None:
    logits = torch.randn(2, 5)
    logits[1, 3] = torch.nan
    found = route(logits, None, score="sigmoid", top_k=2, normalize=True, scaling=1.0, backend="native")
    assert found.expert_ids_RK[1, 0] == 3 and found.weights_RK[1].isnan().all() and found.weights_RK[0].isfinite().all()


@pytest.mark.parametrize("has_residual", [False, True])
@torch.no_grad()
def test_the_norm_of_few_rows_equals_pytorchs(has_residual: bool) -> None:
    x, weight = torch.randn(3, 1, 40), torch.randn(40)
    residual = torch.randn(3, 1, 40) if has_residual else None
    found, expected = (rms_norm(x, weight, 1e-5, residual=residual, backend=name) for name in ("native", "torch"))
    if has_residual:
        assert_bitwise(found[1], expected[1])
        found, expected = found[0], expected[0]
    assert_near(found, expected, 1e-6)


def test_many_rows_and_rows_with_gradients_take_pytorchs_experts() -> None:
    up, down = torch.randn(4, 32, 16), torch.randn(4, 16, 32)
    for rows, needs in ((MOST_ROWS + 1, False), (2, True)):
        x, ids, weights = torch.randn(rows, 16), torch.randint(4, (rows, 2)), torch.rand(rows, 2)
        with torch.set_grad_enabled(needs):
            given = x.requires_grad_(needs), ids, weights, up, down
            both = [
                expert_feed_forward(*given, activation="squared_relu", backend=name) for name in ("native", "torch")
            ]
        assert_bitwise(*both)
        assert both[0].requires_grad == needs
