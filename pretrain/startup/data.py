"""Open what a run reads, and compares it with the settings: training and held-out text, vocabulary and tokenizer.

A micro-batch with the document layout of training text, for passes whose numbers no one reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from amfm.data_pipeline.batch import Batch
from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.tokenizer.tokenizer import KEPT_FOLDER, keep_tokenizer, load_tokenizer
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.stages import RunStage


def example_batch(rows: int, tokens: int, documents: int, *, is_padded: bool = False) -> Batch:
    """Rows of `documents` documents of nearly equal length; positions and `cu_seqlens` restart at each, tokens are zeros.

    is_padded: rows say where their padding begins, which is after all of them.
    """
    place_T = torch.arange(tokens)
    ids_T = place_T * documents // tokens
    starts_T = torch.cat([torch.zeros(1, dtype=torch.int64), torch.diff(ids_T)]) > 0
    positions_T = place_T - torch.where(starts_T, place_T, 0).cummax(0).values
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), starts_T.nonzero().flatten()])
    cu_seqlens = torch.cat([(starts + row * tokens) for row in range(rows)] + [torch.tensor([rows * tokens])])
    return Batch(
        tokens_BT=torch.zeros(rows, tokens, dtype=torch.int64),
        labels_BT=torch.zeros(rows, tokens, dtype=torch.int64),
        loss_mask_BT=torch.ones(rows, tokens, dtype=torch.bool),
        positions_BT=positions_T.int().repeat(rows, 1),
        document_ids_BT=ids_T.int().repeat(rows, 1),
        cu_seqlens=cu_seqlens.int(),
        sample_ids=tuple(range(rows)),
        source_ids=(0,) * rows,
        lengths_B=torch.full((rows,), tokens) if is_padded else None,
    )


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
    """Open held-out text for every sequence length that the run will come to, so that missing text shows at the start.

    Returns loaders by tokens per sequence; empty when nothing is held out.
    """
    if config.data.validation_fraction == 0:
        return {}
    by_length = {stage.train.sequence_length: stage for stage in stages}
    return {length: open_loader(config, data, parallel, "validation", stage) for length, stage in by_length.items()}


def check_vocabulary(config: RunConfig, loader: PretrainLoader) -> None:
    """Raise ValueError if the store has tokens without a row in the embedding.

    `check_run` cannot know this: the size of a given tokenizer is known only from the store.
    """
    if loader.store.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be at least {loader.store.vocab_size}, the vocabulary of "
            f"the store {config.data.store}; raise model.vocab_size, or prepare the store with a smaller tokenizer"
        )


def check_tokenizer(config: RunConfig, *, keeps: bool = False) -> None:
    """Read the store's tokenizer, which exports and generation will need; nothing for a synthetic task.

    keeps: copy it into the run directory, so that the run is read where its store is not. Raises RuntimeError when it is not
    the one that made the tokens, ValueError for settings that need text where the store has only token ids.
    """
    if config.data.synthetic is None:
        tokenizer = load_tokenizer(config.data.text_store())
        for name in ("tasks", "prompts"):
            if getattr(config.evaluate, name):
                from amfm.data_pipeline.tokenizer.id_vocabulary import require_text

                require_text(tokenizer, f"evaluate.{name}")
        if keeps:
            keep_tokenizer(tokenizer, Path(config.run.dir) / KEPT_FOLDER)
