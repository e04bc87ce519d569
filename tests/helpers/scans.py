"""Inputs of the scan tests, and one call of a scan with all its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amfm.kernels.decay_scan.op import decay_scan, mamba2_scan

# Gradients that are one value per head.
SUMS = ("d_A_log", "d_dt_bias")


@dataclass(frozen=True)
class ScanCase:
    """Sizes of one scan: B rows, T tokens, H heads of P (V), G groups, state N (K)."""

    B: int = 2
    T: int = 63
    H: int = 4
    P: int = 16
    G: int = 2
    N: int = 16
    chunk: int = 32
    lengths: tuple[int, ...] = ()  # of the documents in row 0; the other rows hold them in reverse
    initial: bool = False
    kind: str = "mamba2"  # "decay": a gate for each head; "vector": for each key channel

    def __str__(self) -> str:
        return f"{self.kind}-T{self.T}-H{self.H}-G{self.G}-docs{len(self.lengths)}-init{int(self.initial)}"


@dataclass
class ScanInputs:
    """Tensors of one call, in the order of the operation's arguments, with what its outputs are weighted by."""

    names: list[str]
    tensors: list[Tensor]
    initial: Tensor | None
    documents: Tensor | None
    weights: list[Tensor] = field(default_factory=list)


def make_documents(case: ScanCase) -> Tensor | None:
    """Ids [B, T] of documents of the case's lengths; the last one is filled up or cut to T."""
    if not case.lengths:
        return None
    rows = []
    for b in range(case.B):
        lengths = case.lengths if b == 0 else case.lengths[::-1]
        ids = [i for i, length in enumerate(lengths) for _ in range(length)]
        ids = (ids + [len(lengths) - 1] * case.T)[: case.T]
        rows.append(ids)
    return torch.tensor(rows, dtype=torch.int32)


def make_inputs(case: ScanCase, dtype: torch.dtype, seed: int = 0) -> ScanInputs:
    """Random inputs whose outputs stay near 1; drawn in float64, so that all dtypes round the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift

    B, T, H, P, G, N = case.B, case.T, case.H, case.P, case.G, case.N
    if case.kind == "mamba2":
        names = ["x", "dt", "A_log", "B", "C", "D", "dt_bias"]
        tensors = [draw(B, T, H, P), draw(B, T, H), draw(H, scale=0.5), draw(B, T, G, N, scale=N**-0.5)]
        tensors += [draw(B, T, G, N), draw(H), draw(H, shift=-1.0)]
        wide_from = (2, 5, 6)
        state, outputs = (B, H, P, N), (B, T, H, P)
    else:
        names = ["q", "k", "v", "g"]
        gate = (B, T, H, N) if case.kind == "vector" else (B, T, H)
        tensors = [draw(B, T, H, N), draw(B, T, H, N, scale=N**-0.5), draw(B, T, H, P), -draw(*gate).abs() * 0.3]
        wide_from = (3,)
        state, outputs = (B, H, N, P), (B, T, H, P)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    placed = [t.to(wide if i in wide_from else dtype).requires_grad_() for i, t in enumerate(tensors)]
    initial = draw(*state).to(wide).requires_grad_() if case.initial else None
    weights = [draw(*outputs), draw(*state), draw(B, H, N) if case.kind == "vector" else draw(B, H)]
    return ScanInputs(names, placed, initial, make_documents(case), weights)


def run_scan(
    case: ScanCase, inputs: ScanInputs, backend: str, operation: Callable[..., tuple[Tensor, ...]] | None = None
) -> dict[str, Tensor]:
    """Outputs of the operation and the gradients of their weighted sum, by name."""
    if operation is None:
        operation = mamba2_scan if case.kind == "mamba2" else decay_scan
    extra = {"initial_state_BHPN" if case.kind == "mamba2" else "initial_state_BHKV": inputs.initial}
    output = operation(
        *inputs.tensors, document_ids_BT=inputs.documents, chunk_size=case.chunk, backend=backend, **extra
    )
    total = sum((o.double() * w).sum() for o, w in zip(output, inputs.weights))
    assert isinstance(total, Tensor)
    leaves = inputs.tensors + ([inputs.initial] if inputs.initial is not None else [])
    names = inputs.names + (["initial"] if inputs.initial is not None else [])
    gradients = torch.autograd.grad(total, leaves)
    values = {"y": output[0], "final_state": output[1], "total_decay": output[2]}
    return values | {f"d_{name}": gradient for name, gradient in zip(names, gradients)}


def tolerance_of(name: str, expected: dict[str, Tensor], tolerance: float) -> float:
    """The tolerance for one of the values of `run_scan`, wider for d_A_log and d_dt_bias where they cancel.

    Each is one number per head, the sum of a gradient over all tokens: where it cancels to a tenth or less of what is
    summed it keeps fewer digits in any implementation, so its error is compared with the size of what is summed.
    """
    if name not in SUMS:
        return tolerance
    return tolerance * max(1.0, float(expected["d_dt"].norm() / expected[name].norm()))
