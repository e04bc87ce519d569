"""Causal attention inside documents against the query-by-query reference."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.attention import torch_impl, varlen
from amfm.kernels.attention.op import _log_choice, attention, fastest_backend, note_choice
from amfm.kernels.attention.varlen import DocumentEnds, refuse_varlen
from tests.helpers.determinism import without_determinism

# Softmax-weighted sums of at most a hundred values.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


def make_inputs(batch, tokens, keys, heads, kv_heads, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, tokens, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, size))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(backend, dtype, inputs, documents, scale=None, window=None):
    """Output and gradients of q, k, v and, where they are a fourth input, sinks."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    sinks = leaves[3] if len(leaves) > 3 else None
    y = attention(*leaves[:3], sinks_H=sinks, document_ids_BS=documents, scale=scale, window=window, backend=backend)
    probe = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * probe).sum(), leaves)]


def make_inputs_with_sinks(*shape):
    generator = torch.Generator().manual_seed(1)
    return [*make_inputs(*shape), 2 * torch.randn(shape[3], generator=generator, dtype=torch.float64)]


def make_documents(batch, lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids.expand(batch, -1).to(torch.int32)


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((1, 1, 1, 1, 1, 4), None),
        ((2, 63, 63, 4, 1, 8), None),
        ((2, 1, 20, 4, 2, 8), None),
        ((1, 7, 20, 4, 4, 8), None),
        ((2, 63, 63, 4, 1, 8), [1, 30, 32]),
        ((2, 20, 20, 2, 2, 8), [1, 1, 3, 1, 2, 12]),
        ((2, 20, 20, 2, 1, 8), [20]),
        ((2, 30, 63, 4, 1, 8), [1, 30, 32]),
        ((2, 32, 63, 4, 2, 8), [31, 32]),
        ((1, 1, 63, 2, 1, 8), [40, 23]),
        ((2, 7, 20, 2, 1, 8), [5, 1, 8, 1, 1, 4]),
        ((2, 7, 20, 2, 1, 8), [20]),
    ],
)
def test_torch_path_equals_the_reference_in_outputs_and_gradients(shape, lengths):
    inputs = make_inputs(*shape)
    documents = None if lengths is None else make_documents(shape[0], lengths)
    wanted = run("reference", torch.float64, inputs, documents, scale=0.3)
    for dtype, tolerance in TOLERANCE.items():
        for got, want in zip(run("torch", dtype, inputs, documents, scale=0.3), wanted):
            assert (got - want).norm() <= tolerance * want.norm() + tolerance  # dq of a lone key is exactly zero


def highest_log_sums(q, k, documents, window):
    """The largest log-sum-exp of each head, from the whole matrix of scores."""
    tokens, keys = q.shape[1], k.shape[1]
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * q.shape[3] ** -0.5
    distance = torch.arange(keys - tokens, keys)[:, None] - torch.arange(keys)
    seen = ((distance >= 0) & (distance < window)).expand(len(q), -1, -1)
    if documents is not None:
        seen = seen & (documents[:, keys - tokens :, None] == documents[:, None])
    return scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1).amax((0, 2))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("shape", "lengths"), [((2, 200, 231, 4, 2, 8), [30, 1, 200]), ((1, 1, 63, 2, 1, 8), None)])
def test_the_largest_log_sums_of_heads_are_those_of_keys_alone(shape, lengths, window):
    q, k, v, sinks_H = make_inputs_with_sinks(*shape)
    documents = None if lengths is None else make_documents(shape[0], lengths)
    wanted_H = highest_log_sums(q, k, documents, window or shape[2])
    known_H = torch.tensor([100.0, -100.0, -100.0, -100.0], dtype=torch.float64)[: shape[3]]
    attention(q, k, v, sinks_H=sinks_H, document_ids_BS=documents, window=window, highest_H=known_H)
    assert known_H[0] == 100, "what is higher already stays"
    torch.testing.assert_close(known_H[1:], wanted_H[1:], rtol=1e-12, atol=0)


WINDOWS = [
    ((1, 1, 1, 1, 1, 4), None, 1),
    ((2, 63, 63, 4, 1, 8), None, 1),
    ((2, 63, 63, 4, 2, 8), [1, 30, 32], 7),
    ((1, 200, 200, 2, 1, 4), [90, 1, 109], 70),
    ((1, 130, 130, 2, 1, 4), None, 3),
    ((2, 1, 20, 4, 2, 8), None, 6),
    ((2, 7, 70, 4, 4, 8), [40, 28, 2], 5),
    ((2, 30, 63, 4, 1, 8), [1, 30, 32], 40),
    ((1, 20, 20, 2, 2, 8), [12, 8], 20),
]


