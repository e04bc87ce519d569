"""Delta mixers as one operation, from their projections to their output: on the Triton backend, whole rows and segments of rows."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from amfm.kernels.delta_block.op import DeltaSizes, delta_mix
from amfm.model.mixers.base import LinearMixer
from amfm.model.mixers.shared_layers import GatedHeadNorm
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import SegmentExchange


class DeltaBlock(LinearMixer):
    """A linear mixer on the delta rule that may run as one operation (kernels/delta_block), which keeps less for backward.

    The parts run in turn on the torch backend, for decode states, without a convolution, under LoRA, and in classes of
    packages, which may change any part.
    """

    norm: GatedHeadNorm

    @abstractmethod
    def delta_sizes(self) -> DeltaSizes:
        """Sizes and forms of this rank's part, as the operation takes them."""

    def gates_apart(self, whole_BTX: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Raw numbers of decay and output gate that in_proj does not give."""
        return None, None

    def at_once(self, cut_BTX: Tensor, whole_BTX: Tensor | None, meta: PackMeta) -> Tensor | None:
        """As in the base class."""
        is_own = type(self).__module__.startswith("amfm.model.mixers.")
        if self.build.backend != "triton" or self.conv is None or self.out_proj.lora is not None or not is_own:
            return None
        decay_BTX, gate_BTI = self.gates_apart(whole_BTX)
        starts_BT, exchange, segments = meta.document_starts_BT(), None, meta.segments
        projected_BTX = cut_BTX
        if segments is not None:
            exchange = SegmentExchange(segments, self.build.groups)
            projected_BTX = segments.as_rows(cut_BTX)
            decay_BTX, gate_BTI, starts_BT = (
                None if x is None else segments.as_rows(x) for x in (decay_BTX, gate_BTI, starts_BT)
            )
        mixed_BTD = delta_mix(
            projected_BTX,
            self.conv.weight,
            getattr(self, "A_log", None),
            getattr(self, "dt_bias", None),
            self.norm.weight,
            self.out_proj.weight,
            self.delta_sizes(),
            decay_BTX=decay_BTX,
            gate_BTI=gate_BTI,
            document_starts_BT=starts_BT,
            chunk_size=self.options.chunk_size,
            exchange=exchange,
            backend=self.build.backend,
        )
        return mixed_BTD.view(*cut_BTX.shape[:2], -1)
