"""Rotary positions: sections that attention and the mixers with its weights share. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from amfm.model.config.section import Section


class Llama3Stretch(Section):
    """Slow frequencies divided by a factor, fast ones kept, and a ramp between, by their turns over the length trained before."""

    factor: float = Field(ge=1, description="Divisor of slow frequencies (Llama 3.1: 8).")
    original_length: int = Field(gt=0, description="Length trained before stretching (Llama 3.1: 8192).")
    slow_turns: float = Field(1.0, gt=0, description="Frequencies with fewer turns are divided completely.")
    fast_turns: float = Field(4.0, gt=0, description="Those with more are kept; must be above slow_turns.")


class RopeConfig(Section):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) and how they are stretched to longer texts."""

    theta: float = Field(10_000.0, gt=0, description="Base of the frequencies.")
    fraction: float = Field(1.0, gt=0, le=1, description="Part of each head that is rotated.")
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = Field(
        "none",
        description="`linear`: positions divided by a factor (Chen et al. 2023, arXiv 2306.15595); `ntk`: theta * alpha^(d/(d-2)); `yarn`: Peng et al. 2023 (arXiv 2309.00071); `llama3`: as Llama 3.1 and later.",
    )
    linear_factor: float | None = Field(None, ge=1, description="Only with scaling: linear (Gemma 3: 8).")
    ntk_alpha: float | None = Field(
        None, ge=1, description="NTK-aware alpha (Hunyuan: 50 for 32K, 1000 for 256K); only with scaling: ntk."
    )
    yarn_factor: float | None = Field(
        None, ge=1, description="Length to come / length trained; only with scaling: yarn."
    )
    yarn_original_length: int | None = Field(
        None, gt=0, description="Length trained before stretching; only with scaling: yarn."
    )
    yarn_beta_fast: float = Field(32.0, gt=0, description="Rotations above which a frequency is left alone.")
    yarn_beta_slow: float = Field(1.0, gt=0, description="Rotations below which a frequency is interpolated.")
    yarn_truncate: bool = Field(
        True, description="Round the ends of the ramp between both outwards to whole pairs; gpt-oss: false."
    )
    llama3: Llama3Stretch | None = Field(None, description="Only with scaling: llama3.")

    def broken_rules(self, head_dim: int) -> Iterator[tuple[str, str]]:
        """Yield each field and the rule that it breaks: whole pairs of channels of a head rotate, and what is set is read."""
        rotated = head_dim * self.fraction
        if rotated != int(rotated) or int(rotated) % 2 or rotated < 2:
            rule = f"of head_dim={head_dim} rotates {rotated:g} channels; they must be an even integer of at least 2"
            yield "fraction", f"{rule}: change fraction or head_dim"
        if self.scaling == "ntk" and rotated < 4:
            yield "scaling", f"needs at least 4 rotated channels, not {rotated:g}; raise head_dim or fraction"
        if self.theta <= 1:
            yield "theta", "must be above 1; use 10000"
        yield from self._broken_scaling()
        if self.llama3 is not None and self.llama3.slow_turns >= self.llama3.fast_turns:
            yield "llama3.slow_turns", f"must be under fast_turns={self.llama3.fast_turns}; use 1 and 4"
        if self.yarn_beta_slow >= self.yarn_beta_fast:
            yield "yarn_beta_slow", f"must be under yarn_beta_fast={self.yarn_beta_fast}; use 1 and 32"

    def _broken_scaling(self) -> Iterator[tuple[str, str]]:
        """A field of another scaling would be read by nothing, so it is rejected and not ignored."""
        read = {
            "linear": ("linear_factor",),
            "ntk": ("ntk_alpha",),
            "yarn": ("yarn_factor", "yarn_original_length"),
            "llama3": ("llama3",),
        }
        for scaling, fields in read.items():
            for field in fields:
                if self.scaling == scaling and getattr(self, field) is None:
                    yield "scaling", f"needs model.attention.rope.{field}; set it"
                if self.scaling != scaling and getattr(self, field) is not None:
                    remedy = f"remove it or set scaling: {scaling}"
                    yield field, f"is only read with scaling: {scaling}, not {self.scaling}; {remedy}"
        usual = {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_truncate": True}
        for field, value in usual.items():
            if self.scaling != "yarn" and getattr(self, field) != value:
                yield field, f"is only read with scaling: yarn, not {self.scaling}; remove it or set scaling: yarn"


class YarnStretch(Section):
    """YaRN of mixers other than attention (Peng et al. 2023, arXiv 2309.00071), as a section that is there or not."""

    factor: float = Field(ge=1, description="Length to come / length trained.")
    original_length: int = Field(gt=0, description="Length trained before stretching.")
    beta_fast: float = Field(32.0, gt=0, description="Rotations above which a frequency is left alone.")
    beta_slow: float = Field(1.0, gt=0, description="Rotations below which a frequency is interpolated.")
    truncate: bool = Field(True, description="As model.attention.rope.yarn_truncate.")

    def rope(self, theta: float) -> RopeConfig:
        """The same as a rotary section of this base."""
        return RopeConfig(
            theta=theta,
            scaling="yarn",
            yarn_factor=self.factor,
            yarn_original_length=self.original_length,
            yarn_beta_fast=self.beta_fast,
            yarn_beta_slow=self.beta_slow,
            yarn_truncate=self.truncate,
        )


class MlaYarn(YarnStretch):
    """YaRN of latent attention, whose factor may be on all scores instead of on the rotated channels."""

    mscale: float | None = Field(
        None,
        gt=0,
        description="Scores are multiplied by (0.1 mscale ln(factor) + 1)^2 (DeepSeek-V3: 1.0), cosine and sine by nothing; null: these by 0.1 ln(factor) + 1.",
    )

    def on_scores(self) -> float:
        """The factor on all scores."""
        return 1.0 if self.mscale is None else (0.1 * self.mscale * math.log(self.factor) + 1.0) ** 2


def yarn_of(rope: RopeConfig) -> YarnStretch | None:
    """The stretch of a rotary section with scaling: yarn; None of another."""
    if rope.scaling != "yarn":
        return None
    assert rope.yarn_factor is not None and rope.yarn_original_length is not None, "checked: yarn has both"
    return YarnStretch(
        factor=rope.yarn_factor,
        original_length=rope.yarn_original_length,
        beta_fast=rope.yarn_beta_fast,
        beta_slow=rope.yarn_beta_slow,
        truncate=rope.yarn_truncate,
    )
