"""A run over conversations and text with moved middles has the losses of a plain loop over the same rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.samples.samples import SampleReader, SampleSettings
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.data_pipeline.prepare.test_dialogues import make_mixed
from tests.pretrain.tiny_run import collect_weights, read_metrics, tiny_config

STEPS, ROWS, LENGTH, RATE = 4, 4, 48, 3e-3


def plain_rows(data: DataConfig, seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, labels and document numbers of each row, by a loop over its tokens and the runs that the store has."""
    settings = SampleSettings.from_config(data, split="train", sequence_length=LENGTH, seed=seed)
    reader = SampleReader(settings)
    rows = []
    samples = np.arange(STEPS * ROWS)
    for place, row in zip(reader.locate(samples), reader.read(samples)[0], strict=True):
        first, spans = reader.first_token(place), reader.store.loss_spans(place.part)
        ends = set(reader.store.document_ends(place.part).tolist())
        tokens, document, labels, documents = row.tokens.astype(int).tolist(), 0, [], []
        for at in range(LENGTH):
            document += at > 0 and first + at in ends
            documents.append(document)
            following = first + at + 1
            learned = spans is None or any(low <= following < high for low, high in spans.reshape(-1, 2).tolist())
            labels.append(tokens[at + 1] if learned and following not in ends else -100)
        rows.append((torch.tensor(tokens[:-1]), torch.tensor(labels), torch.tensor(documents)))
    return rows


@pytest.mark.parametrize("weight", [0.2, pytest.param(0.8, marks=pytest.mark.slow)])
def test_losses_are_those_of_a_plain_loop(tmp_path: Path, weight: float) -> None:
    data = make_mixed(tmp_path, weight)
    config = tiny_config(
        data,
        tmp_path / "run",
        model__pattern="M*-",
        train__steps=STEPS,
        train__micro_batch_size=1,
        train__validate_every_steps=None,
        optimizer__learning_rate=RATE,
        optimizer__weight_decay=0.0,
        optimizer__clip_grad_norm=None,
        schedule__kind="constant",
        schedule__warmup_steps=0,
    )
    with SignalWatch() as signals:
        run = start_run(config, signals)
        weights = collect_weights(run)
        assert run_steps(run) == 0
        close_run(run)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]

    model = HybridModel(config.model, single_rank_groups(), backend="torch")
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    rows, plain = plain_rows(data, config.train.seed), []
    assert sum(int((labels == -100).sum()) > LENGTH // 4 for _, labels, _ in rows) > 0
    for step in range(STEPS):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        losses_of_rows = []
        for tokens, labels, documents in batch:
            meta = PackMeta.from_document_ids(documents[None].to(torch.int32))
            logits = model(tokens[None], meta).logits_BTV
            losses_of_rows.append(functional.cross_entropy(logits[0], labels, ignore_index=-100, reduction="sum"))
        loss = sum(losses_of_rows) / sum(int((labels != -100).sum()) for _, labels, _ in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain.append(float(loss))
    assert plain == pytest.approx(losses, rel=2e-6)
