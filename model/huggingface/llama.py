"""The transformers class `llama`, which we read and do not write (`dense.py`)."""

from __future__ import annotations

from amfm.model.huggingface.dense import dense_map, model_config_from_dense
from amfm.model.huggingface.hf_class import HfClass

CLASS = HfClass(name="llama", model_type="llama", read=model_config_from_dense, weights=dense_map)
