"""What the fake function of each of our operations says of its results, against what its body gives.

All operations are found by their registration, so a new one fails here until it has a call below.
"""

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
from amfm_mixers.diag_scan import torch_impl as diag_torch
from amfm_mixers.diag_scan import triton_impl as diag
from amfm_simulate.compiled import BodyRunner
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from amfm.kernels.attention import triton_impl as attention
from amfm.kernels.causal_conv1d import torch_impl as convolution_torch
from amfm.kernels.causal_conv1d import triton_impl as convolution
from amfm.kernels.decay_scan import triton_impl as decay
from amfm.kernels.decay_scan.vector import triton_impl as decay_vector
from amfm.kernels.delta_block import triton_impl as delta_block
from amfm.kernels.delta_block.sizes import DeltaSizes
from amfm.kernels.delta_scan import triton_impl as delta
from amfm.kernels.delta_scan.vector import triton_impl as delta_vector
from amfm.kernels.linear_cross_entropy import torch_impl as loss_torch
from amfm.kernels.linear_cross_entropy import triton_impl as loss
from amfm.kernels.low_precision import products, triton_impl
from amfm.kernels.low_precision.recipe import ExpertRecipes, Recipe
from amfm.kernels.mamba2 import native_impl, segments
from amfm.kernels.mamba2 import triton_impl as mamba2
from amfm.kernels.mamba2.rank_part import MixerSizes
from amfm.kernels.moe import counting_sort, recycling, triton_codes, triton_experts, triton_only_expert, triton_router
from amfm.kernels.moe import torch_impl as experts_torch
from amfm.kernels.moe.rows import triton_impl as rows_triton
from amfm.kernels.norm import heads as head_norm
from amfm.kernels.norm import triton_impl as norm
from amfm.kernels.rope import triton_impl as rope
from amfm.kernels.runtime.native import refuse_native
from amfm.kernels.sparse_attention import triton_impl as sparse
from amfm.kernels.swiglu import triton_impl as swiglu

ROOT = Path(__file__).parents[3]
ROOMS = (
    *((room, "amfm", room) for room in ("kernels", "model", "pretrain", "data_pipeline", "launch")),
    ("examples/mixers/amfm_mixers", "amfm_mixers"),
)


class Compared(TorchDispatchMode):
    """Runs our operations' bodies and compares them with what fake functions say: Triton's on fake tensors, whose
    launches do nothing, and PyTorch's on real ones, because they read their values."""

    def __init__(self):
        super().__init__()
        self.runner = BodyRunner()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "amfm":
            return func(*args, **kwargs)
        if "triton" in func._opname:
            return self.runner.run(func, args, kwargs, self)
        given = func(*args, **kwargs)
        with FakeTensorMode() as mode:
            said = func(*tree_map_only(Tensor, mode.from_tensor, args), **kwargs)
        self.runner.compare(str(func), said, given)
        return given


def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def apart(*shape, dtype=torch.bfloat16):
    """Rows with others' values between them, as a part of a projection has them."""
    return torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., : shape[-1]].requires_grad_()


def float32(*shape):
    return leaf(*shape, dtype=torch.float32)


def numbers(*shape, below):
    return torch.randint(0, below, shape)


def mixer_weights():
    """Of 2 heads of 16 channels in 1 group with 16 state numbers."""
    return leaf(64, 4), leaf(64), float32(2), float32(2), float32(2), leaf(32), leaf(8, 32)


def mixed(rows, keep):
    return mamba2._forward(rows(1, 40, 98), *mixer_weights(), None, [2, 16, 1, 16, 1], 1e-5, 16, keep)


def mixed_natively(rows):
    """In C, which takes packed float32."""
    taps, bias, *others, norm_weight, _ = (weight.detach().float().requires_grad_() for weight in mixer_weights())
    given = rows(1, 40, 98).detach().float().contiguous().requires_grad_()
    return native_impl._forward(given, taps, bias, *others, norm_weight, None, [2, 16, 1, 16, 1], 1e-5)


