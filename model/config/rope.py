"""How Llama 3 stretches rotary positions: a section that attention and the mixers with its weights share. No torch here."""

from __future__ import annotations

from pydantic import Field

from amfm.model.config.section import Section


class Llama3Stretch(Section):
    """Slow frequencies divided by a factor, fast ones kept, and a ramp between, by their turns over the length trained before."""

    factor: float = Field(ge=1, description="What slow frequencies are divided by (Llama 3.1: 8).")
    original_length: int = Field(gt=0, description="Length trained before stretching (Llama 3.1: 8192).")
    slow_turns: float = Field(1.0, gt=0, description="Frequencies with fewer turns are divided as a whole.")
    fast_turns: float = Field(4.0, gt=0, description="Those with more are kept; must be above slow_turns.")