@pytest.mark.parametrize(("shape", "lengths", "window"), WINDOWS)
def test_windows_equal_the_reference_in_outputs_and_gradients(shape, lengths, window):
    inputs = make_inputs(*shape)
    documents = None if lengths is None else make_documents(shape[0], lengths)
    wanted = run("reference", torch.float64, inputs, documents, scale=0.3, window=window)
    for dtype, tolerance in TOLERANCE.items():
        for got, want in zip(run("torch", dtype, inputs, documents, scale=0.3, window=window), wanted):
            assert (got - want).norm() <= tolerance * want.norm() + tolerance  # dq of a lone key is exactly zero


SINKS = [
    ((1, 1, 1, 1, 1, 4), None, None),
    ((2, 63, 63, 4, 1, 8), None, None),
    ((2, 1, 20, 4, 2, 8), None, None),
    ((1, 7, 20, 4, 4, 8), None, None),
    ((2, 63, 63, 4, 1, 8), [1, 30, 32], None),
    ((2, 20, 20, 2, 2, 8), [1, 1, 3, 1, 2, 12], None),
    ((2, 63, 63, 4, 2, 8), [1, 30, 32], 7),
    ((1, 130, 130, 2, 1, 4), None, 3),
    ((2, 30, 63, 4, 1, 8), [1, 30, 32], 40),
]


@pytest.mark.parametrize("by_wider_heads", [False, True])
@pytest.mark.parametrize(("shape", "lengths", "window"), SINKS)
def test_sinks_equal_the_reference_in_outputs_and_gradients(shape, lengths, window, by_wider_heads, monkeypatch):
    """Through PyTorch's own backward on processors, and as it is done on other devices."""
    if by_wider_heads:
        monkeypatch.setattr(torch_impl, "_has_log_sums", lambda q: False)
    inputs = make_inputs_with_sinks(*shape)
    documents = None if lengths is None else make_documents(shape[0], lengths)
    wanted = run("reference", torch.float64, inputs, documents, scale=0.3, window=window)
    for dtype, tolerance in TOLERANCE.items():
        got = run("torch", dtype, inputs, documents, scale=0.3, window=window)
        for one, want in zip(got, wanted, strict=True):
            assert (one - want).norm() <= tolerance * want.norm() + tolerance


def test_the_reference_with_sinks_is_the_eager_attention_of_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v, sinks_H = make_inputs_with_sinks(2, 23, 23, 4, 2, 8)
    module = SimpleNamespace(sinks=sinks_H, num_key_value_groups=2, training=False)
    mask = torch.full((23, 23), -torch.inf, dtype=torch.float64).triu(1)
    theirs, _ = eager_attention_forward(module, *(x.transpose(1, 2) for x in (q, k, v)), mask, 0.3)
    ours = attention(q, k, v, sinks_H=sinks_H, scale=0.3, backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [None, 7])
def test_a_sink_of_no_weight_changes_no_bit_and_has_no_gradient(window):
    inputs = make_inputs(2, 40, 40, 4, 2, 8)
    expanded = [inputs[0], *(x.repeat_interleave(2, dim=2) for x in inputs[1:])]
    plain = run("torch", torch.float32, expanded, None, window=window)
    *others, d_sinks = run("torch", torch.float32, [*expanded, torch.full((4,), -1e4)], None, window=window)
    assert all(torch.equal(one, other) for one, other in zip(plain, others, strict=True))
    assert not d_sinks.any()


def test_gradients_with_sinks_pass_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs_with_sinks(1, 6, 6, 2, 1, 4)]
    assert torch.autograd.gradcheck(lambda q, k, v, z: attention(q, k, v, sinks_H=z), inputs)


def test_a_window_hides_every_bit_of_what_came_before():
    inputs = make_inputs(1, 60, 60, 2, 1, 8)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :10] *= 7
    one = run("torch", torch.float32, inputs, None, window=8)
    other = run("torch", torch.float32, changed, None, window=8)
    assert torch.equal(one[0][:, 17:], other[0][:, 17:])
    assert not torch.equal(one[0][:, 16], other[0][:, 16])


def test_a_window_without_a_key_is_refused():
    with pytest.raises(ValueError, match="window must be at least 1"):
        attention(*make_inputs(1, 3, 3, 1, 1, 4), window=0)


@pytest.mark.parametrize("lengths", [[25, 38, 33], [3, 5, 1, 2, 4, 1, 6]])
def test_changing_one_document_leaves_every_bit_of_the_others(lengths):
    total = sum(lengths)
    inputs = make_inputs(2, total, total, 4, 2, 8)
    documents = make_documents(2, lengths)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, documents[0] == 1] *= 7
    kept = documents[0] != 1
    for one, other in zip(
        run("torch", torch.float32, inputs, documents), run("torch", torch.float32, changed, documents)
    ):
        assert torch.equal(one[:, kept], other[:, kept])
        assert not torch.equal(one, other)


