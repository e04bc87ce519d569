"""Inputs of Mamba2's mixer as one operation, and one call of it with all its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.kernels.common.inputs import first_tokens
from amfm.kernels.mamba2.op import MixerSizes, mamba2_mix
from amfm.kernels.mamba2.rank_part import SegmentsInOrder
from tests.helpers.scans import ScanCase, make_documents

NAMES = ("projected", "conv_weight", "conv_bias", "A_log", "D", "dt_bias", "norm_weight", "out_weight")


@dataclass(frozen=True)
class MixerCase:
    """Sizes of one call: B sequences of T tokens, H heads of P in G groups, state N; `lengths` of documents in the first row."""

    B: int = 1
    T: int = 33
    H: int = 2
    P: int = 16
    G: int = 1
    N: int = 16
    norm_groups: int = 1
    model: int = 24
    width: int = 4
    bias: bool = True
    chunk: int = 16
    lengths: tuple[int, ...] = ()

    def sizes(self) -> MixerSizes:
        """Sizes as the operation takes them."""
        return MixerSizes(self.H, self.P, self.G, self.N, self.norm_groups, 1e-5)

    def starts(self) -> Tensor | None:
        """First tokens of documents, rows in turn forward and in reverse."""
        ids = make_documents(ScanCase(B=self.B, T=self.T, lengths=self.lengths))
        return None if ids is None else first_tokens(ids)


def make_leaves(case: MixerCase, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs whose outputs stay near 1; drawn in float64, so that all dtypes round the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
        return values.to(dtype).requires_grad_()

    sizes = case.sizes()
    leaves = {
        "projected": draw(case.B, case.T, sum(sizes.parts())),
        "conv_weight": draw(sizes.channels, case.width, scale=0.5),
        "conv_bias": draw(sizes.channels, scale=0.3),
        "A_log": draw(case.H, scale=0.5),
        "D": draw(case.H),
        "dt_bias": draw(case.H, shift=-1.0),
        "norm_weight": draw(sizes.inner, shift=1.0, scale=0.3),
        "out_weight": draw(case.model, sizes.inner, scale=sizes.inner**-0.5),
    }
    return leaves if case.bias else {name: leaf for name, leaf in leaves.items() if name != "conv_bias"}


def run_mixer(
    case: MixerCase, leaves: dict[str, Tensor], backend: str, *, keep: bool = True, segments: int = 0
) -> dict[str, Tensor]:
    """The output, and gradients of its weighted sum by name; None for one that landed elsewhere.

    segments: into how many the case's one row is cut, which then tell each other their states; 0: it is whole.
    """
    projected, *weights = (leaves.get(name) for name in NAMES)
    starts, exchange = case.starts(), None
    if segments:
        ids = torch.zeros(1, case.T, dtype=torch.int32) if starts is None else starts
        exchange = SegmentsInOrder(ids.view(segments, -1))
        starts = None if starts is None else exchange.starts()
        projected = projected.view(segments, -1, projected.shape[-1])
    out = mamba2_mix(
        projected,
        *weights,
        case.sizes(),
        document_starts_BT=starts,
        chunk_size=case.chunk,
        keep_states=keep,
        exchange=exchange,
        backend=backend,
    ).view(case.B, case.T, -1)
    shares = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    gradients = torch.autograd.grad((out.double() * shares).sum(), [*leaves.values()], allow_unused=True)
    return {"out": out} | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}
