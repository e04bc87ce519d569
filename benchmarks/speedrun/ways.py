"""Ways to learn the text: recipes of amfm, and peers of its active size with loops as their users write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MUON = ("optimizer.kind=muon",)


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
    like: str | None = None  # takes the rate of this one


WAYS = {
    "amfm": Way("amfm, the recipe of `tiny_cpu`: AdamW", "amfm", (4e-3,)),
    "amfm_muon": Way("amfm with Muon at twice the rate", "amfm", (8e-3,), MUON),
    "amfm_muon_half": Way("the same, half of the seconds", "amfm", (8e-3,), MUON, share=0.5),
    "llama": Way("Llama of transformers, AdamW", "llama", (1e-3, 2e-3, 4e-3)),
    "llama_muon": Way("the same Llama, torch.optim.Muon on its matrices", "llama", (2e-3, 4e-3, 8e-3), muon=True),
    "nemotron_h": Way("NemotronH of transformers, the pattern of `tiny_cpu`, AdamW", "nemotron_h", (1e-3, 2e-3, 4e-3)),
    "amfm_muon_4": Way("amfm with Muon at the rate of AdamW", "amfm", (4e-3,), MUON),
    "amfm_muon_16": Way("amfm with Muon at four times the rate", "amfm", (16e-3,), MUON),
    "amfm_dense": Way(
        "amfm with Muon, dense blocks of the experts' active size",
        "amfm",
        (8e-3,),
        (*MUON, "model.pattern=(M-)*2 *- M- M-", "model.feed_forward.hidden_size=384"),
    ),
    "amfm_attention": Way(
        "amfm with Muon, attention with rotary positions for Mamba2",
        "amfm",
        (8e-3,),
        (*MUON, "model.pattern=(*E)*2 *E *- *E", "model.attention.positions=rope", "export.target=own"),
    ),
    "amfm_mamba": Way(
        "amfm with Muon, Mamba2 for attention", "amfm", (8e-3,), (*MUON, "model.pattern=(ME)*2 ME M- ME")
    ),
    "amfm_adamw_parts": Way(
        "amfm with Muon, half the rate where AdamW steps", "amfm", (8e-3,), (*MUON, "optimizer.rates.adamw=0.5")
    ),
}
# What is compared; the others are ablations, by --ways.
COMPARED = ("amfm", "amfm_muon", "amfm_muon_half", "llama", "llama_muon", "nemotron_h")
