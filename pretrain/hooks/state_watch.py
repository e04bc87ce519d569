"""Finds numbers that changed although nothing should have changed them, and names the rank (`health.check_state_every_steps`).

Memory and processors that are going bad give wrong numbers without an error. Four comparisons find them; each is a
digest of every bit, and costs a pass over the state of the rank.

    at rest      weights, master weights, moments and buffers right after an update and right before the next one: nothing
writes                  to them in between, forward and backward passes included. Names rank and tensor, in every layout.
master weights      model weights are the rounded float32 master weights of the rank that owns them (ZeRO 0-2)     replicas
what data ranks hold alike: model weights under ZeRO 0-2, master weights and moments under ZeRO 0. The owner's
master weights, else the majority, tell which rank is wrong; of two without either, both are named.     recomputed   the first
micro-batch of a step, run twice before it counts, gives bitwise identical results: loss, and gradients too
without a pipeline and ZeRO 3. It finds processors, whatever they hold.

What is wrong in an update that only one rank makes (ZeRO 1-3) reaches all others as a sound number: only the second
run of a micro-batch can report such a processor. A difference ends the run with code 3 before anything is saved.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amfm.kernels.common.weight_gradients import gradients_by_autograd
from amfm.pretrain.checkpoint.engine_layout import EngineLayout
from amfm.pretrain.checkpoint.fragments import collect_fragments
from amfm.pretrain.engine.parts import name_parameters
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.run import Run
from amfm.pretrain.step import forward_micro_batch, forward_only
from amfm.pretrain.step_sums import StepResult

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_ELEMENTS = 1 << 22
WORKING = "model weights"
MAX_NAMED = 3
REMEDY = "nothing of it was saved; remove that machine, and start again from the newest checkpoint"

# (kind, name of the parameter, first element, number of elements)
Range = tuple[str, str, int, int]


class StateWatchHook(Hook):
    """Compares the state at rest, its copies, and a micro-batch that is run twice."""

    def __init__(self, run: Run, every_steps: int) -> None:
        self.run, self.every_steps = run, every_steps
        self.watch = StateWatch(run.saver.layout, run.parallel)

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Run the first micro-batch twice."""
        step = self.run.progress.step + 1
        if step % self.every_steps == 0:
            self.watch.examine_recomputed(lambda: run_apart(self.run, micro_batches, share), step)

    def before_update(self) -> None:
        """Compare what has rested since the last examination."""
        self.watch.examine_rest(self.run.progress.step + 1)

    def after_step(self, result: StepResult) -> None:
        """Examine the state when it is due."""
        if self.run.progress.step % self.every_steps == 0:
            self.watch.examine(self.run.progress.step)

    def after_edit(self) -> None:
        """What was edited is not a silent corruption."""
        self.watch.allow_change()

    def before_save(self) -> None:
        """Examine the state, so that nothing damaged is saved."""
        self.watch.examine(self.run.progress.step)


def run_apart(run: Run, micro_batches: Sequence[MicroBatch], share: LossShare) -> dict[str, Tensor]:
    """Run the first micro-batch without a trace in the engine, and return its sums and gradients by name.

    With a pipeline or ZeRO 3, which own the backward pass, it is only the forward pass; a pipeline runs all of them.
    """
    if run.pipeline is not None or run.engine.zero_stage == 3:
        run.engine.module.eval()  # or ZeRO 3 takes it for the order of a step
        outputs = list(forward_only(run, micro_batches if run.pipeline is not None else micro_batches[:1]))
        run.engine.module.train()
        gradients = {}
    else:
        named = {name: weight for name, weight in run.engine.module.named_parameters() if weight.requires_grad}
        with gradients_by_autograd():
            output = forward_micro_batch(run, micro_batches[0])
            loss = share.apply(output)
            assert loss is not None, "a batch has labels"
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        outputs, gradients = (
            [output],
            {f"gradient of {name}": value for name, value in zip(named, found) if value is not None},
        )
    losses = {f"loss {index}": output.loss.nll_sum for index, output in enumerate(outputs) if output.loss is not None}
    return losses | gradients


