"""Open what a run reads, and compares it with the settings: training and held-out text, vocabulary and tokenizer."""

from __future__ import annotations

from typing import Literal

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.stages import RunStage


def open_loader(
    config: RunConfig, data: DataConfig, parallel: Parallel, split: Literal["train", "validation"], stage: RunStage
) -> PretrainLoader:
    """Open this rank's loader: training text through all stages, or held-out text in rows of one stage's length."""
    return PretrainLoader(
        data,
        split=split,
        sequence_length=stage.train.sequence_length,
        micro_batch_size=stage.train.micro_batch_size,
        seed=config.train.seed,
        data_rank=parallel.data_rank,
        data_world_size=parallel.data_world_size,
    )


def open_validations(
    config: RunConfig, data: DataConfig, parallel: Parallel, stages: tuple[RunStage, ...]
) -> dict[int, PretrainLoader]:
    """Open held-out text for every row length that the run will come to, so that missing text shows at the start.

    Returns loaders by tokens per row; empty when nothing is held out.
    """
    if config.data.validation_fraction == 0:
        return {}
    by_length = {stage.train.sequence_length: stage for stage in stages}
    return {length: open_loader(config, data, parallel, "validation", stage) for length, stage in by_length.items()}


def check_vocabulary(config: RunConfig, loader: PretrainLoader) -> None:
    """Raise ValueError where the store has tokens without a row in the embedding.

    `check_run` cannot know this: the size of a given tokenizer is known only from the store.
    """
    if loader.store.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be at least {loader.store.vocab_size}, the vocabulary of "
            f"the store {config.data.store}; raise model.vocab_size, or prepare the store with a smaller tokenizer"
        )


def check_tokenizer(config: RunConfig) -> None:
    """Read the store's tokenizer, which exports and generation will need; nothing for a synthetic task.

    Raises RuntimeError when it is not the one that made the tokens.
    """
    if config.data.synthetic is None:
        load_tokenizer(config.data.text_store())
