"""Cross-entropy without logits against the row-by-row reference, and shards of the vocabulary against the whole."""

import pytest
import torch

from amfm.kernels.linear_cross_entropy import torch_impl
from amfm.kernels.linear_cross_entropy.op import linear_cross_entropy, linear_statistics
from tests.helpers.gradient_place import Place
from tests.helpers.registration import assert_registered

# Sums of up to a thousand terms in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


def make_inputs(rows, vocab, model, dtype, ignored="some"):
    generator = torch.Generator().manual_seed(rows + vocab)
    hidden = torch.randn(rows, model, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, model, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    if ignored == "some":
        labels[::3] = -100
    elif ignored == "all":
        labels[:] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("sizes", [(1, 7, 4), (63, 101, 12), (300, 33, 8)])
def test_torch_path_equals_the_reference_in_loss_and_gradients(sizes, ignored):
    for dtype, tolerance in TOLERANCE.items():
        results = []
        for backend, precision in (("reference", torch.float64), ("torch", dtype)):
            hidden, weight, labels = make_inputs(*sizes, precision, ignored)
            loss = linear_cross_entropy(hidden, weight, labels, z_loss_weight=1e-2, backend=backend)
            (loss.total * 0.7).backward()
            results.append((loss.total.detach(), loss.nll_sum, loss.token_nll_R, hidden.grad, weight.grad))
        for wanted, got in zip(*results):
            assert (got - wanted).norm() <= max(tolerance, 1e-7 * (got.dtype == torch.float32)) * wanted.norm() + 1e-30
        if ignored == "all":
            assert results[1][0] == 0 and results[1][3].abs().max() == 0 and results[1][4].abs().max() == 0


def landed_gradients(operation, backend, sizes):
    """Of two passes the sum in which the weight's gradient landed, and what autograd gives of each pass."""
    hidden, weight, labels = make_inputs(*sizes, torch.float32)

    def differentiate(scale):
        hidden.grad = weight.grad = None
        found = operation(hidden * scale, weight, labels, backend=backend)
        total = found.total if operation is linear_cross_entropy else (found[0] - 2 * found[1]).sum()
        (total * 0.7).backward()
        return hidden.grad, weight.grad

    wanted = [differentiate(scale) for scale in (1.0, 0.5)]
    place = Place.of(weight)
    for scale, (d_hidden, _) in zip((1.0, 0.5), wanted):
        d_again, none = differentiate(scale)
        assert none is None and torch.equal(d_again, d_hidden)
    return place.sum, [d_weight for _, d_weight in wanted]


@pytest.mark.parametrize("operation", [linear_cross_entropy, linear_statistics])
def test_the_weights_gradient_lands_in_its_sum_to_the_bit(operation, poisoned_memory):
    total, (first, second) = landed_gradients(operation, "torch", (300, 33, 8))
    assert torch.equal(total, first + second)


def test_gradients_pass_gradcheck():
    hidden, weight, labels = make_inputs(6, 9, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, z_loss_weight=0.1).total, (hidden, weight)
    )
    assert torch.autograd.gradcheck(lambda h, w: linear_statistics(h, w, labels, first_row=3), (hidden, weight))


def test_shards_of_the_vocabulary_combine_to_the_whole():
    hidden, weight, labels = make_inputs(40, 30, 8, torch.float64)
    whole = linear_cross_entropy(hidden, weight, labels)
    wanted = torch.autograd.grad(whole.total, (hidden, weight))
    for backend in ("torch", "reference"):
        parts = [
            linear_statistics(hidden, shard, labels, first_row=first, backend=backend)
            for first, shard in ((0, weight[:13]), (13, weight[13:]))
        ]
        nll = torch.stack([log_sum for log_sum, _ in parts]).logsumexp(0) - sum(target for _, target in parts)
        total = nll[labels != -100].sum()
        torch.testing.assert_close(total, whole.total, rtol=1e-13, atol=0)
        for got, want in zip(torch.autograd.grad(total, (hidden, weight)), wanted):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_equals_cross_entropy_of_torch_without_z_loss():
    hidden, weight, labels = make_inputs(50, 64, 16, torch.float32)
    got = linear_cross_entropy(hidden, weight, labels)
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(got.total, wanted, rtol=2e-6, atol=0)
    assert got.token_nll_R[0] == 0 and got.token_nll_R.dtype == torch.float32 and not got.token_nll_R.requires_grad


def test_bfloat16_gradients_stay_within_the_rounding_of_their_dtype():
    hidden, weight, labels = make_inputs(64, 50, 32, torch.bfloat16)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden.double(), weight.double(), labels).total, (hidden, weight))
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).total, (hidden, weight))
    for one, other in zip(got, wanted):
        assert (one - other).float().norm() <= 1e-2 * other.float().norm()  # 8 bits of mantissa


def test_no_gradients_are_computed_where_none_are_asked_for():
    hidden, weight, labels = make_inputs(20, 10, 4, torch.float32)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).total.requires_grad
    total = linear_cross_entropy(hidden.detach(), weight, labels).total
    (grad,) = torch.autograd.grad(total, weight)
    assert grad.shape == weight.shape


def test_bad_input_is_refused_with_what_was_expected():
    hidden, weight, labels = make_inputs(5, 7, 4, torch.float32, ignored="none")
    with pytest.raises(ValueError, match=r"labels_R must be in \[0, 7\)"):
        linear_cross_entropy(hidden, weight, labels + 7)
    with pytest.raises(ValueError, match="weight_VD must have shape"):
        linear_cross_entropy(hidden, weight.T, labels)
    with pytest.raises(ValueError, match="int64"):
        linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(ValueError, match="z_loss_weight"):
        linear_cross_entropy(hidden, weight, labels, z_loss_weight=-1.0)
    with pytest.raises(ValueError, match="weight_VD must be"):
        linear_cross_entropy(hidden, weight.double(), labels)


def test_compiled_graphs_contain_the_whole_operation():
    hidden, weight, labels = make_inputs(20, 10, 4, torch.float32)
    compiled = torch.compile(lambda h, w: linear_cross_entropy(h, w, labels).total, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    wanted = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).total, (hidden, weight))
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other)


def test_registration_is_complete():
    hidden, weight, labels = make_inputs(5, 9, 4, torch.float32)
    for rows in (hidden, hidden.detach().T.contiguous().T.requires_grad_()):
        assert_registered(torch_impl._forward, rows, weight, labels, -100, 0.1, True)
        assert_registered(torch_impl._statistics, rows, weight, labels, 3)
