"""config.json of an export as vLLM reads it: our sections, and what vLLM asks every configuration for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .served import ATTENDING, STATEFUL, VERSION, attention_sizes, block_names, unserved

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class AmfmConfig(PretrainedConfig):
    """Sections of the model by name, and sizes of heads, by which vLLM makes its caches.

    Raises ValueError for files of another version, and for blocks that vLLM cannot serve.
    """

    model_type = "amfm"

    def __init__(self, **fields: Any) -> None:
        if not fields.get("pattern"):  # transformers builds empty ones, to compare with
            super().__init__(**fields)
            return
        version = fields.get("modeling_version", 1)
        if version != VERSION:
            raise ValueError(
                f"config.json is of version {version} of amfm's modeling files, and this plug-in of version {VERSION}: use the "
                "plug-in of the same export, or `amfm import` the folder and export it again"
            )
        reasons = unserved(fields)
        if reasons:
            raise ValueError("vLLM cannot serve this model of amfm: " + "; ".join(reasons))
        names = block_names(fields)
        fields["multipliers"] = {"embedding": 1.0, "residual": 1.0, "logits": 1.0} | (fields.get("multipliers") or {})
        heads, kv_heads, head_dim = _head_sizes(fields, names)
        fields |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
        fields["num_hidden_layers"] = len(names)
        # What vLLM counts blocks of a kind by; without a state it is a model of only attention.
        fields["layers_block_type"] = ["attention" if name in ATTENDING else name for name in names]
        if not set(names) & set(STATEFUL):
            fields["layer_types"] = ["full_attention"] * len(names)
        if fields.get("mamba"):
            fields["mamba_chunk_size"] = fields["mamba"]["chunk_size"]
        for name, value in fields.items():
            setattr(self, name, value)
        super().__init__(**fields)

    def block_names(self) -> list[str]:
        """Name the block of each place of the pattern."""
        return block_names({"pattern": self.pattern})


def _head_sizes(fields: dict[str, Any], names: list[str]) -> tuple[int, int, int]:
    """Query heads, key heads and their size, of the first kind of attention; of a model without one they are read by no
    one.
    """
    kinds = [name for name in names if name in ATTENDING]
    if not kinds:
        return 1, 1, 64
    return attention_sizes(fields, kinds[0])


class StatesInFloat32(VerifyAndUpdateConfig):
    """Keep states of Mamba2 and delta rules in float32, as the modelling files do, unless told otherwise."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Called by vLLM once the configuration is read."""
        if vllm_config.cache_config.mamba_ssm_cache_dtype == "auto":
            vllm_config.cache_config.mamba_ssm_cache_dtype = "float32"
