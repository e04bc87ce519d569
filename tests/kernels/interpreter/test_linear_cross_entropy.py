"""The Triton cross-entropy in the interpreter against the row-by-row definition."""

import pytest
import torch

from amfm.kernels.linear_cross_entropy import triton_impl
from amfm.kernels.linear_cross_entropy.op import linear_cross_entropy, linear_statistics
from tests.helpers.numbers import assert_all_near
from tests.helpers.registration import assert_registered
from tests.kernels.test_linear_cross_entropy import landed_gradients, make_inputs

FLOAT32 = 1e-5  # sums of some hundred terms


def run_loss(backend, dtype, sizes, ignored):
    hidden, weight, labels = make_inputs(*sizes, dtype, ignored)
    loss = linear_cross_entropy(hidden, weight, labels, z_loss_weight=1e-2, backend=backend)
    gradients = torch.autograd.grad(loss.total * 0.7, (hidden, weight))
    return [loss.total, loss.nll_sum, loss.token_nll_R, *gradients]


def run_statistics(backend, dtype, sizes):
    hidden, weight, labels = make_inputs(*sizes, dtype)
    log_sum, target = linear_statistics(hidden, weight, labels, first_row=3, backend=backend)
    probe = torch.linspace(-1, 1, log_sum.numel())
    return [log_sum, target, *torch.autograd.grad((log_sum * probe - 2 * target * probe).sum(), (hidden, weight))]


@pytest.mark.parametrize(
    ("sizes", "ignored"),
    [((1, 7, 4), "none"), ((63, 101, 12), "some"), ((63, 33, 12), "all"), ((150, 33, 40), "some")],
)
def test_tiles_equal_the_definition_twice_bitwise(sizes, ignored, twice, poisoned_memory):
    once = twice(lambda: run_loss("triton", torch.float32, sizes, ignored))
    assert_all_near(once, run_loss("reference", torch.float64, sizes, ignored), FLOAT32)


@pytest.mark.parametrize("sizes", [(1, 7, 4), (63, 101, 12), (70, 33, 40)])
def test_statistics_of_a_shard_equal_the_definition_twice_bitwise(sizes, twice, poisoned_memory):
    once = twice(lambda: run_statistics("triton", torch.float32, sizes))
    assert_all_near(once, run_statistics("reference", torch.float64, sizes), FLOAT32)


@pytest.mark.parametrize("operation", [linear_cross_entropy, linear_statistics])
def test_the_weights_gradient_lands_in_its_sum(operation, poisoned_memory):
    total, (first, second) = landed_gradients(operation, "triton", (70, 33, 12))
    assert_all_near([total], [first.double() + second.double()], FLOAT32)  # slice by slice, so in another order


def test_registration_is_complete():
    hidden, weight, labels = make_inputs(5, 9, 4, torch.float32)
    for rows in (hidden, hidden.detach().T.contiguous().T.requires_grad_()):
        assert_registered(triton_impl._forward, rows, weight, labels, -100, 0.1, True)
        assert_registered(triton_impl._statistics, rows, weight, labels, 3)
