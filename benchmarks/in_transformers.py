"""The same model in transformers, through files, as a user would load it: the map to its names carries weights over exactly."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import TokenIds, huggingface_config, weight_map
from amfm.model.hybrid import HybridModel


def build_in_transformers(model: HybridModel, config: ModelConfig, target: Any, num_tokens: int, **changes: Any) -> Any:
    """The model with its weights as a transformers class of float32 on the CPU, with other fields of its configuration."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), model, config, target, num_tokens, **changes)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_files(
    folder: Path, model: HybridModel, config: ModelConfig, target: Any, num_tokens: int, **changes: Any
) -> None:
    """Write config.json and model.safetensors of the class, without a tokenizer."""
    fields = huggingface_config(config, target, TokenIds(0, 0, 0), max_position_embeddings=num_tokens) | changes
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = weight_map(config, target).to_theirs(state)
    whole = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
    safetensors.torch.save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))