def delta_mixed(rows, *, channels):
    """Two heads of 16 keys and 8 values; decays and gate in the projection, or with `channels` next to it."""
    sizes = DeltaSizes(2, 2, 16, 8, 1, "softplus", channels, "silu", 1e-5)
    apart = (rows(2, 20, 32), rows(2, 20, 16)) if channels else (None, None)
    width = sum(sizes.widths(decay=not channels, gate=not channels).values())
    weights = leaf(sizes.channel_count, 4), float32(2), float32(sizes.decays), leaf(8), leaf(8, 16)
    return delta_block._forward(rows(2, 20, width), *apart, *weights, None, sizes.numbers, sizes.floats, 16)


class Alone:
    """An exchange of segments that all begin a document: what they would be told is zero."""

    def windows(self, inputs, width):
        return torch.zeros_like(inputs[:, :width])

    def states(self, final, factor):
        return torch.zeros_like(final), factor

    def windows_back(self, d_windows):
        return torch.zeros_like(d_windows)

    def states_back(self, d_entering, factor):
        return torch.zeros_like(d_entering)


def mixed_segments(rows, keep):
    sizes = MixerSizes(2, 16, 1, 16, 1, 1e-5)
    return segments.mix_segments(rows(2, 20, 98), *mixer_weights(), None, sizes, 16, keep, Alone())


def fed(rows, counts, kept=16):
    """Eight rows over four experts: by token, with weights and some choices lost, or as they come."""
    ids = numbers(8, 2, below=4)
    pairs, tokens, places, _, offsets = counting_sort._sort(ids, 4)
    by_token = (leaf(8, 2), pairs, tokens, places) if counts else (None, None, pairs, None)
    return triton_experts._forward(
        rows(8 if counts else 16, 8), *by_token, offsets, leaf(4, 16, 8), leaf(4, 8, 8), "swiglu", kept
    )


def fed_by_codes(rows, *, counts, weight_gradient, name="fp8_block", activation="swiglu", saved="bf16"):
    """As `fed`, of codes in 8 or 4 bits."""
    pairs, tokens, places, _, offsets = counting_sort._sort(numbers(8, 2, below=4), 4)
    given = triton_codes.Places(tokens, pairs, places) if counts else triton_codes.Places(None, None, None)
    x, weights = rows(8 if counts else 16, 8), leaf(8, 2) if counts else None
    recipe, up = Recipe(name, weight_gradient=weight_gradient, saved=saved), 8 if activation == "squared_relu" else 16
    return triton_codes._Experts.apply(
        x, weights, offsets, leaf(4, up, 8), leaf(4, 8, 8), given, 16, activation, ExpertRecipes(recipe, recipe), None
    )


def multiplied(rows, *, name="fp8_block"):
    """The three products of a projection, of codes in 8 or 4 bits."""
    by = products.codes_of(Recipe(name))
    x, dy, weight = rows(6, 8).detach(), rows(6, 10).detach(), leaf(10, 8).detach()
    x_rows, x_columns = by.quantize_rows(x, rows=True, columns=True)
    dy_rows, dy_columns = by.quantize_rows(dy, rows=True, columns=True, gradient=True)
    by.product(dy_rows, by.quantize_weight(weight, transposed=True), torch.bfloat16)
    by.weight_gradient(dy_columns, x_columns, 6, torch.bfloat16, None)
    return by.product(x_rows, by.quantize_weight(weight), torch.bfloat16)


def packed(rows):
    """Rows as bytes, and back."""
    found = torch.empty(6, 8)
    triton_impl.unpack_rows(triton_impl.pack_rows(rows(6, 8).detach()), found)
    return found


def fed_by_torch(rows):
    offsets = torch.tensor([4, 8, 12, 16], dtype=torch.int32)
    return experts_torch._forward(
        rows(8, 8), leaf(16), numbers(16, below=8), offsets, leaf(4, 16, 8), leaf(4, 8, 8), "swiglu"
    )


def chosen(rows, v):
    return sparse._forward(rows(2, 20, 4, 24), rows(2, 30, 2, 24), v, numbers(2, 20, 7, below=30), 0.25, 16)


def diagonal(module, rows, *last):
    # float32 steps and parameters next to values of the model's dtype.
    x, dt, B, C = rows(2, 20, 6), float32(2, 20, 6), rows(2, 20, 4), rows(2, 20, 4)
    return module._forward(x, dt, float32(6, 4), B, C, float32(6), float32(2, 6, 4), None, 16, *last)