def digest(tensor: Tensor) -> Tensor:
    """Sum the words of a tensor, each times its own odd number, modulo 2^64; a scalar of its device.

    One word that changes always changes the sum, because an odd factor loses no bit. Integers, so in any order.
    """
    flat = tensor.detach().reshape(-1)
    words = flat.view(INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), CHUNK_ELEMENTS):
        piece = words[start : start + CHUNK_ELEMENTS].to(torch.int64)
        total += (piece * (2 * torch.arange(start, start + len(piece), device=words.device) + 1)).sum()
    return total


def fetch(digests: dict[Range, Tensor]) -> dict[Range, int]:
    """Bring digests to the host, in one copy from each device."""
    found: dict[Range, int] = {}
    for device in {value.device for value in digests.values()}:
        here = [key for key, value in digests.items() if value.device == device]
        found |= dict(zip(here, torch.stack([digests[key] for key in here]).tolist()))
    return found


@dataclass
class StateWatch:
    """Digests of this rank's state, kept from one comparison to the next. Every rank makes one and calls its methods.

    `ranges`: of every data rank's master weights, by the ranks that share them. `at_rest`: digests since the last step, if
    any.
    """

    layout: EngineLayout
    parallel: Parallel
    ranges: dict[tuple[int, ...], list[Range]] = field(default_factory=dict)
    at_rest: dict[Range, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Learn which ranges the data ranks of each part own, so that all compare the same."""
        own = [
            (part.data_ranks, [(WORKING, span.name, span.start, span.numel) for span in part.spans])
            for part in self.layout.parts
        ]
        for entries in self.parallel.gather_objects(own):
            for data_ranks, ranges in entries:
                if self.parallel.rank in data_ranks:
                    known = self.ranges.setdefault(data_ranks, [])
                    known.extend(found for found in ranges if found not in known)

    def examine(self, step: int) -> None:
        """After a step, or before a save: compare replicas and master weights, and remember the state as it rests.

        Every rank must call this. Raises RuntimeError on all ranks, naming those that are wrong.
        """
        now = self._digest_state()
        wrong = self._find_changed(now)
        working = {data_ranks: self._digest_working(ranges) for data_ranks, ranges in self.ranges.items()}
        masters = self._digest_masters()
        for digests in working.values():
            wrong += [
                f"{name} [{start}:{start + count}]: the model weights are not the rounded master weights"
                for (kind, name, start, count), value in masters.items()
                if digests.get((kind, name, start, count), value) != value
            ]
        self._raise_together(wrong, step)
        replicas = {data_ranks: dict(digests) for data_ranks, digests in working.items()}
        for fragment in collect_fragments(self.layout.engine.deepspeed, self.layout.parts):
            if fragment.replicated:
                for kind in fragment.tensors:
                    key = (kind, fragment.name, fragment.start, fragment.numel)
                    replicas.setdefault(fragment.data_ranks, {})[key] = now[key]
        self._compare_replicas(replicas, masters, step)
        self.at_rest = now

    def examine_rest(self, step: int) -> None:
        """Before an update: compare the state with what it was after the last one, if that was examined.

        Every rank must call this. Raises RuntimeError on all ranks, naming those that are wrong.
        """
        if self.at_rest:
            self._raise_together(self._find_changed(self._digest_state()), step)
        self.allow_change()

    def examine_recomputed(self, run_twice: Callable[[], dict[str, Tensor]], step: int) -> None:
        """Run something twice and compare every bit of its results by name. Every rank must call this."""
        first, second = ({name: int(digest(each)) for name, each in run_twice().items()} for _ in range(2))
        wrong = [
            f"{name}: a micro-batch that was run twice gave other bits" for name in first if first[name] != second[name]
        ]
        self._raise_together(wrong, step)

    def allow_change(self) -> None:
        """Drop the digests at rest: a step, an edit or a rollback follows."""
        self.at_rest = {}

    def _find_changed(self, now: dict[Range, int]) -> list[str]:
        return [
            f"{name}: {kind} changed in memory between two updates"
            for (kind, name, start, count), value in self.at_rest.items()
            if now[kind, name, start, count] != value
        ]

    def _digest_state(self) -> dict[Range, int]:
        """Digest everything that this rank holds between steps."""
        self.layout.engine.wait_for_weights()
        found = {
            (kind, fragment.name, fragment.start, fragment.numel): digest(tensor)
            for fragment in collect_fragments(self.layout.engine.deepspeed, self.layout.parts)
            for kind, tensor in fragment.tensors.items()
        }
        found |= {("buffer", name, 0, tensor.numel()): digest(tensor) for name, tensor in self.layout.buffers().items()}
        found |= {(WORKING, name, 0, weights.numel()): digest(weights) for name, weights in self._working_weights()}
        return fetch(found)

    def _working_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that the model computes with, flattened, by name; none under ZeRO 3, which spreads them."""
        if self.layout.engine.zero_stage < 3:
            names = name_parameters(self.layout.engine.module)
            for parameter in self.layout.engine.module.parameters():
                yield names[id(parameter)], parameter.detach().reshape(-1)

    def _digest_working(self, ranges: list[Range]) -> dict[Range, int]:
        """Digest the model weights of ranges that this rank and its data ranks own."""
        weights = dict(self._working_weights())
        return fetch(
            {
                (kind, name, start, count): digest(weights[name][start : start + count])
                for kind, name, start, count in ranges
                if name in weights
            }
        )

    def _digest_masters(self) -> dict[Range, int]:
        """Digest this rank's master weights, rounded to the model's dtype, under the keys of the model weights."""
        if self.layout.engine.zero_stage == 3:
            return {}
        return fetch(
            {
                (WORKING, fragment.name, fragment.start, fragment.numel): digest(
                    fragment.tensors["weight"].to(self.layout.dtypes[fragment.name])
                )
                for fragment in collect_fragments(self.layout.engine.deepspeed, self.layout.parts)
            }
        )

    def _compare_replicas(
        self, replicas: dict[tuple[int, ...], dict[Range, int]], masters: dict[Range, int], step: int
    ) -> None:
        """Compare what data ranks hold alike.

        First one number for all of it, and only where that differs all of them.
        """
        joined = {
            ranks: hashlib.sha256(repr(sorted(held.items())).encode()).digest() for ranks, held in replicas.items()
        }
        everyone = self.parallel.gather_objects(joined)
        groups = set().union(*everyone)
        if all(len({everyone[rank].get(data_ranks) for rank in data_ranks}) == 1 for data_ranks in groups):
            return
        wrong = judge_replicas(self.parallel.gather_objects((replicas, masters)))
        self._raise_together(wrong.get(self.parallel.rank, []), step)
        raise AssertionError("replicas differ, and no rank was found to differ")

    def _raise_together(self, wrong: list[str], step: int) -> None:
        """Raise RuntimeError on every rank when something is wrong on any, naming rank and host."""
        reports = self.parallel.gather_objects((socket.gethostname(), wrong))
        found = [
            f"rank {rank} on {host}: "
            + "; ".join(texts[:MAX_NAMED])
            + (f"; and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else "")
            for rank, (host, texts) in enumerate(reports)
            if texts
        ]
        if found:
            raise RuntimeError(f"state is damaged at step {step}: {' | '.join(found)}; {REMEDY}")


def judge_replicas(
    reports: list[tuple[dict[tuple[int, ...], dict[Range, int]], dict[Range, int]]],
) -> dict[int, list[str]]:
    """Find which ranks differ, given every rank's replicas and master weights: rank -> what is wrong with it, in words.

    The owner's master weights are right, without them the majority; on a tie all ranks are named.
    """
    wrong: dict[int, list[str]] = {}
    for data_ranks in sorted(set().union(*(replicas for replicas, _ in reports))):
        for key in reports[data_ranks[0]][0][data_ranks]:
            kind, name, start, count = key
            values = {rank: reports[rank][0][data_ranks][key] for rank in data_ranks}
            if len(set(values.values())) == 1:
                continue
            owners = {reports[rank][1][key] for rank in data_ranks if kind == WORKING and key in reports[rank][1]}
            ranked = Counter(values.values()).most_common()
            right = owners.pop() if len(owners) == 1 else ranked[0][0] if ranked[0][1] > ranked[1][1] else None
            text = f"{name} [{start}:{start + count}]: {kind} differ from those of the other data ranks"
            if right is None:
                text += ", with as many ranks on either side"
            for rank, value in values.items():
                if value != right:
                    wrong.setdefault(rank, []).append(text)
    return wrong
