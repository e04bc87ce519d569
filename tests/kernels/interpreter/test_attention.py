"""The Triton attention in the interpreter against the query-by-query definition."""

import pytest
import torch

from amfm.kernels.attention import triton_impl
from amfm.kernels.attention.op import attention
from amfm.kernels.attention.triton_impl import document_bounds
from tests.helpers.numbers import assert_all_near, assert_bitwise
from tests.helpers.registration import assert_registered
from tests.kernels.test_attention import make_documents, make_inputs, make_inputs_with_sinks, run

FLOAT32 = 1e-5  # softmax-weighted sums of at most a hundred values


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((1, 1, 1, 1, 1, 4), None),
        pytest.param((1, 63, 63, 4, 1, 8), None, marks=pytest.mark.slow),
        ((2, 1, 20, 4, 2, 8), None),
        pytest.param((1, 7, 20, 4, 4, 8), None, marks=pytest.mark.slow),
        ((2, 63, 63, 2, 1, 20), [1, 30, 32]),
        ((1, 20, 20, 2, 2, 8), [1, 1, 3, 1, 2, 12]),
        pytest.param((1, 70, 70, 2, 1, 8), [40, 30], marks=pytest.mark.slow),
        ((2, 35, 70, 2, 1, 8), [20, 30, 19, 1]),
        pytest.param((1, 33, 70, 2, 1, 8), [37, 33], marks=pytest.mark.slow),
    ],
)
def test_tiles_equal_the_definition_twice_bitwise(shape, lengths, twice, poisoned_memory):
    inputs = make_inputs(*shape)
    documents = None if lengths is None else make_documents(shape[0], lengths)
    once = twice(lambda: run("triton", torch.float32, inputs, documents, scale=0.3))
    assert_all_near(once, run("reference", torch.float64, inputs, documents, scale=0.3), FLOAT32)


@pytest.mark.parametrize(
    ("shape", "lengths", "window"),
    [
        pytest.param((1, 63, 63, 2, 1, 8), None, 7, marks=pytest.mark.slow),
        ((2, 35, 70, 2, 1, 8), [20, 30, 19, 1], 18),
        ((1, 70, 70, 2, 1, 8), [40, 30], 1),
    ],
)
def test_windows_equal_the_definition_twice_bitwise(shape, lengths, window, twice, poisoned_memory):
    inputs = make_inputs(*shape)
    documents = None if lengths is None else make_documents(shape[0], lengths)
    once = twice(lambda: run("triton", torch.float32, inputs, documents, scale=0.3, window=window))
    expected = run("reference", torch.float64, inputs, documents, scale=0.3, window=window)
    assert_all_near(once, expected, FLOAT32)


@pytest.mark.parametrize(
    ("shape", "lengths", "window"),
    [
        ((1, 1, 1, 1, 1, 4), None, None),
        ((1, 7, 20, 4, 2, 8), None, None),
        pytest.param((2, 63, 63, 2, 1, 20), [1, 30, 32], None, marks=pytest.mark.slow),
        ((2, 35, 70, 2, 1, 8), [20, 30, 19, 1], 18),
    ],
)
def test_sinks_equal_the_definition_twice_bitwise(shape, lengths, window, twice, poisoned_memory):
    inputs = make_inputs_with_sinks(*shape)
    documents = None if lengths is None else make_documents(shape[0], lengths)
    once = twice(lambda: run("triton", torch.float32, inputs, documents, scale=0.3, window=window))
    assert_all_near(once, run("reference", torch.float64, inputs, documents, scale=0.3, window=window), FLOAT32)


@pytest.mark.parametrize("window", [None, 18])
def test_the_largest_log_sums_are_those_of_keys_alone(window, poisoned_memory):
    *inputs, sinks_H = (x.float() for x in make_inputs_with_sinks(2, 35, 70, 2, 1, 8))
    given = {"sinks_H": sinks_H, "document_ids_BS": make_documents(2, [20, 30, 19, 1]), "window": window}
    found, expected = torch.full((2, 2), -torch.inf).unbind()
    attention(*inputs, **given, highest_H=found, backend="triton")
    attention(*inputs, **given, highest_H=expected, backend="torch")
    torch.testing.assert_close(found, expected, rtol=FLOAT32, atol=FLOAT32)


def test_a_sink_of_no_weight_changes_no_bit():
    inputs = make_inputs(1, 40, 40, 2, 1, 8)
    plain = run("triton", torch.float32, inputs, None)
    *others, d_sinks = run("triton", torch.float32, [*inputs, torch.full((2,), -1e4)], None)
    for one, other in zip(plain, others, strict=True):
        assert_bitwise(one, other)
    assert not d_sinks.any()


def test_changing_one_document_leaves_every_bit_of_the_others():
    inputs = make_inputs(1, 60, 60, 2, 1, 8)
    documents = make_documents(1, [18, 20, 22])
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, documents[0] == 1] *= 7
    kept = documents[0] != 1
    for one, other in zip(
        run("triton", torch.float32, inputs, documents), run("triton", torch.float32, changed, documents)
    ):
        assert torch.equal(one[:, kept], other[:, kept])
        assert not torch.equal(one, other)


def test_bounds_name_the_first_token_of_a_document_and_the_one_after_its_last():
    ids = torch.tensor([[0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0]])
    first, ends = document_bounds(ids, 6)
    assert first.tolist() == [[0, 1, 1, 1, 4, 4], [0] * 6]
    assert ends.tolist() == [[1, 4, 4, 4, 6, 6], [6] * 6]
    first, ends = document_bounds(ids, 3)
    assert first.tolist() == [[1, 4, 4], [0] * 3]
    assert ends.tolist() == [[0, 1, 1, 1, 3, 3], [3] * 6]


def test_registration_is_complete():
    q, k, v = (x.float().requires_grad_() for x in make_inputs(1, 5, 5, 2, 1, 4))
    first, ends = document_bounds(torch.zeros(1, 5, dtype=torch.int64), 5)
    assert_registered(triton_impl._forward, q, k, v, None, first, ends, 0.5)
    assert_registered(triton_impl._forward, q, k, v, torch.zeros(2, requires_grad=True), first, ends, 0.5)
