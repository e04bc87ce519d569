"""A plug-in of vLLM (entry point group `vllm.general_plugins`) for models that amfm exports with its own modelling files.

It was copied into the export with them; nothing is installed:

    PYTHONPATH=EXPORT/vllm_plugin vllm serve EXPORT --enforce-eager

Blocks run on vLLM's own parts, so that its caches, batches and kernels are those of its other models (`model.py`). A block that
vLLM has no part for is rejected with an error (`served.py`). Written for vLLM 0.32.
"""

from __future__ import annotations

ARCHITECTURE = "AmfmForCausalLM"


def register() -> None:
    """Make the configuration and the architecture known; vLLM calls it in each of its processes, more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .config import AmfmConfig, StatesInFloat32

    AutoConfig.register(AmfmConfig.model_type, AmfmConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = StatesInFloat32
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "vllm_amfm.model:AmfmForCausalLM")
