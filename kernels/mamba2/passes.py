"""The passes of Mamba2's mixer over rows, out of the kernels of its parts: of whole rows and of segments of rows alike.

Gradients of z, x, B, C and dt are written where they are in the gradient of the projection, so that nothing is copied together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.causal_conv1d.triton_impl import convolve_rows, convolve_rows_backward
from amfm.kernels.common.custom_op import is_accumulated
from amfm.kernels.common.tiles import sum_first, sum_parts
from amfm.kernels.common.weight_gradients import add_outer
from amfm.kernels.decay_scan.triton_impl import (
    DecayLaunch,
    Gates,
    find_gradients,
    walk,
    walk_back,
    walk_to_end,
    walk_to_start,
)
from amfm.kernels.linear.op import linear
from amfm.kernels.mamba2.rank_part import MixerSizes
from amfm.kernels.norm.triton_impl import norm_rows, norm_rows_backward


@dataclass(frozen=True)
class Rows:
    """Rows of the projection [B, T, X] with what the scan's kernels read: the convolved channels [B, T, C] and the gates.

    `starts` [B, T], where documents begin; `initial` [B, H, N, P], the states that enter the rows; None: one document, zeros.
    """

    projected: Tensor
    convolved: Tensor
    A_log: Tensor
    dt_bias: Tensor
    starts: Tensor | None
    sizes: MixerSizes
    chunk_size: int
    initial: Tensor | None = None

    @classmethod
    def of(
        cls,
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        A_log: Tensor,
        dt_bias: Tensor,
        starts: Tensor | None,
        sizes: MixerSizes,
        chunk_size: int,
        window: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> Rows:
        """Rows of a projection, x, B and C after convolution and SiLU; they begin after a window of inputs or zeros."""
        _, inputs, _ = projected.split(sizes.parts(), dim=-1)
        convolved = convolve_rows(inputs, conv_weight, conv_bias, starts, window)
        return cls(projected, convolved, A_log, dt_bias, starts, sizes, chunk_size, initial)

    @property
    def z(self) -> Tensor:
        """The norm's gate, [B, T, I]."""
        return self.projected[..., : self.sizes.inner]

    @property
    def gates(self) -> Gates:
        """dt as it is in the projection, with A_log and bias."""
        return Gates(self.projected[..., -self.sizes.heads :], None, self.A_log, self.dt_bias)

    @property
    def launch(self) -> DecayLaunch:
        """Sizes and cut of the scan."""
        x, _, C = self.sizes.split(self.convolved)
        return DecayLaunch.of(C, x, self.chunk_size, 0)

    def mix(
        self, D: Tensor, norm_weight: Tensor, out_weight: Tensor | None, keep_states: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, the norm's r, and what is empty unless kept: y before the norm [B, T, I], the states that enter chunks."""
        entering = self.launch.chunk_states(self.projected) if keep_states else None
        y, sizes = self.scan(D, entering), self.sizes
        normed, _, reciprocal = norm_rows(y, self.z, norm_weight, sizes.epsilon, sizes.norm_groups, gated=True)
        out = normed if out_weight is None else linear(normed, out_weight)
        return out, reciprocal, *((y.new_empty(0), y.new_empty(0)) if entering is None else (y, entering))

    def recompute(self, D: Tensor, y: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
        """y and the states that enter chunks, made again where `mix` kept none."""
        if entering.numel():
            return y, entering
        entering = self.launch.chunk_states(self.projected)
        return self.scan(D, entering), entering

    def scan(self, D: Tensor, entering: Tensor | None) -> Tensor:
        """y [B, T, I], the scan's results; writes the states that enter chunks if there is room for them."""
        x, B, C = self.sizes.split(self.convolved)
        y = self.projected.new_empty(*self.projected.shape[:2], self.sizes.inner)
        walk(self.launch, C, B, x, self.gates, D, self.starts, self.initial, y, entering)
        return y

    def leaving(self) -> tuple[Tensor, Tensor]:
        """States after rows that begin from zero, [B, H, N, P], and the factors by which rows pass others on, [B, H]."""
        x, B, C = self.sizes.split(self.convolved)
        return walk_to_end(self.launch, C, B, x, self.gates, self.starts)

    def leaving_back(self, d_y: Tensor) -> Tensor:
        """Gradient of the states that enter rows, [B, H, N, P], if nothing reads those that leave them."""
        _, _, C = self.sizes.split(self.convolved)
        d_y = d_y.unflatten(-1, (self.sizes.heads, -1))
        return walk_to_start(self.launch, C, self.gates, self.starts, d_y)

    def norm_back(
        self,
        d_out: Tensor,
        y: Tensor,
        reciprocal: Tensor,
        norm_weight: Tensor,
        out_weight: Tensor | None,
        d_projected: Tensor,
        out_weight_sum: Tensor | None,
        out_weight_adds: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the output back to y: gradients of y, and of the norm's and the output's weights; writes that of z.

        That of the output's weight is empty if it lands in its sum or there is no such weight.
        """
        d_out = d_out.contiguous()
        d_normed = d_out if out_weight is None else linear(d_out, out_weight.t())
        d_y, normed = torch.empty_like(y), torch.empty_like(y)
        d_z = d_projected[..., : self.sizes.inner]
        d_norm_weight = norm_rows_backward(d_normed, None, y, self.z, norm_weight, reciprocal, d_y, d_z, normed)
        del d_normed
        if out_weight is None:
            d_out_weight = d_out.new_empty(0)
        elif out_weight_sum is None:
            d_out_weight = linear(d_out.flatten(0, -2).t(), normed.flatten(0, -2).t()).to(out_weight.dtype)
        else:
            add_outer(out_weight_sum, out_weight_adds, d_out.flatten(0, -2), normed.flatten(0, -2))
            d_out_weight = out_weight.new_empty(0)
        return d_y, d_norm_weight, d_out_weight

    def scan_back(
        self,
        D: Tensor,
        entering: Tensor,
        d_y: Tensor,
        d_final: Tensor | None,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        window: Tensor | None,
        d_projected: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From y back to the projection: the convolution's weight and bias as one, A_log, dt_bias and D [3, H], the window.

        Writes the gradients of x, B, C and dt.
        """
        sizes, launch = self.sizes, self.launch
        x, B, C = sizes.split(self.convolved)
        d_y = d_y.view(x.shape)
        _, inputs, _ = self.projected.split(sizes.parts(), dim=-1)
        _, d_inputs, d_dt = d_projected.split(sizes.parts(), dim=-1)
        leaving, _ = walk_back(launch, C, self.gates, self.starts, d_y, d_final)
        d_convolved = torch.empty_like(self.convolved)
        d_x, d_B, d_C = sizes.split(d_convolved)
        # Several programs share a group's heads: their parts are added in float32, B and C at once, because they are neighbours.
        shape = launch.splits, *B.shape[:2], 2, *B.shape[2:]
        parts = None if launch.splits == 1 else d_y.new_empty(shape, dtype=torch.float32)
        into_B, into_C = (d_B[None], d_C[None]) if parts is None else parts.unbind(3)
        states = (entering, leaving)
        d_heads = find_gradients(
            launch, C, B, x, self.gates, D, self.starts, states, d_y, into_C, into_B, d_x, d_dt, None
        )
        if parts is not None:
            shared = d_convolved.flatten(0, 1)[:, sizes.inner :]
            sum_parts(parts.view(launch.splits, len(shared), -1), shared)
        d_taps, d_window = convolve_rows_backward(
            d_convolved, inputs, conv_weight, conv_bias, self.starts, d_inputs, window
        )
        return d_taps, sum_first(d_heads, self.A_log.dtype), d_window


def fake_sizes(given: Any) -> tuple[MixerSizes, int, int, tuple[int, ...]]:
    """Sizes, rows, tokens and the shape of the states that enter chunks, by an operation's arguments."""
    sizes, (rows, tokens, _) = MixerSizes.of(given.numbers, given.epsilon), given.projected.shape
    chunks = (tokens + given.chunk_size - 1) // given.chunk_size
    return sizes, rows, tokens, (rows, chunks, sizes.heads, sizes.state, sizes.head_dim)


def mixed_like(given: Any) -> tuple[Tensor, ...]:
    """Fake results of `Rows.mix`, by an operation's arguments."""
    (sizes, rows, tokens, states), projected = fake_sizes(given), given.projected
    return (
        projected.new_empty(rows, tokens, sizes.inner if given.out_weight is None else len(given.out_weight)),
        projected.new_empty(rows * tokens, sizes.norm_groups, dtype=torch.float32),
        projected.new_empty((rows, tokens, sizes.inner) if given.keep_states else (0,)),
        projected.new_empty(states if given.keep_states else (0,)),
    )


def norm_gradients_like(given: Any) -> tuple[Tensor, Tensor]:
    """Fake gradients of the norm's weight and of the output's."""
    out, weight = given.out_weight, given.norm_weight
    shape = (0,) if out is None or is_accumulated(given, "out_weight") else out.shape
    return weight.new_empty(weight.shape), (weight if out is None else out).new_empty(shape)


def scan_gradients_like(given: Any) -> tuple[Tensor, Tensor]:
    """Fake gradients of the convolution's weight and bias as one, and of A_log, dt_bias and D."""
    weight, A_log = given.conv_weight, given.A_log
    return weight.new_empty(weight.numel() + len(weight)), A_log.new_empty(3, len(A_log))


def split_heads(sums: Tensor, D: Tensor, dt_bias: Tensor) -> dict[str, Tensor]:
    """Gradients of A_log, D and dt_bias by name, out of `Rows.scan_back`'s."""
    d_A_log, d_dt_bias, d_D = sums.unbind(0)
    return {"A_log": d_A_log, "D": d_D.to(D.dtype), "dt_bias": d_dt_bias.to(dt_bias.dtype)}
