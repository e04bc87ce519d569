"""Weight maps of the transformers classes: names, and the few changes of shape between them."""

from __future__ import annotations

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import BY_NAME
from amfm.model.huggingface.entries import WeightMap
from amfm.model.huggingface.hf_class import Source


def weight_map(config: ModelConfig, target: Source) -> WeightMap:
    """Build the map between our names and those of `target`; the configuration must fit it (`explain_unfit`)."""
    return BY_NAME[target].weights(config)
