"""What configurations know of FLoRA; read without torch's models."""

from __future__ import annotations

from amfm.pretrain.startup.conversion import AdapterSpec

SPEC = AdapterSpec("flora", "amfm_flora.flora:FLORA")
