"""Loss and perplexity of a checkpoint on the whole validation part of a store, every token predicted once.

Validation during training measures a fixed number of packed global batches, which is cheap and comparable inside a run.
Here the documents of a part are cut into consecutive rows, in order and without shuffling, and the last token of a row
predicts the first of the next, so that each token counts once whatever the sequence length. A token at the beginning of a row
has less context than in the text: longer rows give lower losses, so the length belongs to the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from amfm.data_pipeline.samples.packing import Int64, Row, starts_in_window
from amfm.data_pipeline.store.manifest import SPLITS, Part, Split
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.terminal import Report, silent
from amfm.pretrain.inference.over_ranks import Precision, RowPasses, Work, join_ranks, open_model
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.scores import SourceLoss, bits_per_byte, losses_of

IGNORED = -100
DEFAULT_SEQUENCE_LENGTH = 1024


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood a token in nats, how many tokens were predicted, and both for each source.

    `bits_per_byte`: the loss by the text that the tokens stand for, which other tokenizers compare with; None if the
    text is not known. `sequence_length`: tokens per sequence, on which the loss depends.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None
    by_source: dict[str, SourceLoss]
    split: Split
    store: str
    sequence_length: int

    @property
    def perplexity(self) -> float:
        """exp(loss), of a loss cut at 700 nats, before float64 overflows."""
        return math.exp(min(self.loss, 700.0))


def evaluate_checkpoint(
    checkpoint: str | Path | Weights,
    *,
    store: str | Path | None = None,
    split: Split = "validation",
    sequence_length: int | None = None,
    rows_at_once: int = 8,
    max_tokens: int | None = None,
    device: str = "cpu",
    backend: str = "auto",
    precision: Precision = "float32",
    num_ranks: int = 1,
    progress: Callable[[int, int], None] | None = None,
    report: Report = silent,
    announce: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measure a checkpoint, a run or an imported model on one part of a store.

    num_ranks: that a launcher started, all of which must call this; they share the rows, and the model by memory.

    Rows are cut from the documents in order; documents do not see each other if the run trained so. `store`: default
    the run's; `sequence_length`: default the run's; `max_tokens`: about so many, each
    source its share; `progress` gets tokens done
    and in all, `report` what is done before, `announce` the layout of several ranks. Raises ValueError when the store was made with another tokenizer, the model on a synthetic task, or the part is empty.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    weights = checkpoint if isinstance(checkpoint, Weights) else read_weights(checkpoint, report)
    run, identity = weights.run, weights.vocabulary.identity()
    place = store if store is not None or run is None else run.data.store
    if place is None:
        raise ValueError(f"{checkpoint} is an imported model and knows no text; name a store")
    opened = TokenStore.open(place)
    _check_tokenizer(identity, opened)
    length = sequence_length or weights.trained_length() or DEFAULT_SEQUENCE_LENGTH
    isolated = run.data.mask_document_boundaries if run is not None else True
    model, parallel = open_model(
        weights,
        join_ranks(num_ranks),
        Work(rows_at_once * length),
        device=device,
        backend=backend,
        precision=precision,
        announce=announce,
    )
    sums = measure_store(
        RowPasses.of_model(model, rows_at_once, parallel=parallel),
        opened,
        split,
        sequence_length=length,
        isolated=isolated,
        max_tokens=max_tokens,
        progress=progress,
    )
    done = sum(tokens for _, tokens in sums.values())
    opened.close()
    if not done:
        raise ValueError(f"the {split} part of {opened.path} has no tokens to predict; choose another split or store")
    return Evaluation(
        sum(nll for nll, _ in sums.values()) / done,
        done,
        bits_per_byte(sums, opened, split),
        losses_of(sums, opened, split),
        split,
        str(opened.path),
        length,
    )


def measure_store(
    passes: RowPasses,
    store: TokenStore,
    split: Split,
    *,
    sequence_length: int,
    isolated: bool,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    measured: Callable[[str], None] | None = None,
) -> dict[str, tuple[float, int]]:
    """Sum a model's negative log-likelihood over a part of a store: (nats, tokens) by source, of those with tokens.

    Rows and tokens as in `evaluate_checkpoint`; `isolated`: documents do not see each other. `measured` is called after the
    last row of each source. Every rank of the passes must call this.
    """
    parallel = passes.parallel
    total = sum(store.num_tokens(name, split) for name in store.source_names)
    share = 1.0 if max_tokens is None else min(1.0, max_tokens / max(1, total))
    sums: dict[str, tuple[float, int]] = {}
    done = 0
    # Each source gives its share of `max_tokens`, whole rows at a time, so a little more than asked for.
    for name in store.source_names:
        places = cut_places(store, name, split, sequence_length, math.ceil(store.num_tokens(name, split) * share))
        sums_2 = torch.zeros(2, dtype=torch.float64, device=parallel.device)
        for size, group in groupby(places, key=lambda place: place.size):
            same = list(group)
            padded = -(-size // parallel.groups.tp.size()) * parallel.groups.tp.size()
            read = partial(_read_row, store, same, padded)
            for _, given, output in passes.run(len(same), read, isolated=isolated):
                assert output.loss is not None, "labels were given"
                counted = (given.labels_BT != IGNORED).sum()
                sums_2 += torch.stack([output.loss.nll_sum.double(), counted.double()])
                if progress is not None:
                    seen = done + int(sums_2[1]) * parallel.data_world_size
                    progress(min(seen, math.ceil(total * share)), math.ceil(total * share))
        nll, tokens = parallel.all_reduce_unique(sums_2).tolist()
        done += int(tokens)
        if tokens:
            sums[name] = (nll, int(tokens))
            if measured is not None:
                measured(name)
    return sums


@dataclass(frozen=True)
class _Place:
    """Where a row is: tokens `start` to `start + size` of a part, whose documents end at `ends`."""

    part: Part
    ends: Int64
    start: int
    size: int


def cut_places(store: TokenStore, name: str, split: Split, length: int, wanted: int) -> list[_Place]:
    """Cut a source's parts into rows of up to `length` tokens, in order, until `wanted` tokens; the longest rows first."""
    places = []
    for part in store.parts(name, split) if wanted else ():
        ends = store.document_ends(part).astype(np.int64)
        for start in range(0, part.num_tokens, length):
            if wanted <= 0:
                break
            places.append(_Place(part, ends, start, min(length, part.num_tokens - start)))
            wanted -= places[-1].size
    return sorted(places, key=lambda place: -place.size)


def _read_row(store: TokenStore, places: Sequence[_Place], padded: int, number: int) -> Row:
    """Read one row, padded; the label of its last token is the next row's first.

    Where documents do not see each other, the last token of one predicts nothing.
    """
    place = places[number]
    stop = min(place.start + place.size + 1, place.part.num_tokens)
    tokens = store.read_tokens(place.part, place.start, stop).astype(np.int64)
    starts = starts_in_window(place.ends, place.start, len(tokens))
    return Row(np.pad(tokens, (0, padded + 1 - len(tokens))), starts, len(tokens), number, 0)


def _check_tokenizer(identity: str, store: TokenStore) -> None:
    """Raise ValueError if the store's ids are not the model's: its losses would mean nothing."""
    if store.tokenizer_identity != identity:
        raise ValueError(
            f"{store.path} was made with tokenizer {store.tokenizer_identity}, the model with "
            f"{identity}; prepare the text with the model's tokenizer (data.tokenizer.model)"
        )