def test_gradients_pass_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(1, 6, 6, 2, 1, 4)]
    documents = make_documents(1, [2, 4])
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, document_ids_BS=documents), inputs)
    assert torch.autograd.gradcheck(attention, inputs)


def test_bfloat16_stays_within_the_rounding_of_its_dtype():
    inputs = [x.bfloat16() for x in make_inputs(1, 63, 63, 4, 1, 16)]
    wanted = run("torch", torch.float64, inputs, None)
    for got, want in zip(run("torch", torch.bfloat16, inputs, None), wanted):
        assert (got - want).norm() <= 1e-2 * want.norm()  # 8 bits of mantissa


def test_compiled_graph_masks_documents():
    inputs = [x.float() for x in make_inputs(2, 24, 24, 4, 2, 8)]
    documents = make_documents(2, [10, 14])
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, document_ids_BS=documents), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), attention(*inputs, document_ids_BS=documents), rtol=1e-5, atol=1e-6)


def test_compiled_graphs_have_sinks():
    leaves = [x.float().requires_grad_() for x in make_inputs_with_sinks(2, 24, 24, 4, 2, 8)]
    compiled = torch.compile(lambda q, k, v, z: attention(q, k, v, sinks_H=z), fullgraph=True, backend="aot_eager")
    y = compiled(*leaves)
    wanted = attention(*leaves[:3], sinks_H=leaves[3])
    torch.testing.assert_close(y, wanted)
    gradients = (torch.autograd.grad(made.square().sum(), leaves) for made in (y, wanted))
    torch.testing.assert_close(*gradients)


def test_bad_input_is_refused_with_what_was_expected():
    q, k, v = make_inputs(1, 6, 6, 4, 2, 8)
    with pytest.raises(ValueError, match="v_BSJK must have shape"):
        attention(q, k, v[:, :4])
    with pytest.raises(ValueError, match="key heads must divide the query heads"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="at least as many as queries"):
        attention(q, k[:, :3], v[:, :3])
    with pytest.raises(ValueError, match=r"document_ids_BS must have shape \[1, 6\]"):
        attention(q[:, :3], k, v, document_ids_BS=torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"sinks_H must have shape \[4\]"):
        attention(q, k, v, sinks_H=torch.zeros(2))
    with pytest.raises(ValueError, match="no sinks"):
        ends = DocumentEnds(torch.tensor([0, 6], dtype=torch.int32), 6)
        attention(q, k, v, sinks_H=torch.zeros(4), document_ends=ends, backend="varlen")
    with pytest.raises(ValueError, match="document_ids_BS must be int32"):
        attention(q, k, v, document_ids_BS=torch.zeros(1, 6))


def fake_query(device, tokens, dtype=torch.bfloat16, head_dim=64):
    """What the choice looks at: shape, dtype and device."""
    return SimpleNamespace(device=torch.device(device), shape=(1, tokens, 2, head_dim), dtype=dtype)


def test_models_leave_rows_without_boundaries_on_cuda_to_pytorch_and_say_so(caplog):
    _log_choice.cache_clear()
    with caplog.at_level("INFO", logger="amfm.kernels.attention.op"):
        for _ in range(2):
            for tokens in (64, 1):
                query = fake_query("cuda", tokens)
                assert fastest_backend("triton", query, has_documents=False, keys=64) == "torch"
    assert caplog.messages == ["attention -> torch: without document boundaries PyTorch's FlashAttention is faster"]
    assert fastest_backend("triton", fake_query("cuda", 64), has_documents=True, keys=64) == "triton"
    assert fastest_backend("triton", fake_query("cuda", 32), has_documents=False, keys=64) == "triton"
    assert fastest_backend("triton", fake_query("cuda", 64), has_documents=False, keys=64, has_sinks=True) == "triton"
    for backend in ("triton", "torch", "reference"):
        assert fastest_backend(backend, fake_query("cpu", 64), has_documents=False, keys=64) == backend


