"""What is marked as not to be compiled is left out also where a compiled function is the first to call it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amfm.kernels.runtime.compiling import disable_compile, prepare_to_compile


@disable_compile
def left_out(x: Tensor) -> Tensor:
    return x + 1


def calls(x: Tensor) -> Tensor:
    return left_out(x)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return calls(calls(x * 2)) * 3


def test_a_marked_function_that_was_never_called_is_left_out_of_what_is_compiled() -> None:
    prepare_to_compile()
    module = Twice()
    module.compile(backend="eager")
    assert module(torch.ones(2)).tolist() == [12.0, 12.0]
