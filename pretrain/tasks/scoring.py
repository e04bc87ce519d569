"""What tasks ask of a model: log-likelihoods of the ends of rows, and greedy continuations of prompts.

A job is the whole list of questions, the same on every rank. Rows are sorted by length and cut into batches, and each data
rank takes every n-th batch. All of them run the same number of forward passes, the last ones perhaps on a batch whose
answers no one needs: experts and ZeRO-3 weights are spread over data ranks, so a rank that stopped early would leave
the others waiting. Answers are gathered, and every rank returns all of them.

Rows of a batch are padded on the right, which a causal model does not see, and to a power of two, so that kernels meet few
shapes. Prompts are not padded, because a recurrent state would take the padding in: prompts of one length share a batch,
are read in one pass, and each further token comes from the last one and the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.model.hybrid import ModelOutput
from amfm.model.mixers.interface import DecodeState
from amfm.model.packing import PackMeta

# Tokens of the shortest padded row.
SHORTEST_ROW = 32


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
class Share:
    """Which batches this rank takes, and how ranks meet.

    data_rank of num_data_ranks takes every n-th batch. row_multiple: tensor ranks share the tokens of a row in this many
    parts. gather: every rank's object, on every rank; any_of: whether any rank says yes.
    """

    data_rank: int = 0
    num_data_ranks: int = 1
    row_multiple: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    any_of: Callable[[bool], bool] = lambda value: value


@dataclass(frozen=True)
class Scorer:
    """A model that answers jobs. Every rank must run the same jobs in the same order.

    forward: as `HybridModel.forward`, through an engine or not, in eval mode. max_length: tokens per row at most.
    rows_at_once: of one batch.
    """

    forward: Callable[..., ModelOutput]
    empty_state: Callable[[int], DecodeState]
    tokenizer: Tokenizer
    device: torch.device
    max_length: int
    rows_at_once: int
    share: Share

    def run(self, job: Job) -> list[Any]:
        """Answer a job: a `Likelihood` for each row, or the new token ids of each prompt."""
        if isinstance(job, LikelihoodJob):
            return self.log_likelihoods(job)
        return self.continuations(job)

    @torch.no_grad()
    def log_likelihoods(self, job: LikelihoodJob) -> list[Likelihood]:
        """Score the last ids of each row. Rows that differ in their last id alone are computed once.

        Every rank must call this.
        """
        assert all(0 < count < len(row) <= self.max_length + 1 for row, count in zip(job.rows, job.counts, strict=True))
        by_input: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(job.rows):
            by_input.setdefault(row[:-1], []).append(index)
        inputs = sorted(by_input, key=lambda ids: (-len(ids), ids))
        batches = [inputs[start : start + self.rows_at_once] for start in range(0, len(inputs), self.rows_at_once)]
        found: dict[int, Likelihood] = {}
        for batch, counts in self._own(batches):
            logits_BTV = self._logits(batch)
            for ids, logits_TV in zip(batch if counts else [], logits_BTV):
                for index in by_input[ids]:
                    found[index] = _score_end(logits_TV[: len(ids)], job.rows[index], job.counts[index])
        return self._collect(found, len(job.rows))

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Compute logits [B, T, V] of rows of ids, padded on the right with id 0."""
        num_tokens = self._padded(max(map(len, rows)))
        tokens_BT = torch.zeros(len(rows), num_tokens, dtype=torch.int64)
        for row_T, ids in zip(tokens_BT, rows):
            row_T[: len(ids)] = torch.tensor(ids)
        meta = PackMeta.one_document_a_row(len(rows), num_tokens, device=self.device)
        logits_BTV = self.forward(tokens_BT.to(self.device), meta).logits_BTV
        assert logits_BTV is not None, "no labels were given"
        return logits_BTV

    def _padded(self, num_tokens: int) -> int:
        """Round a row's length up to a power of two that tensor ranks can share, or to the longest row if that is less."""
        multiple = self.share.row_multiple
        power = max(SHORTEST_ROW, 1 << (num_tokens - 1).bit_length())
        return max(num_tokens, min(-(-power // multiple) * multiple, self.max_length))

    @torch.no_grad()
    def continuations(self, job: GreedyJob) -> list[list[int]]:
        """Continue each prompt greedily; the end-of-text token and what follows it are left out.

        A text of `stops` may stand in what comes back: whoever asked cuts it off. Every rank must call this.
        """
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(job.prompts):
            by_length.setdefault(len(prompt), []).append(index)
        batches = [
            indices[start : start + self.rows_at_once]
            for _, indices in sorted(by_length.items())
            for start in range(0, len(indices), self.rows_at_once)
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
        tokens_BT = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
        while self.share.any_of(not all(ended)):
            meta = PackMeta.one_document_a_row(*tokens_BT.shape, start=state.length, device=self.device)
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

    def _own(self, batches: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
        """Yield this rank's batches, as many as every other rank's, and whether each one's answers count."""
        num_ranks = self.share.num_data_ranks
        for first in range(0, len(batches), num_ranks):
            own = first + self.share.data_rank
            yield (batches[own], True) if own < len(batches) else (batches[first], False)

    def _collect(self, found: dict[int, Any], count: int) -> list[Any]:
        """Put the answers of all ranks together, in the order of the questions."""
        together = {index: answer for part in self.share.gather(found) for index, answer in part.items()}
        return [together[index] for index in range(count)]


def _score_end(logits_TV: Tensor, row: Sequence[int], count: int) -> Likelihood:
    """Score the last `count` ids of a row by the logits [T, V] after each id but its last."""
    logits_TV = logits_TV[-count:].float()
    targets_T = torch.tensor(row[-count:], device=logits_TV.device)
    log_probabilities_T = logits_TV.log_softmax(dim=-1).gather(1, targets_T[:, None])
    return Likelihood(float(log_probabilities_T.sum()), bool((logits_TV.argmax(dim=-1) == targets_T).all()))
