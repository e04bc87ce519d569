"""All classes of transformers that we read or write. The order of the native ones is the order in which `auto` tries them."""

from __future__ import annotations

from amfm.model.huggingface import (
    deepseek_v3,
    granitemoehybrid,
    kimi_linear,
    lfm2,
    lfm2_moe,
    llama,
    nemotron_h,
    own,
    qwen3,
    qwen3_5_moe,
    qwen3_next,
)
from amfm.model.huggingface.hf_class import HfClass, HfTarget, Source, Target

CLASSES: tuple[HfClass, ...] = (
    nemotron_h.CLASS,
    granitemoehybrid.CLASS,
    qwen3_next.CLASS,
    qwen3_5_moe.CLASS,
    kimi_linear.CLASS,
    deepseek_v3.CLASS,
    lfm2.CLASS,
    lfm2_moe.CLASS,
    own.CLASS,
    llama.CLASS,
    qwen3.CLASS,
)
WRITTEN: dict[Target, HfTarget] = {found.name: found for found in CLASSES if isinstance(found, HfTarget)}
BY_NAME: dict[Source, HfClass] = {found.name: found for found in CLASSES}
BY_TYPE: dict[str, HfClass] = {found.model_type: found for found in CLASSES}
TARGETS: tuple[Target, ...] = tuple(WRITTEN)
NATIVE_TARGETS: tuple[Target, ...] = tuple(name for name, found in WRITTEN.items() if not found.ships_code)
