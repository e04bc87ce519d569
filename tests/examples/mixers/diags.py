"""Inputs of the tests of the elementwise scan, and one call of it with all its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from amfm_mixers.diag_scan.op import diag_scan
from torch import Tensor

from tests.helpers.scans import ScanCase, make_documents

NAMES = ("x", "dt", "A_log", "B", "C", "D", "dt_bias")


@dataclass(frozen=True)
class DiagCase:
    """Sizes of one scan: B rows, T tokens, C channels, N state numbers, documents as in `ScanCase`."""

    B: int = 2
    T: int = 63
    C: int = 6
    N: int = 5
    chunk: int = 16
    lengths: tuple[int, ...] = ()
    initial: bool = False

    def __str__(self) -> str:
        return f"B{self.B}-T{self.T}-C{self.C}-N{self.N}-docs{len(self.lengths)}-init{int(self.initial)}"


def make(case: DiagCase, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Arguments of the scan by name, drawn in float64 so that all dtypes round the same numbers."""
    generator = torch.Generator().manual_seed(0)
    B, T, C, N = case.B, case.T, case.C, case.N
    shapes = ((B, T, C), (B, T, C), (C, N), (B, T, N), (B, T, N), (C,), (C,))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Tensor | None] = {}
    for name, shape in zip(NAMES, shapes):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        drawn = {"dt_bias": drawn - 1.0, "A_log": drawn * 0.5}.get(name, drawn)
        arguments[name] = drawn.to(wide if name in ("A_log", "D", "dt_bias") else dtype).requires_grad_()
    state = torch.randn(B, C, N, generator=generator, dtype=torch.float64).to(wide)
    arguments["initial"] = state.requires_grad_() if case.initial else None
    arguments["documents"] = make_documents(ScanCase(B=B, T=T, lengths=case.lengths))
    return arguments


def call(
    arguments: dict[str, Tensor | None],
    case: DiagCase,
    backend: str = "torch",
    scan: Callable[..., tuple[Tensor, ...]] = diag_scan,
) -> tuple[Tensor, ...]:
    return scan(
        *(arguments[name] for name in NAMES),
        document_ids_BT=arguments["documents"],
        initial_state_BCN=arguments["initial"],
        chunk_size=case.chunk,
        backend=backend,
    )


def run(
    arguments: dict[str, Tensor | None],
    case: DiagCase,
    backend: str = "torch",
    scan: Callable[..., tuple[Tensor, ...]] = diag_scan,
) -> dict[str, Tensor]:
    """Outputs of the scan, and the gradients of their sum with random weights, by name."""
    outputs = dict(zip(("y", "final_state", "total_decay"), call(arguments, case, backend, scan)))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs.values()]
    total = sum((o.double() * w).sum() for o, w in zip(outputs.values(), weights))
    leaves = {n: t for n, t in arguments.items() if n != "documents" and t is not None}
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return outputs | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}
