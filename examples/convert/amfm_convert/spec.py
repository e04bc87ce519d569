"""The kind of block that a conversion puts instead of softmax attention: its options and their presets; read without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from pydantic import Field

from amfm.kernels.common.limits import DECAY_LIMITS, VECTOR_GATE_LIMITS, ScanLimits
from amfm.model.config.key_mixer_options import SharedKeyOptions
from amfm.model.config.kinds import QKVO, Kind
from amfm.model.config.options import OutputGate
from amfm.model.config.rope import Llama3Stretch

Features = Literal["hedgehog", "softmax"]
DecayGate = Literal["none", "key", "learned", "channel"]
Combination = Literal["joint", "average"]
LinearPositions = Literal["none", "rotary"]


class Branches(NamedTuple):
    """The form of a window_linear mixer, with every option resolved."""

    features: Features
    gate: DecayGate
    combine: Combination
    linear_positions: LinearPositions


# By the name of `preset`.
BRANCHES = {
    "learned": Branches("hedgehog", "learned", "joint", "none"),
    "lolcats": Branches("hedgehog", "none", "joint", "rotary"),
    "liger": Branches("softmax", "key", "average", "none"),
    "lizard": Branches("hedgehog", "channel", "joint", "none"),
}


class WindowLinearOptions(SharedKeyOptions):
    """Softmax over a window and linear attention over older tokens, with the weights of softmax attention; docs/conversion.md."""

    window: int = Field(64, ge=2, description="Keys that a token's softmax sees, including its own.")
    head_dim: int = Field(64, gt=0, description="Channels per head.")
    preset: Literal["learned", "lolcats", "liger", "lizard"] = Field(
        "learned",
        description="Default of the next four fields: `learned` hedgehog, learned, joint, none; `lolcats` hedgehog, none, joint, rotary (arXiv 2410.10254); `liger` softmax, key, average, none (arXiv 2503.01496); `lizard` hedgehog, channel, joint, none, with meta_tokens, such as 4 (arXiv 2507.09025).",
    )
    features: Features | None = Field(
        None,
        description="Features of queries and keys: `hedgehog` [softmax(W x), softmax(-W x)], `softmax` of the head itself. null: the preset's.",
    )
    gate: DecayGate | None = Field(
        None,
        description="Decay of older tokens: nothing, `key` logsigmoid(k) / 16 per channel, `learned` one value per head from the input, `channel` one per feature from the input. null: the preset's.",
    )
    combine: Combination | None = Field(
        None,
        description="`joint`: one sum over window and older tokens; `average`: the window's output and that of linear attention over all tokens. null: the preset's.",
    )
    linear_positions: LinearPositions | None = Field(
        None, description="Whether features see rotated queries and keys. null: the preset's."
    )
    linear_weight: float = Field(
        0.5, gt=0, lt=1, description="Share of linear attention with combine: average; the window has the rest."
    )
    feature_size: int | None = Field(
        None, gt=0, description="Rows of a hedgehog's W, half of the features of a head; null: head_dim."
    )
    meta_tokens: int = Field(
        0, ge=0, description="Learned keys and values per head that every window also sees (Lizard, arXiv 2507.09025)."
    )
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head.")
    positions: Literal["none", "rope"] = Field(
        "none", description="`rope`: rotary positions in the window, which restart at documents."
    )
    rope_theta: float = Field(10_000.0, gt=1, description="Base of the rotary frequencies.")
    rope_fraction: float = Field(1.0, gt=0, le=1, description="Part of each head that is rotated.")
    rope_llama3: Llama3Stretch | None = Field(
        None, description="As model.attention.rope.llama3 of a teacher with scaling: llama3; null: not stretched."
    )
    softmax_scale: float | None = Field(None, gt=0, description="Of the window's scores; null: head_dim ** -0.5.")
    output_gate: OutputGate = Field(
        "none", description="Sigmoid of the input times each head's output: one gate per channel or per head."
    )
    chunk_size: int = Field(
        64, gt=0, description="Tokens per chunk of the scan; changes speed and rounding, not meaning."
    )

    def branches(self) -> Branches:
        """The form: the preset with the fields that are set."""
        preset = BRANCHES[self.preset]
        set_ones = {name: getattr(self, name) for name in preset._fields if getattr(self, name) is not None}
        return preset._replace(**set_ones)

    def fades_by_channel(self) -> bool:
        """Whether each row of a state has its own decay."""
        return self.branches().gate in ("key", "channel")

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Heads are shared and rotated evenly; forms that do not exist, and fields that nothing reads."""
        yield from super().broken_rules()
        rotated = self.head_dim * self.rope_fraction
        if self.positions == "rope" and (rotated != int(rotated) or int(rotated) % 2):
            yield "rope_fraction", f"of head_dim={self.head_dim} must rotate an even number of channels; change either"
        if self.rope_llama3 is not None and self.positions == "none":
            yield "rope_llama3", "is only read with positions: rope; remove it"
        if self.rope_llama3 is not None and self.rope_llama3.slow_turns >= self.rope_llama3.fast_turns:
            yield "rope_llama3", "must have slow_turns under fast_turns; use 1 and 4"
        form = self.branches()
        if form.combine == "average" and form.features == "hedgehog":
            field = "features" if self.features is not None else "combine"
            rule = "has features of hedgehog without the denominator that they need with combine: average"
            yield field, f"{rule}; use combine: joint, or features: softmax"
        if form.gate == "key" and form.features == "hedgehog":
            field = "features" if self.features is not None else "gate"
            yield field, "has one decay per key channel for features that are not channels; use features: softmax"
        if self.feature_size is not None and form.features == "softmax":
            yield "feature_size", "has no effect with features: softmax, which has no matrix; remove it"
        if self.linear_positions == "rotary" and self.positions == "none":
            yield "linear_positions", "needs positions: rope; set that, or use none"
        if self.preset == "lizard" and not self.meta_tokens:
            yield "meta_tokens", "is Lizard's memory, without which it is preset: learned with gate: channel; use 4"
        if self.linear_weight != 0.5 and form.combine == "joint":
            yield "linear_weight", "has no effect with combine: joint; remove it, or use combine: average"
        if self.fades_by_channel() and self.chunk_size & (self.chunk_size - 1):
            yield "chunk_size", "must be a power of two with a decay a key channel; use 16, 32 or 64"

    def kept_tokens(self) -> int:
        """Tokens before a query of which keys are kept: those of its window, and with a joint sum the one that left it."""
        return self.window - (self.branches().combine == "average")

    def qk_clip(self) -> str:
        """Not tried."""
        return "joins its window's sum with linear attention to older tokens, which reads the same queries"

    def lookback(self) -> tuple[int, str]:
        """What window and late tokens read."""
        return self.kept_tokens(), "window"

    def num_features(self) -> int:
        """Features of a head: rows of its state."""
        return 2 * (self.feature_size or self.head_dim) if self.branches().features == "hedgehog" else self.head_dim

    def state_shape(self) -> tuple[int, int]:
        """Features, and the sum of weights next to the values where they are divided by it."""
        return self.num_features(), self.head_dim + (self.branches().combine == "joint")

    def scan(self) -> tuple[ScanLimits, int, tuple[int, int]]:
        """A scan with a decay a head, or a key channel."""
        limits = VECTOR_GATE_LIMITS if self.fades_by_channel() else DECAY_LIMITS
        return limits, self.chunk_size, self.state_shape()


SPEC = Kind(
    "window_linear",
    "amfm_convert.window_linear:WindowLinearMixer",
    WindowLinearOptions,
    products=QKVO,
    modeling="amfm_convert.modeling.window_linear_amfm:WindowLinear",
)
