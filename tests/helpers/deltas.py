"""Inputs of the delta rule's tests, and one call of it with all its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.delta_scan.op import DeltaScanOutput, delta_scan


@dataclass(frozen=True)
class DeltaCase:
    """Sizes of one scan: B rows, T tokens of N steps, G key heads and H value heads, state K x V."""

    B: int = 2
    T: int = 63
    N: int = 1
    G: int = 2
    H: int = 4
    K: int = 8
    V: int = 12
    chunk: int = 32
    lengths: tuple[int, ...] = ()  # of the documents in row 0; the other rows hold them in reverse
    initial: bool = False
    gated: bool = True
    channels: bool = False  # a gate of each key channel
    transfer: bool = False
    erases: bool = False  # by a vector of its own, not the key; with channels

    def __str__(self) -> str:
        flags = f"docs{len(self.lengths)}-init{int(self.initial)}-gate{int(self.gated) + int(self.channels)}-transfer{int(self.transfer)}"
        return f"T{self.T}-N{self.N}-G{self.G}-H{self.H}-{flags}{'-erase' * self.erases}"


@dataclass(frozen=True)
class DeltaInputs:
    """Tensors of one call; gates, initial state and documents may be absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    initial: Tensor | None
    documents: Tensor | None
    erase: Tensor | None = None

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get gradients, by name."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "beta", "g", "erase", "initial")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def cut(self, start: int, end: int, initial: Tensor | None = None) -> DeltaInputs:
        """Tokens start to end, entered by another state."""
        q, k, v, beta = (tensor[:, start:end] for tensor in (self.q, self.k, self.v, self.beta))
        g, documents, erase = (
            None if tensor is None else tensor[:, start:end] for tensor in (self.g, self.documents, self.erase)
        )
        return DeltaInputs(q, k, v, beta, g, initial, documents, erase)


def make_delta_documents(case: DeltaCase) -> Tensor | None:
    """Ids [B, T] of documents of the case's lengths; the last one is filled up or cut to T."""
    if not case.lengths:
        return None
    rows = []
    for b in range(case.B):
        lengths = case.lengths if b == 0 else case.lengths[::-1]
        ids = [i for i, length in enumerate(lengths) for _ in range(length)]
        rows.append((ids + [len(lengths) - 1] * case.T)[: case.T])
    return torch.tensor(rows, dtype=torch.int32)


def make_delta_inputs(case: DeltaCase, dtype: torch.dtype, seed: int = 0) -> DeltaInputs:
    """Keys of length 1, beta in (0, 2), decays of a fifth a token; drawn in float64, so that all dtypes round the same."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, T, N, G, H, K, V = case.B, case.T, case.N, case.G, case.H, case.K, case.V
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = draw(B, T, G, K), F.normalize(draw(B, T, N, G, K), dim=-1), draw(B, T, N, H, V)
    gates = (B, T, H, K) if case.channels else (B, T, H)
    beta, g, initial = 2 * torch.sigmoid(draw(B, T, N, H)), -0.2 * draw(*gates).abs(), draw(B, H, K, V)
    # Of each channel of the key a share, as a gate gives it.
    erase = k[:, :, 0] * torch.sigmoid(draw(B, T, G, K)) if case.erases else None
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    return DeltaInputs(
        q,
        k,
        v,
        beta.to(wide).requires_grad_(),
        g.to(wide).requires_grad_() if case.gated else None,
        initial.to(wide).requires_grad_() if case.initial else None,
        make_delta_documents(case),
        None if erase is None else erase.to(dtype).requires_grad_(),
    )


def call_delta(case: DeltaCase, inputs: DeltaInputs, backend: str) -> DeltaScanOutput:
    """One call with the case's chunk size, with or without the transfer."""
    return delta_scan(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.beta,
        inputs.g,
        erase_BTHK=inputs.erase,
        document_ids_BT=inputs.documents,
        initial_state_BHKV=inputs.initial,
        chunk_size=case.chunk,
        with_transfer=case.transfer,
        backend=backend,
    )


def run_delta(
    case: DeltaCase, inputs: DeltaInputs, backend: str, weights: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs, and the gradients of their sum weighted by random numbers (or those given for an output), by name."""
    output = call_delta(case, inputs, backend)
    values = {
        name: value for name, value in zip(("o", "final", "read", "transfer"), output, strict=True) if value is not None
    }
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for name, value in values.items():
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if weights is not None and name in weights:
            weight = weights[name]
        total = total + (value.double() * weight).sum()
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return values | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
