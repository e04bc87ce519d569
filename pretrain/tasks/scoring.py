"""What tasks ask of a model: log-likelihoods of the ends of rows, and greedy continuations of prompts.

A job is the whole list of questions, the same on every rank. Log-likelihoods are validation: questions are packed into
rows as documents are, with labels only at the ids that are scored, and the micro-batches take the pass that validation
takes (inference/over_ranks.py), so every layout of ranks that trains can answer.

Prompts to continue are not packed, because a recurrent state would take the padding in: prompts of one length share a batch,
are read in one pass, and each further token comes from the last one and the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from amfm.data_pipeline.samples.packing import IGNORED_LABEL, Row, fit_documents
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.model.hybrid import ModelOutput
from amfm.model.mixers.interface import DecodeState
from amfm.model.packing import PackMeta
from amfm.pretrain.inference.over_ranks import RowPasses
from amfm.pretrain.parallel import Parallel

# Tokens per sequence at least, where rows need not be as long as in training.
SHORTEST_ROW = 512


@dataclass(frozen=True)
class LikelihoodJob:
    """Rows of token ids, and how many ids at the end of each are to be scored given those before them."""

    rows: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class GreedyJob:
    """Prompts of token ids to continue with the most likely token each time, until one of the row's texts occurs.

    limits: new tokens of each at most. Ids from `Scorer.tokenizer.vocab_size` on are never chosen.
    """

    prompts: tuple[tuple[int, ...], ...]
    limits: tuple[int, ...]
    stops: tuple[tuple[str, ...], ...]


Job = LikelihoodJob | GreedyJob


@dataclass(frozen=True)
class Likelihood:
    """Summed natural log-probability of the scored ids, and whether each of them was the most likely one."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class Scorer:
    """A model that answers jobs. Every rank must run the same jobs in the same order.

    passes: those of its rows, with predictions. forward, empty_state: as `HybridModel`'s, for continuations, in eval mode.
    max_length: tokens per question at most. row_length: of every row; None: what the longest question asks for.
    """

    passes: RowPasses
    forward: Callable[..., ModelOutput]
    empty_state: Callable[[int], DecodeState]
    tokenizer: Tokenizer
    max_length: int
    row_length: int | None = None

    @property
    def parallel(self) -> Parallel:
        """The ranks that answer together."""
        return self.passes.parallel

    def run(self, job: Job) -> list[Any]:
        """Answer a job: a `Likelihood` for each row, or the new token ids of each prompt."""
        if isinstance(job, LikelihoodJob):
            return self.log_likelihoods(job)
        return self.continuations(job)

    @torch.no_grad()
    def log_likelihoods(self, job: LikelihoodJob) -> list[Likelihood]:
        """Score the last ids of each row. Every rank must call this."""
        if not job.rows:
            return []
        assert all(0 < count < len(row) <= self.max_length + 1 for row, count in zip(job.rows, job.counts, strict=True))
        rows, owners_BT = pack_questions(job, self._row_length(max(map(len, job.rows)) - 1))
        # A sum of the losses and a count of misses for each question, and a place for what no one asked for.
        sums_Q2 = torch.zeros(len(job.rows) + 1, 2, dtype=torch.float64, device=self.parallel.device)
        for numbers, given, output in self.passes.run(len(rows), rows.__getitem__):
            assert output.loss is not None and output.predictions_BT is not None, (
                "labels and predictions were asked for"
            )
            owner_BT = torch.from_numpy(np.where(numbers[:, None] >= 0, owners_BT[numbers], -1))
            if given.meta.segments is not None:
                owner_BT = given.meta.segments.take(owner_BT)
            misses_R = (output.predictions_BT != given.labels_BT).flatten()
            found_R2 = torch.stack([output.loss.token_nll_R.double(), misses_R.double()], dim=1)
            sums_Q2.index_add_(0, owner_BT.flatten().to(sums_Q2.device) % len(sums_Q2), found_R2)
        found = self.parallel.all_reduce_unique(sums_Q2)[:-1].tolist()
        return [Likelihood(-nll, misses == 0) for nll, misses in found]

    def _row_length(self, longest: int) -> int:
        """Tokens per sequence: those of the run, or few lengths, which ranks can share and kernels meet often."""
        if self.row_length is not None:
            return self.row_length
        multiple = self.parallel.groups.tp.size()
        wanted = min(self.max_length, max(SHORTEST_ROW, 1 << (longest - 1).bit_length()))
        return -(-wanted // multiple) * multiple

    @torch.no_grad()
    def continuations(self, job: GreedyJob) -> list[list[int]]:
        """Continue each prompt greedily; the end-of-text token and what follows it are left out.

        A text of `stops` may stand in what comes back: whoever asked cuts it off. Every rank must call this.
        """
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(job.prompts):
            by_length.setdefault(len(prompt), []).append(index)
        batches = [
            indices[start : start + self.passes.rows_at_once]
            for _, indices in sorted(by_length.items())
            for start in range(0, len(indices), self.passes.rows_at_once)
        ]
        found: dict[int, list[int]] = {}
        for batch, counts in self._own(batches):
            new = self._continue(
                [job.prompts[index] for index in batch],
                [job.limits[index] for index in batch],
                [job.stops[index] for index in batch],
            )
            if counts:
                found |= dict(zip(batch, new, strict=True))
        return self._collect(found, len(job.prompts))

    def _continue(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], stops: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        """Continue prompts of one length together, a token each a pass, until the rows of all ranks have ended."""
        new: list[list[int]] = [[] for _ in prompts]
        ended = [limit == 0 for limit in limits]
        state = self.empty_state(len(prompts))
        tokens_BT = torch.tensor([list(prompt) for prompt in prompts], device=self.parallel.device)
        while self._any_of(not all(ended)):
            meta = PackMeta.one_document_a_row(*tokens_BT.shape, start=state.length, device=self.parallel.device)
            output = self.forward(tokens_BT, meta, None, state)
            assert output.logits_BTV is not None and output.state is not None, "a state was given and no labels"
            state = output.state
            tokens_B = output.logits_BTV[:, -1, : self.tokenizer.vocab_size].argmax(dim=-1)
            for row, token in enumerate(tokens_B.tolist()):
                if ended[row]:
                    continue
                if token == self.tokenizer.eos_id:
                    ended[row] = True
                    continue
                new[row].append(token)
                text = self.tokenizer.decode(new[row])
                ended[row] = len(new[row]) == limits[row] or any(stop in text for stop in stops[row])
            tokens_BT = tokens_B[:, None]
        return new

    def _any_of(self, value: bool) -> bool:
        return bool(self.parallel.max_over_all([int(value)])[0])

    def _own(self, batches: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
        """Yield this rank's batches, as many as every other rank's, and whether each one's answers count."""
        num_ranks = self.parallel.data_world_size
        for first in range(0, len(batches), num_ranks):
            own = first + self.parallel.data_rank
            yield (batches[own], True) if own < len(batches) else (batches[first], False)

    def _collect(self, found: dict[int, Any], count: int) -> list[Any]:
        """Put the answers of all ranks together, in the order of the questions."""
        together = {index: answer for part in self.parallel.gather_objects(found) for index, answer in part.items()}
        return [together[index] for index in range(count)]


def pack_questions(job: LikelihoodJob, num_tokens: int) -> tuple[list[Row], np.ndarray[Any, np.dtype[np.int64]]]:
    """Fit questions whole into rows of `num_tokens`, each a document with labels where its ids are scored.

    With the rows [B, T] the number of the question that each label belongs to, -1 elsewhere.
    """
    lengths = np.array([len(row) for row in job.rows])
    ends = lengths.cumsum()
    ids, owners = np.fromiter(chain.from_iterable(job.rows), np.int64), np.repeat(np.arange(len(lengths)), lengths)
    to_end = ends[owners] - 1 - np.arange(len(ids))  # ids that follow in the question
    is_scored = (to_end > 0) & (to_end <= np.array(job.counts)[owners])
    labels = np.where(is_scored, np.roll(ids, -1), IGNORED_LABEL)
    owners = np.where(is_scored, owners, -1)
    bins = fit_documents(ends, num_tokens + 1)  # of a row's last id only the label is needed
    rows, owners_BT = [], np.full((bins.num_bins, num_tokens + 1), -1)
    for number in range(bins.num_bins):
        pieces = slice(*bins.bin_offsets[number : number + 2])
        sizes = bins.length[pieces]
        places = np.concatenate([np.arange(first, first + size) for first, size in zip(bins.first[pieces], sizes)])
        padding = (0, num_tokens + 1 - len(places))
        owners_BT[number, : len(places)] = owners[places]
        rows.append(
            Row(
                tokens=np.pad(ids[places], padding),
                starts=np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int32),
                num_valid=len(places),
                sample=number,
                source=0,
                labels=np.pad(labels[places], padding, constant_values=IGNORED_LABEL)[:-1],
            )
        )
    return rows, owners_BT[:, :-1]
