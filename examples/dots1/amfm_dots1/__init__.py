"""dots.llm1 (transformers 5.24, `models/dots1`) as a class to export to: one row, as those of amfm's own plain families."""

from __future__ import annotations

from amfm.model.huggingface.plain.families import BIASES, GLM4_MOE, QWEN3, Family
from amfm.model.huggingface.plain.fields import plain_class

# Attention of Qwen3 and the experts of GLM-4.5, under the same names.
DOTS1 = Family(
    name="dots1",
    class_name="Dots1ForCausalLM",
    qk_norm=QWEN3.qk_norm,
    bias=BIASES,
    windows="listed",
    experts=GLM4_MOE.experts,
)
TARGET = plain_class(DOTS1)