def stepped(module, rows, *, steps=(), channels=(), erase=()):
    q, k, v = rows(2, 20, 2, 16), rows(2, 20, *steps, 2, 16), rows(2, 20, *steps, 2, 8)
    beta, g = leaf(2, 20, *steps, 2), float32(2, 20, 2, *channels)
    return module._forward(q, k, v, beta, g, *erase, float32(2, 2, 16, 8), None, 16)


def scanned(module, rows, keep, *absent, channels=()):
    q, k, v = rows(2, 20, 2, 16), rows(2, 20, 2, 16), rows(2, 20, 2, 8)
    return module._forward(q, k, v, float32(2, 20, 2, *channels), *absent, float32(2, 2, 16, 8), None, 16, 0, keep)


# Each a call with `apart` or `leaf` for its rows; together they reach every operation, backward ones by differentiation.
TRITON = (
    lambda rows: mixed(rows, True),
    lambda rows: mixed(rows, False),
    lambda rows: mixed_segments(rows, True),
    lambda rows: mixed_segments(rows, False),
    lambda rows: attention._forward(rows(2, 20, 4, 16), rows(2, 20, 2, 16), rows(2, 20, 2, 16), None, None, None, 0.25),
    lambda rows: attention._forward(
        rows(2, 20, 4, 16), rows(2, 20, 2, 16), rows(2, 20, 2, 16), float32(4), None, None, 0.25
    ),
    lambda rows: norm._norm(rows(6, 8), rows(6, 8), leaf(8), 1e-5, 1, False),
    lambda rows: norm._norm(rows(6, 8), rows(6, 8), leaf(8), 1e-5, 2, True),
    lambda rows: norm._layer_norm(rows(6, 8), rows(6, 8), leaf(8), leaf(8), 1e-5),
    lambda rows: norm._layer_norm(rows(6, 8), None, leaf(8), leaf(8), 1e-5),
    lambda rows: head_norm._forward(leaf(2, 20, 2, 16), rows(2, 20, 32), leaf(16), 1e-5, "silu"),
    lambda rows: head_norm._forward(leaf(2, 20, 2, 16), None, leaf(16), 1e-5, "none"),
    lambda rows: delta_mixed(rows, channels=False),
    lambda rows: delta_mixed(rows, channels=True),
    lambda rows: diagonal(diag, rows, True),
    lambda rows: swiglu._swiglu(rows(6, 8), 1.0, 0.0, 0.0, 0.0),
    lambda rows: swiglu._plain(rows(6, 8), 1.0),
    lambda rows: swiglu._plain(rows(6, 8), 0.0),
    lambda rows: stepped(delta, rows, steps=(3,)),
    lambda rows: stepped(delta_vector, rows, channels=(16,), erase=(None,)),
    lambda rows: stepped(delta_vector, rows, channels=(16,), erase=(rows(2, 20, 2, 16),)),
    lambda rows: loss._forward(rows(6, 8), leaf(10, 8), numbers(6, below=10), -100, 0.1, True),
    lambda rows: loss._statistics(rows(6, 8), leaf(10, 8), numbers(6, below=10), 0),
    lambda rows: fed(rows, True),
    lambda rows: fed(rows, True, kept=10),
    lambda rows: fed(rows, False),
    lambda rows: triton_only_expert.only_expert_triton(rows(6, 8), leaf(6, 1), leaf(1, 16, 8), leaf(1, 8, 8), "swiglu"),
    lambda rows: counting_sort.limit_pairs(numbers(8, 2, below=4), 4, 3),
    lambda rows: recycling.recycle_pairs(numbers(8, 2, below=4), 4, 3, torch.tensor(3), 4),
    lambda rows: triton_router._forward(float32(6, 4), None, "sigmoid", 2, True, 1.0, 2, 1, 2),
    lambda rows: rows_triton._spread(rows(6, 8), numbers(12, below=12).int(), 12, 2, None),
    lambda rows: rows_triton._combine(
        rows(12, 8), numbers(12, below=12).int(), leaf(6, 2), numbers(12, below=2).bool()
    ),
    lambda rows: scanned(decay, rows, True, None, None),
    lambda rows: scanned(decay, rows, False, leaf(2, 20, 2), leaf(2)),
    lambda rows: scanned(decay_vector, rows, True, channels=(16,)),
    lambda rows: rope._forward(rows(2, 6, 2, 8), torch.randn(2, 6, 1, 4), torch.randn(2, 6, 1, 4), leaf(8), 1e-5),
    lambda rows: convolution._forward(rows(2, 9, 8), leaf(8, 4), leaf(8), None, None, True),
    lambda rows: convolution._forward(rows(2, 9, 8), leaf(8, 4), leaf(8), None, rows(2, 3, 8), True),
    lambda rows: chosen(rows, rows(2, 30, 2, 16)),
    lambda rows: chosen(rows, None),
    multiplied,
    lambda rows: fed_by_codes(rows, counts=True, weight_gradient="same"),
    lambda rows: fed_by_codes(rows, counts=False, weight_gradient="bf16"),
    lambda rows: fed_by_codes(rows, counts=True, weight_gradient="same", activation="squared_relu", saved="fp8"),
    packed,
    partial(multiplied, name="mxfp8"),
    partial(multiplied, name="nvfp4"),
    lambda rows: fed_by_codes(rows, counts=True, weight_gradient="same", name="nvfp4"),
)
HAS_COMPILER = refuse_native(torch.device("cpu")) is None
TORCH = (
    *((mixed_natively,) if HAS_COMPILER else ()),
    lambda rows: diagonal(diag_torch, rows),
    lambda rows: loss_torch._forward(rows(6, 8), leaf(10, 8), numbers(6, below=10), -100, 0.1, True),
    lambda rows: loss_torch._statistics(rows(6, 8), leaf(10, 8), numbers(6, below=10), 0),
    fed_by_torch,
    lambda rows: convolution_torch._forward(rows(2, 9, 8), leaf(8, 4), leaf(8), None, False),
)


