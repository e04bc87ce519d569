"""Numbers that are further apart than 2^31 others are read where they are: products of offsets are 64 bits wide.

Inputs of every operation are views whose rows, tokens or experts lie 2^31 numbers apart over memory that is hardly touched; results
and gradients have the bits of packed ones. What kernels allocate themselves is packed and small here, so for offsets into
it what counts is that they are computed in 64 bits (`offsets.py`). Both go over all cases, and each kernel must be among them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.attention.op import attention
from amfm.kernels.cases import Problem, Sized, evaluate
from amfm.kernels.causal_conv1d.op import causal_conv1d
from amfm.kernels.common.inputs import check_matrix
from amfm.kernels.common.scan_launch import pass_states
from amfm.kernels.decay_scan.op import mamba2_scan
from amfm.kernels.mamba2.case import mixer_problem
from amfm.kernels.norm.op import gated_rms_norm, rms_norm
from amfm.kernels.sparse_attention.case import chosen_problem
from amfm.kernels.swiglu.op import swiglu
from benchmarks.kernels.operations import OPERATIONS
from tests.helpers.numbers import assert_bitwise
from tests.kernels.watch.offsets import FAR, OffsetWatch, watch_offsets

# Places and strides of rows and of tokens; each on its own fits 32 bits. Tokens of a tile may be 2^24 numbers apart, and no more.
PLACES, STRIDES = (3, 136), (2**30, 2**24)
DTYPE = torch.float16  # the narrowest that all take
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_races() -> None:
    """In place of what watches each number of memory, which is far too much here."""


def far(values: Tensor, dim: int, stride: int) -> Tensor:
    """The same values with this dim's places so far apart; memory that nothing touches costs none."""
    strides = list(values.stride())
    strides[dim] = stride
    memory = torch.empty(values.shape[dim] * stride, dtype=values.dtype, device=values.device)
    return memory.as_strided(values.shape, strides).copy_(values)


def scan(x_BTHP: Tensor) -> Tensor:
    dt_BTH, A_H = x_BTHP[..., 0].contiguous(), torch.zeros(2)
    B_BTGN = x_BTHP[:, :, :1].contiguous()
    return mamba2_scan(x_BTHP, dt_BTH, A_H, B_BTGN, B_BTGN, A_H + 1, A_H, chunk_size=16, backend="triton").y_BTHP


def convolve(x_BTHP: Tensor) -> Tensor:
    return causal_conv1d(x_BTHP.flatten(2), torch.ones(8, 4, dtype=DTYPE), None, backend="triton")


def attend(x_BTHP: Tensor) -> Tensor:
    return attention(x_BTHP, x_BTHP, x_BTHP, backend="triton")


def norm(x_BTHP: Tensor) -> Tensor:
    return rms_norm(x_BTHP.flatten(2), torch.ones(8, dtype=DTYPE), 1e-5, backend="triton")


def gated_norm(x_BTHP: Tensor) -> Tensor:
    wide = x_BTHP.flatten(2)
    return gated_rms_norm(wide, wide, torch.ones(8, dtype=DTYPE), 1e-5, backend="triton")


def gate(x_BTHP: Tensor) -> Tensor:
    return swiglu(x_BTHP.flatten(2), backend="triton")


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "tokens"])
@pytest.mark.parametrize("operation", [scan, convolve, attend, norm, gated_norm, gate], ids=lambda each: each.__name__)
def test_what_lies_beyond_32_bits_is_read_where_it_lies(operation: Callable[[Tensor], Tensor], dim: int) -> None:
    shape = (PLACES[0], 2, 2, 4) if dim == 0 else (1, PLACES[1], 2, 4)
    x_BTHP = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    assert torch.equal(operation(far(x_BTHP, dim, STRIDES[dim])), operation(x_BTHP))


@triton.jit
def _copy_rows_kernel(x, y, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y + row * BLOCK + column, tl.load(x + row * stride + column))


@pytest.mark.parametrize("wide", [True, False])
def test_a_product_of_32_bits_on_the_way_to_an_address_is_found(wide: bool) -> None:
    x, y = torch.randn(200, 16), torch.empty(200, 16)
    with watch_offsets() as watch:
        _copy_rows_kernel[(200,)](x, y, 16, WIDE=wide, BLOCK=16)
    assert torch.equal(x, y), "the interpreter on its own shows nothing"
    assert {each.place.partition(":")[0] for each in watch.narrow} == (
        set() if wide else {"interpreter/test_far_apart.py"}
    )


def test_a_matrix_whose_places_32_bits_do_not_hold_is_refused() -> None:
    check_matrix("up_EFD", torch.empty(2, 2**16, 2**15 - 1, device="meta"))
    with pytest.raises(ValueError, match=r"up_EFD has a matrix of 65536 x 32768 numbers"):
        check_matrix("up_EFD", torch.empty(2, 2**16, 2**15, device="meta"))


# Operations with tiles of many tokens, whose places inside a tile are 32 bits wide: 128 tokens of 2^24 numbers each, and no more.
TILED = ("attention", "block_scaled", "decay_scan", "decay_scan_vector", "delta_scan", "low_precision", "mamba2", "moe")


