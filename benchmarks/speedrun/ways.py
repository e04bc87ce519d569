"""Ways to learn the text: recipes of amfm, and peers of its active size with loops as their users write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ADAMW = ("optimizer.kind=adamw",)
# The pattern of tiny_cpu with a dense block of the experts' active size for each of its mixtures.
DENSE = ("model.pattern=(M-)*2 *- M- M-", "model.feed_forward.hidden_size=384")


@dataclass(frozen=True)
class Way:
    """One way. `rates`: peak learning rates; of several a short run of each chooses. `share`: of the processor seconds.

    `overrides`: of the configuration of ours. Peers of `kind` ignore them, but for the shapes of `nemotron_h`.
    """

    what: str
    kind: Literal["amfm", "llama", "nemotron_h"]
    rates: tuple[float, ...]
    overrides: tuple[str, ...] = ()
    muon: bool = False
    share: float = 1.0


WAYS = {
    "amfm": Way("amfm, the recipe of `tiny_cpu`: Muon", "amfm", (8e-3,)),
    "amfm_half": Way("amfm with Muon, half of the seconds", "amfm", (8e-3,), share=0.5),
    "amfm_dense": Way("amfm, dense blocks for experts", "amfm", (8e-3,), DENSE),
    "amfm_dense_half": Way("amfm, dense blocks, half of the seconds", "amfm", (8e-3,), DENSE, share=0.5),
    "amfm_adamw": Way("amfm with AdamW at half the rate", "amfm", (4e-3,), ADAMW),
    "llama": Way("Llama of transformers, AdamW", "llama", (1e-3, 2e-3, 4e-3)),
    "llama_muon": Way(
        "Llama of transformers, torch.optim.Muon on its matrices", "llama", (4e-3, 8e-3, 16e-3), muon=True
    ),
    "nemotron_h": Way("NemotronH of transformers, the pattern of `tiny_cpu`, AdamW", "nemotron_h", (1e-3, 2e-3, 4e-3)),
    "amfm_rate_4": Way("amfm with Muon at the rate of AdamW", "amfm", (4e-3,)),
    "amfm_rate_16": Way("amfm with Muon at four times the rate", "amfm", (16e-3,)),
    "amfm_attention": Way(
        "amfm, attention with rotary positions for Mamba2",
        "amfm",
        (8e-3,),
        ("model.pattern=(*E)*2 *E *- *E", "model.attention.positions=rope", "export.target=own"),
    ),
    "amfm_mamba": Way("amfm, Mamba2 for attention", "amfm", (8e-3,), ("model.pattern=(ME)*2 ME M- ME",)),
    "amfm_adamw_parts": Way("amfm, half the rate where AdamW steps", "amfm", (8e-3,), ("optimizer.rates.adamw=0.5",)),
}
# What is compared; the others are ablations, by --ways.
COMPARED = ("amfm_dense", "amfm_dense_half", "amfm", "amfm_half", "amfm_adamw", "llama", "llama_muon", "nemotron_h")
