"""The transformers class `qwen3_5_text`: the dense text models of Qwen3.5, `qwen3_5_moe` with feed-forwards in place of experts.

Read from transformers 5.24 (`configuration_qwen3_5.py`, `modeling_qwen3_5.py`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface import qwen3_5_moe
from amfm.model.huggingface.qwen3_next import qwen3_next_fields, unfit_for_qwen3_next
from amfm.model.huggingface.refusals import needs_byte_level

NAME = "qwen3_5_text"
# Of qwen3_next, and not of this class.
UNKNOWN = ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob", "num_experts")


def unfit_for_qwen3_5_text(config: ModelConfig) -> list[str]:
    """Every choice that the class cannot hold: what qwen3_next cannot, and experts."""
    reasons = [reason.replace("qwen3_next", NAME) for reason in unfit_for_qwen3_next(config)]
    if "E" in config.letters:
        rule = f"layers of {NAME} are dense; use - in place of E, target qwen3_5_moe or own"
        reasons.append(f"model.pattern={config.pattern}: {rule}")
    return reasons


def qwen3_5_text_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the text model's own."""
    fields = {name: value for name, value in qwen3_next_fields(config).items() if name not in UNKNOWN}
    return fields | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": NAME}


CLASS = replace(
    qwen3_5_moe.CLASS,
    name="qwen3_5_text",
    model_type=NAME,
    class_name="Qwen3_5ForCausalLM",
    unfit=unfit_for_qwen3_5_text,
    fields=qwen3_5_text_fields,
    unfit_tokenizer=partial(needs_byte_level, NAME, "qwen3_next"),
)