def differentiate(call, rows):
    """Call an operation and take the gradients of all its results that have any."""
    found = call(rows)
    results = [found] if isinstance(found, Tensor) else list(found)
    if differentiable := [result for result in results if result.requires_grad]:
        torch.autograd.backward(differentiable, [torch.ones_like(result) for result in differentiable])


def registered():
    """Names of all operations in our files; the files that make some are imported."""
    for folder, *package in ROOMS:
        for path in (ROOT / folder).rglob("*.py"):
            if "library.custom_op(" in path.read_text(encoding="utf-8"):
                importlib.import_module(".".join((*package, *path.relative_to(ROOT / folder).with_suffix("").parts)))
    ours = {package for _, package, *_ in ROOMS}
    return {name for name, made in list(OPDEFS.items()) if made._init_fn.__module__.partition(".")[0] in ours}


def test_fake_functions_of_all_operations_say_what_the_bodies_give(monkeypatch):
    """With rows as parts of projections have them: a fake function that is wrong of contiguous rows is wrong of these."""
    compare_all(monkeypatch, apart)


@pytest.mark.slow
def test_fake_functions_of_all_operations_say_what_the_bodies_give_of_contiguous_rows(monkeypatch):
    """Quick, of rows with others' values between them: the test above."""
    compare_all(monkeypatch, leaf)


def compare_all(monkeypatch, rows):
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "__getitem__", lambda kernel, grid: lambda *_, **__: None)
    torch.manual_seed(0)
    with Compared() as compared:
        for call in TORCH:
            differentiate(call, rows)
        with FakeTensorMode(), compared:
            for call in TRITON:
                differentiate(call, rows)
    assert compared.runner.mismatches == {}
    seen = {name.removesuffix(".default").replace(".", "::") for name in compared.runner.compared}
    assert seen == {name for name in registered() if HAS_COMPILER or "_native" not in name}


def test_a_fake_function_that_says_something_else_is_found():
    runner = BodyRunner()
    runner.compare("amfm.wrong", torch.empty(2, 3), torch.empty(3, 2).t())
    assert "strides (3, 1)" in runner.mismatches["amfm.wrong[0]"]
