"""What the indexers of a model do, as stages of a run change it. No torch here."""

from __future__ import annotations

from amfm.model.config.indexer import IndexerStage
from amfm.model.config.schema import ModelConfig


def has_indexer(model: ModelConfig) -> bool:
    """Whether a block of the pattern chooses its keys."""
    return any(getattr(options, "indexer", None) is not None for _, options in model.kinds_in_use())


def in_indexer_stage(model: ModelConfig, stage: IndexerStage | None) -> ModelConfig:
    """The model with all its indexers in this stage; None: as they are."""
    for kind, options in model.sections() if stage is not None else ():
        indexer = getattr(options, "indexer", None)
        if indexer is not None and indexer.stage != stage:
            changed = options.model_copy(update={"indexer": indexer.model_copy(update={"stage": stage})})
            model = model.with_options(kind, changed)
    return model
