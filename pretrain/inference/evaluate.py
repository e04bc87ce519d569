"""Loss and perplexity of a checkpoint on the whole validation part of a store, every token predicted once.

Validation during training measures a fixed number of packed global batches, which is cheap and comparable inside a run.
Here the documents of a part are cut into consecutive rows, in order and without shuffling, and the last token of a row
predicts the first of the next, so that each token counts once whatever the row length. A token at the beginning of a row
has less context than in the text: longer rows give lower losses, so the length belongs to the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amfm.data_pipeline.progress import Report, silent
from amfm.data_pipeline.store.manifest import SPLITS, Part, Split
from amfm.data_pipeline.store.store import TokenStore
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.source_losses import SourceLoss, bits_per_byte, losses_of

IGNORED = -100
DEFAULT_SEQUENCE_LENGTH = 1024


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood a token in nats, how many tokens were predicted, and both for each source.

    `bits_per_byte`: the loss by the text that the tokens stand for, which other tokenizers compare with; None where the
    text is not known. `sequence_length`: tokens per row, on which the loss depends.
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


@dataclass(frozen=True)
class _Row:
    """One row of text: ids [T], the next id where it counts (else -100), and the number of each token's document."""

    tokens_T: Tensor
    labels_T: Tensor
    document_ids_T: Tensor


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
    progress: Callable[[int, int], None] | None = None,
    report: Report = silent,
) -> Evaluation:
    """Measure a checkpoint, a run or an imported model on one part of a store, in float32.

    Rows are cut from the documents in order; documents do not see each other if the run trained so. `store`: default
    the run's; `sequence_length`: default the run's; `max_tokens`: about so many, each
    source its share; `progress` gets tokens done
    and in all, `report` what is done before. Raises ValueError when the store was made with another tokenizer, the model on a synthetic task, or the part is empty.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    weights = checkpoint if isinstance(checkpoint, Weights) else read_weights(checkpoint, report)
    run, identity = weights.run, weights.tokenizer.identity()
    place = store if store is not None or run is None else run.data.store
    if place is None:
        raise ValueError(f"{checkpoint} is an imported model and knows no text; name a store")
    opened = TokenStore.open(place)
    _check_tokenizer(identity, opened)
    length = sequence_length or weights.trained_length() or DEFAULT_SEQUENCE_LENGTH
    isolated = run.data.mask_document_boundaries if run is not None else True
    model = weights.build(backend=backend, device=device)
    sums = measure_store(
        model,
        opened,
        split,
        sequence_length=length,
        isolated=isolated,
        rows_at_once=rows_at_once,
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
    model: HybridModel,
    store: TokenStore,
    split: Split,
    *,
    sequence_length: int,
    isolated: bool,
    rows_at_once: int = 8,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    measured: Callable[[str], None] | None = None,
) -> dict[str, tuple[float, int]]:
    """Sum a model's negative log-likelihood over a part of a store: (nats, tokens) by source, of those with tokens.

    Rows and tokens as in `evaluate_checkpoint`; `isolated`: documents do not see each other. `measured` is called after the
    last row of each source.
    """
    total = sum(store.num_tokens(name, split) for name in store.source_names)
    share = 1.0 if max_tokens is None else min(1.0, max_tokens / max(1, total))
    sums: dict[str, tuple[float, int]] = {}
    done = 0
    # Each source gives its share of `max_tokens`, whole groups of rows at a time, so a little more than asked for.
    for name in store.source_names:
        nll, tokens = 0.0, 0
        wanted = math.ceil(store.num_tokens(name, split) * share)
        rows = (row for part in store.parts(name, split) for row in _cut_rows(store, part, sequence_length, isolated))
        for batch in _group(rows, rows_at_once):
            if tokens >= wanted:
                break
            batch_nll, batch_tokens = _measure(model, batch)
            nll, tokens = nll + batch_nll, tokens + batch_tokens
            done += batch_tokens
            if progress is not None:
                progress(done, math.ceil(total * share))
        if tokens:
            sums[name] = (nll, tokens)
            if measured is not None:
                measured(name)
    return sums


def _check_tokenizer(identity: str, store: TokenStore) -> None:
    """Raise ValueError where the store's ids are not the model's: its losses would mean nothing."""
    if store.tokenizer_identity != identity:
        raise ValueError(
            f"{store.path} was made with tokenizer {store.tokenizer_identity}, the model with "
            f"{identity}; prepare the text with the model's tokenizer (data.tokenizer.model)"
        )


def _cut_rows(store: TokenStore, part: Part, length: int, isolated: bool) -> Iterator[_Row]:
    """Cut one part into rows of up to `length` tokens; the label of a row's last token is the next row's first.

    `isolated`: documents do not see each other, and the last token of a document predicts nothing.
    """
    ends = store.document_ends(part)
    for start in range(0, part.num_tokens, length):
        stop = min(start + length, part.num_tokens)
        read = store.read_tokens(part, start, min(stop + 1, part.num_tokens)).astype(np.int64)
        tokens_T = torch.from_numpy(read[: stop - start])
        labels_T = torch.full_like(tokens_T, IGNORED)
        following = torch.from_numpy(read[1:])[: stop - start]
        labels_T[: len(following)] = following
        document_ids_T = torch.zeros(stop - start, dtype=torch.int32)
        if isolated:
            places = np.arange(start, stop, dtype=np.uint64)
            # `ends` are exclusive: a token at place p lies in the first document that ends beyond p.
            numbers = np.searchsorted(ends, places, side="right")
            document_ids_T = torch.from_numpy((numbers - numbers[0]).astype(np.int32))
            is_last = torch.from_numpy(np.isin(places + np.uint64(1), ends))
            labels_T[is_last] = IGNORED
        yield _Row(tokens_T, labels_T, document_ids_T)


def _group(rows: Iterator[_Row], count: int) -> Iterator[list[_Row]]:
    """Group up to `count` rows at a time; a shorter row, the last of its part, starts a separate group."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (len(batch) == count or len(row.tokens_T) != len(batch[0].tokens_T)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _measure(model: HybridModel, batch: list[_Row]) -> tuple[float, int]:
    """Compute the summed negative log-likelihood of a batch, in nats, and the number of predicted tokens."""
    device = model.head_weight().device
    labels_BT = torch.stack([row.labels_T for row in batch])
    tokens = int((labels_BT != IGNORED).sum())
    if not tokens:
        return 0.0, 0
    tokens_BT = torch.stack([row.tokens_T for row in batch])
    meta = PackMeta.from_document_ids(torch.stack([row.document_ids_T for row in batch]))
    output = model(tokens_BT.to(device), meta.map_tensors(lambda tensor: tensor.to(device)), labels_BT.to(device))
    assert output.loss is not None, "labels were given"
    return float(output.loss.nll_sum.double()), tokens
