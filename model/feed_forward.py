"""Dense feed-forward: SwiGLU (Shazeer 2020, arXiv 2002.05202) and other gated units, squared ReLU (So et al. 2021, arXiv 2109.08668), GELU.

The inner width is cut over the tensor ranks, column-parallel up and row-parallel down (Shoeybi et al. 2019, arXiv
1909.08053, section 3): the activation is pointwise, so a block needs one collective where it is entered and one where it
is left. SwiGLU's gate and up matrices are stacked in one weight and multiplied at once; each rank holds a slice of both,
in the order gate rows, then up rows. The same module is the shared expert of an MoE block. Its matrices may be products
of two factors instead (structured.py).
"""

from __future__ import annotations

from torch import Tensor, nn

from amfm.kernels.linear.activated import activated_linear, keeps_codes
from amfm.kernels.swiglu.gate import find_gate, name_activation
from amfm.kernels.swiglu.op import plain_unit, swiglu
from amfm.model.config.core_options import FeedForwardConfig
from amfm.model.config.schema import GuideConfig
from amfm.model.config.structure import DENSE, Activation, Structure, matrices_of
from amfm.model.mixers.interface import BlockState, BuildContext, Mixer, MixerOutput
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import ColumnLinear, RowLinear, add_bias
from amfm.model.parallel.regions import leave_tensor_region, project_stream
from amfm.model.structured import StructuredDown, StructuredUp


def up_segments(hidden_size: int, activation: Activation) -> tuple[int, ...]:
    """Row counts of the matrices stacked in an up projection: gate and up for gated units, only up for plain ones."""
    return (hidden_size,) * (matrices_of(activation) - 1)


class FeedForward(nn.Module):
    """down(activation(up(x))); the inner width is sharded over the tensor-parallel ranks.

    `name` is the setting of the inner width, for the error if the ranks do not divide it; limit: of gate and up; bias: of dense matrices. Every rank of `groups.tp` must
    call it.
    """

    def __init__(
        self,
        outer_size: int,
        inner_size: int,
        activation: Activation,
        groups: ProcessGroupCollection,
        *,
        name: str,
        backend: str,
        limit: float | None = None,
        structure: Structure = DENSE,
        guide: GuideConfig | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.unit, self.backend, self.groups = find_gate(name_activation(activation, limit)), backend, groups
        self.activation = activation
        segments = up_segments(inner_size, activation)
        self.up_proj: ColumnLinear | StructuredUp
        self.down_proj: RowLinear | StructuredDown
        if structure.kind == "dense":
            self.up_proj = ColumnLinear(outer_size, segments, groups, name=name, bias=bias)
            self.down_proj = RowLinear(inner_size, outer_size, groups, name=name, bias=bias)
        else:
            self.up_proj = StructuredUp(outer_size, segments, structure, groups, name=name, guide=guide)
            self.down_proj = StructuredDown(inner_size, (outer_size,), structure, groups, name=name, guide=guide)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream x [B, T, D] -> [B, T, D]; under sequence parallelism T is this rank's share, in and out."""
        return self.project_down(self.project_up(x))

    def project_up(self, x: Tensor) -> Tensor:
        """The first half: the residual stream x [B, T, D] -> inner rows of all tokens, before the activation, this rank's width."""
        if isinstance(self.up_proj, StructuredUp):
            return self.up_proj.from_stream(x)
        (inner,) = project_stream(x, [self.up_proj.weight], self.groups)
        return add_bias(inner, self.up_proj.bias)

    def project_down(self, inner: Tensor) -> Tensor:
        """The second half: activation and down projection of inner rows, back to the residual stream [B, T, D]."""
        if isinstance(self.down_proj, StructuredDown):
            return self.down_proj.to_stream(self._activate(inner))
        if keeps_codes(self.down_proj.weight):
            part = activated_linear(inner, self.down_proj.weight, self._activate, backend=self.backend)
            return add_bias(leave_tensor_region(part, self.groups), self.down_proj.bias)
        return self.down_proj.leave(self._activate(inner), self.groups)

    def _activate(self, inner: Tensor) -> Tensor:
        """The activation of inner rows."""
        if self.unit is None:
            return plain_unit(inner, self.activation, backend=self.backend)
        return swiglu(inner, self.unit, backend=self.backend)


class FeedForwardMixer(FeedForward, Mixer):
    """The mixer of a dense feed-forward block."""

    is_graphable = True

    def __init__(self, options: FeedForwardConfig, build: BuildContext) -> None:
        super().__init__(
            build.hidden_size,
            options.hidden_size,
            options.activation,
            build.groups,
            name="model.feed_forward.hidden_size",
            backend=build.backend,
            limit=options.activation_limit,
            structure=options.structure(),
            guide=build.guide,
            bias=options.bias,
        )

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:  # type: ignore[override]
        """Mix x [B, T, D] -> y [B, T, D], each token on its own."""
        return MixerOutput(super().forward(x_BTD))