def spread(operation: str, trial: Problem) -> Problem:
    """The trial with every input far apart that has several places in a dimension before its last, in the first such."""
    leaves = {}
    for name, leaf in trial.leaves.items():
        dim = next((dim for dim, length in enumerate(leaf.shape[:-1]) if length > 1), None)
        if dim is None:
            leaves[name] = leaf
            continue
        # The last place is behind what 32 bits hold; even, as strides of projections are.
        stride = -(-FAR // (leaf.shape[dim] - 1) // 16) * 16
        is_matrix = dim == 0 and leaf.dim() > 2  # of an expert, or a row
        if operation in TILED and not is_matrix:
            stride = min(stride, STRIDES[1])
        leaves[name] = far(leaf.detach(), dim, stride).requires_grad_()
    return Problem(leaves, trial.run, sums=trial.sums, exact=trial.exact)


WATCHED: dict[str, OffsetWatch] = {}
QUICK = ("rope", "router")
# Smaller than the operation's own trials, which take minutes in the interpreter: fewer heads and channels for the same kernels.
# Of a mixer the projection is one input, which slices of its parts read where they are.
_CHOSEN = partial(chosen_problem, has_loss=True, tokens=21, top_k=9, lengths=(8, 1, 12), heads=4)
_MIXER = partial(mixer_problem, heads=2, model=24, head_dim=16, state=16, chunk=16, whole=True)
SMALLER = {
    "sparse_attention": (
        Sized("grouped queries with documents", "small", partial(_CHOSEN, kv_heads=2, size=20)),
        Sized("latents with documents", "small", partial(_CHOSEN, kv_heads=1, size=28, value_size=20)),
    ),
    "mamba2": (
        Sized("two rows with documents", "small", partial(_MIXER, tokens=37, groups=2, rows=2, lengths=(3, 30, 4))),
        Sized("states made again", "small", partial(_MIXER, tokens=37, keep=False)),
        Sized("two segments", "small", partial(_MIXER, tokens=38, segments=2, lengths=(10, 17, 11), keep=False)),
    ),
}


def watch_trials(operation: str) -> OffsetWatch:
    """Run an operation's trials, forward and backward, packed and far apart; the bits are the same."""
    if operation not in WATCHED:
        with watch_offsets() as watch:
            for sized in SMALLER.get(operation) or OPERATIONS[operation].trials_of({"first", "small"}):
                compare_far(operation, sized)
        WATCHED[operation] = watch
    return WATCHED[operation]


def compare_far(operation: str, sized: Sized) -> None:
    trial = sized.make(CPU, torch.float32)
    packed = evaluate(trial, "triton").values
    for name, value in evaluate(spread(operation, trial), "triton").values.items():
        assert_bitwise(value, packed[name], f"{sized.name}: {name}")


# Places that 32 bits hold whatever the number of tokens. Inside one matrix of a weight, which `check_matrix` bounds:
IN_A_MATRIX = {
    "low_precision/scaled_products.py:scaled_product_kernel", "low_precision/triton_kernels.py:multiply_codes",
    "low_precision/triton_kernels.py:quantize_weight_kernel", "moe/triton_kernels.py:_multiply",
    "moe/triton_kernels.py:_multiply_twice", "moe/triton_kernels.py:up_kernel",
}  # fmt: skip
# Inside a tile of 128 rows or codes, the state of a head, or a program's own buffer.
IN_A_TILE = {
    "low_precision/triton_kernels.py:fp8_outer_kernel", "low_precision/triton_kernels.py:store_column_codes",
    "low_precision/triton_kernels.py:store_row_codes", "moe/triton_epilogues.py:_load_hidden", "moe/triton_epilogues.py:_open",
    "delta_scan/triton_backward.py:gradients_kernel", "delta_scan/triton_forward.py:load_steps",
    "diag_scan/triton_impl.py:diag_backward_kernel",
}  # fmt: skip
# A loop from a 64-bit start: its places are as wide when compiled, and integers of Python, which become 32 bits, when interpreted.
IN_A_LOOP = {"sparse_attention/triton_kernels.py:sum_pairs_kernel"}


@pytest.mark.parametrize(
    "operation",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in OPERATIONS],
)
def test_inputs_far_apart_give_the_same_bits_and_no_offset_is_narrow(operation: str) -> None:
    found = watch_trials(operation).narrow
    assert [each for each in found if each.place not in IN_A_MATRIX | IN_A_TILE | IN_A_LOOP] == []


# Reads by descriptors, whose coordinates are indices and whose addresses the GPU's own unit makes; chosen by tuning only.
BY_DESCRIPTORS = {"persistent_product_kernel"}


@pytest.mark.slow
def test_every_kernel_is_among_them() -> None:
    with watch_offsets() as segments:  # where rows and heads do not fill a GPU
        pass_states(None, torch.randn(2, 3, 2, 16, 16), torch.rand(2, 3, 2), backward=False)
    assert segments.narrow == []
    paths = (path for folder in ("kernels", "examples/mixers/amfm_mixers") for path in (ROOT / folder).rglob("*.py"))
    files = [path for path in paths if "import triton.language as tl" in path.read_text()]
    kernels = {
        node.name
        for path in files
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list and node.name.endswith("_kernel")
    }
    watched = [segments, *map(watch_trials, OPERATIONS)]
    assert kernels - set().union(*(watch.seen for watch in watched)) == BY_DESCRIPTORS
