"""The stages of a model's indexers: dense attention from which they learn, then attention to what they choose."""

from __future__ import annotations

from amfm.model.config.indexer import IndexerStage
from amfm.model.config.indexer_stage import in_indexer_stage
from amfm.model.hybrid import HybridModel
from amfm.model.mixers.sparse.indexer import Indexer


def set_indexer_stage(model: HybridModel, stage: IndexerStage | None) -> None:
    """Set what all indexers of a model do; None changes nothing. Parameters stay as they are; changes `config` too."""
    if stage is None:
        return
    model.config = in_indexer_stage(model.config, stage)
    for module in model.modules():
        if isinstance(module, Indexer):
            module.is_sparse = stage == "sparse"