@without_determinism()
def test_documents_on_cuda_go_to_variable_length_attention_where_it_serves(caplog):
    ends = DocumentEnds(torch.tensor([0, 10, 64], dtype=torch.int32), 54)
    settings = {"has_documents": True, "keys": 64, "document_ends": ends}
    _log_choice.cache_clear()
    with caplog.at_level("INFO", logger="amfm.kernels.attention.op"):
        for query, chosen in (
            (fake_query("cuda", 64), "varlen"),
            (fake_query("cuda", 64, dtype=torch.float32), "triton"),
            (fake_query("cuda", 64, head_dim=20), "triton"),
            (fake_query("cuda", 32), "triton"),
        ):
            assert fastest_backend("triton", query, **settings) == chosen
    parts = DocumentEnds(ends.offsets, 54, torch.tensor([0, 64, 128], dtype=torch.int32), 64)
    for has_documents in (True, False):  # of a row that context ranks share
        found = fastest_backend(
            "triton", fake_query("cuda", 64), has_documents=has_documents, keys=128, document_ends=parts
        )
        assert found == "varlen"
    assert "supports bfloat16 or float16, not torch.float32" in caplog.text
    assert "multiples of 8, not 20" in caplog.text
    assert "torch 2.9.1 does not have it; torch 2.10 and later do" in varlen._refuse_release("2.9.1")


def test_variable_length_attention_is_called_as_it_is_declared():
    """On fake tensors: nothing computes, but arguments, shapes and gradients are checked by PyTorch's own declaration."""
    with FakeTensorMode():
        q, k = torch.empty(2, 32, 4, 16, dtype=torch.bfloat16), torch.empty(2, 32, 2, 16, dtype=torch.bfloat16)
        leaves = q.requires_grad_(), k.requires_grad_(), k.detach().clone().requires_grad_()
        ends = DocumentEnds(torch.tensor([0, 20, 32, 64], dtype=torch.int32), 32)
        for window in (None, 8):
            y = attention(*leaves, document_ends=ends, window=window, backend="varlen")
            gradients = torch.autograd.grad(y.sum(), leaves)
            assert y.shape == q.shape
            assert [x.shape for x in gradients] == [x.shape for x in leaves]
        more = torch.empty(2, 48, 2, 16, dtype=torch.bfloat16, requires_grad=True)
        parts = DocumentEnds(ends.offsets, 32, torch.tensor([0, 30, 48, 96], dtype=torch.int32), 48)
        y = attention(leaves[0], more, more, document_ends=parts, backend="varlen")
        assert (y.shape, torch.autograd.grad(y.sum(), more)[0].shape) == (q.shape, more.shape)
    with pytest.raises(ValueError, match="needs document_ends"):
        attention(*make_inputs(1, 6, 6, 4, 2, 8), backend="varlen")


class CudnnWatch(TorchDispatchMode):
    """Notes at each variable-length attention whether PyTorch may take cuDNN for it."""

    def __init__(self):
        super().__init__()
        self.lets_cudnn = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._opname == "_varlen_attn":
            self.lets_cudnn.append(torch._C._get_cudnn_sdp_enabled())
        return function(*args, **(kwargs or {}))


def test_variable_length_attention_keeps_out_cudnn_which_plans_anew_for_every_number_of_documents():
    was = torch._C._get_cudnn_sdp_enabled()
    with FakeTensorMode(), CudnnWatch() as watch:
        q, k = torch.empty(2, 32, 4, 16, dtype=torch.bfloat16), torch.empty(2, 32, 2, 16, dtype=torch.bfloat16)
        ends = DocumentEnds(torch.tensor([0, 20, 32, 64], dtype=torch.int32), 32)
        attention(q, k, k, document_ends=ends, backend="varlen")
    assert (was, watch.lets_cudnn, torch._C._get_cudnn_sdp_enabled()) == (True, [False], True)


@without_determinism()
def test_torch_compile_sees_variable_length_attention_whole_and_makes_one_graph_for_all_documents():
    """A graph is made for the first documents, one for any others; nothing runs, because a CPU has no FlashAttention."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return lambda *_: (torch.zeros(()),)

    @torch.compile(fullgraph=True, backend=keep)
    def attend(q, k, v, offsets, longest):
        assert refuse_varlen(q.dtype, q.shape[3]) is None
        return attention(q, k, v, document_ends=DocumentEnds(offsets, longest), backend="varlen").sum()

    q, k = torch.zeros(1, 64, 4, 16, dtype=torch.bfloat16), torch.zeros(1, 64, 2, 16, dtype=torch.bfloat16)
    for offsets, longest in (
        ([0, 32, 64], 32),
        ([0, 20, 32, 64], 31),
        ([0, 20, 30, 40, 64], 24),
        ([0, 1, 2, 3, 4, 64], 60),
    ):
        attend(q, k, k, torch.tensor(offsets, dtype=torch.int32), longest)
    assert len(graphs) == 2


def test_the_choice_of_a_backend_does_not_cut_a_compiled_graph():
    q, k, v = (x.float() for x in make_inputs(1, 24, 24, 4, 2, 8))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v):
        note_choice("torch", "this test chooses it")
        return attention(q, k, v, window=8, backend="torch")

    torch.testing.assert_close(attend(q, k, v), attention(q, k, v, window=8), rtol=1e-5, atol=1e-6)
