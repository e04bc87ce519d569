"""From a spike to its documents: the sequences of a step by loss, and the text of its worst documents.

The sequences of a step are a function of its number, so nothing of the run need be kept: they are read again, and the newest
checkpoint from before the step says what each token cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from amfm.data_pipeline.samples.packing import Row, assemble_rows
from amfm.data_pipeline.samples.samples import SampleLocation, SampleReader, SampleSettings
from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.model.hybrid import HybridModel
from amfm.model.loss import IGNORE_INDEX
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints, step_of
from amfm.pretrain.config.file import load_config
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.stages import data_of_stages, first_sample, resolve_stages, stage_of

ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class DocumentLoss:
    """A piece of a document in a row of the step: mean loss of its tokens in nats, where it is in the store, and its text."""

    loss: float
    tokens: int
    sample: int
    source: str
    part: str
    document: int
    first_token: int
    text: str


@dataclass(frozen=True)
class Spike:
    """A step's rows, (global sample, source, mean loss) from the worst on, its worst documents, and the weights that judged."""

    step: int
    weights_of_step: int
    rows: tuple[tuple[int, str, float], ...]
    documents: tuple[DocumentLoss, ...]


def find_worst(
    run_dir: str | Path,
    step: int,
    *,
    num_documents: int = 10,
    least_tokens: int = 8,
    device: str = "cpu",
    backend: str = "auto",
    report: Report = silent,
) -> Spike:
    """Measure the sequences of a step with the newest weights from before it, or the oldest there are.

    Documents of fewer than `least_tokens` predicted tokens are left out. Raises ValueError for a step that the run
    does not have, a synthetic task, and a run without a checkpoint.
    """
    config = load_config(Path(run_dir) / "config.yaml")
    stages = resolve_stages(config)
    if not 1 <= step <= stages[-1].last_step:
        raise ValueError(f"--spike {step}: {run_dir} has the steps 1 to {stages[-1].last_step}")
    data = data_of_stages(config, stages)
    if data.synthetic is not None:
        raise ValueError(f"--spike {step}: {run_dir} trains on a synthetic task, which has no documents")
    checkpoints = list_checkpoints(Path(run_dir) / "checkpoints")
    if not checkpoints:
        raise ValueError(
            f"--spike {step}: {run_dir} has no checkpoint to measure with; set train.checkpoint_every_steps"
        )
    chosen = next((path for path in checkpoints if step_of(path) < step), checkpoints[-1])
    weights = read_weights(chosen, report)
    model = weights.build(backend=backend, device=device)
    length = stages[0].train.sequence_length
    settings = SampleSettings.from_config(data, split="train", sequence_length=length, seed=config.train.seed)
    reader = SampleReader(settings)
    first = first_sample(stages, step)
    samples = np.arange(first, first + stage_of(stages, step - 1).batch_size(step), dtype=np.int64)
    places, (rows, _) = reader.locate(samples), reader.read(samples)
    by_row: list[tuple[int, str, float]] = []
    documents: list[DocumentLoss] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        report(f"measuring the sequences of step {step}", start, len(rows))
        group = rows[start : start + ROWS_AT_ONCE]
        nll_BT, counts_BT = token_losses(model, group, isolated=data.mask_document_boundaries)
        for row, place, nll_T, counts_T in zip(group, places[start:], nll_BT, counts_BT):
            by_row.append((row.sample, place.source, float(nll_T.sum() / counts_T.sum().clamp(min=1))))
            found = documents_of(row, place, reader, nll_T, counts_T, weights.tokenizer)
            documents += [each for each in found if each.tokens >= least_tokens]
    reader.store.close()
    return Spike(
        step,
        step_of(chosen),
        tuple(sorted(by_row, key=lambda row: -row[2])),
        tuple(sorted(documents, key=lambda each: -each.loss)[:num_documents]),
    )


@torch.inference_mode()
def token_losses(model: HybridModel, rows: list[Row], *, isolated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token of rows [B, T] in nats, 0 if none is predicted, and whether one is, on the CPU."""
    arrays = assemble_rows(rows, mask_document_boundaries=isolated)
    tokens_BT, labels_BT, ids_BT, positions_BT = map(
        torch.from_numpy, (arrays.tokens, arrays.labels, arrays.document_ids, arrays.positions)
    )
    device = model.head_weight().device
    meta = PackMeta.from_document_ids(ids_BT, positions_BT).map_tensors(lambda tensor: tensor.to(device))
    output = model(tokens_BT.to(device), meta, labels_BT.to(device))
    assert output.loss is not None, "labels were given"
    return output.loss.token_nll_R.view(labels_BT.shape).double().cpu(), labels_BT != IGNORE_INDEX


def documents_of(
    row: Row,
    place: SampleLocation,
    reader: SampleReader,
    nll_T: torch.Tensor,
    counts_T: torch.Tensor,
    tokenizer: Tokenizer,
) -> Iterator[DocumentLoss]:
    """The pieces of documents in a row, each with its loss."""
    valid = min(row.num_valid, len(nll_T))
    starts = [start for start in row.starts.tolist() if start < valid]
    first = reader.first_token(place)
    ends = reader.store.document_ends(place.part)
    number = int(np.searchsorted(ends, first, side="right"))
    for offset, (begin, end) in enumerate(zip(starts, [*starts[1:], valid])):
        tokens = int(counts_T[begin:end].sum())
        loss = float(nll_T[begin:end].sum()) / max(1, tokens)
        text = tokenizer.decode(row.tokens[begin:end].astype(np.int64).tolist())
        yield DocumentLoss(
            loss, tokens, row.sample, place.source, place.part.path, number + offset, first + begin, text
        )
