"""One block, its norm and mixer, and how the residual stream passes several of them.

Residual and delta: a block does not add its output to the residual stream. Between blocks the residual stream is a pair, the residual and
the newest mixer's output (delta), because the next norm must read both and adds them in the same pass over memory. The
residual may be wider than the weights (`residual_in_fp32`). Another kind of stream (streams/) decides itself what both
hold. What else blocks give (auxiliary losses, expert counts, decode
states) collects in `Stream` on the way.

Makes a tensor again in backward passes that forward passes would keep for them.

What is cheap to make out of what is kept anyway need not be kept: the norm in front of a block is one pass over the residual
stream, which the norm keeps for its own gradient. Operations that read it keep it as before, and do not know that they
keep a note instead (`torch.autograd.graph.saved_tensors_hooks`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from amfm.kernels.common.weight_gradients import is_splitting
from amfm.model.build import build_mixer, build_norm, build_stream
from amfm.model.config.schema import ModelConfig
from amfm.model.mixers.interface import BlockState, MixerOutput, as_mixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import RMSNorm

if TYPE_CHECKING:
    from amfm.model.routed_updates import RoutedUpdates

Result = TypeVar("Result")


class Part(NamedTuple):
    """A view of what is made again, in place of a kept tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Recomputed:
    """A context in which nothing keeps `tensor`, nor views of it: `make` makes it again, bitwise identical.

    It is made once for all who kept it, when the first of them asks, and let go with the last. The context may be entered
    more than once, and none may be open around it, whose tensors would not reach it.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self.storage, self.make = tensor.untyped_storage()._cdata, make
        self.readers = 0
        self.made: Tensor | None = None
        self.hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> None:
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        hooks, self.hooks = self.hooks, None  # or both would hold each other, and what is made, beyond their time
        assert hooks is not None, "entered before"
        hooks.__exit__(*error)

    def _pack(self, kept: Tensor) -> Tensor | Part:
        if kept.untyped_storage()._cdata != self.storage:
            return kept
        self.readers += 1
        return Part(kept.shape, kept.stride(), int(kept.storage_offset()))

    def _unpack(self, kept: Tensor | Part) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        view = self.made.as_strided(*kept)
        self.readers -= 1
        if self.readers <= 0:
            self.made = None
        return view


def run_inside(context: Recomputed, steps: Generator[None, None, Result]) -> Generator[None, None, Result]:
    """Run a generator inside a context that is left wherever it pauses, so that others who run meanwhile are not in it."""
    while True:
        with context:
            try:
                next(steps)
            except StopIteration as end:
                result: Result = end.value
                return result
        yield


# Pauses where rows are sent; at the end the residual and the mixer's output.
BlockSteps = Generator[None, None, tuple[Tensor, MixerOutput]]


class Block(nn.Module):
    """Residual block, x + multiplier * mixer(norm(x)), or with its norm after it x + multiplier * norm(mixer(x)); or
    with two norms.

    The addition is left to the next norm.

    With `recomputes` only the block's input is kept for the backward pass, which computes the rest again (Chen et al. 2016,
    arXiv 1604.06174). Without `keeps_norm` what the mixer reads is made again there (remade.py).
    """

    def __init__(self, index: int, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> None:
        super().__init__()
        self.index, self.letter = index, config.built_letters[index]
        self.recomputes, self.keeps_norm = False, True
        self.multiplier, self.norm_after = config.multipliers.residual, config.norms_after()[index]
        self.norm = build_norm(config, backend, groups)
        self.stream = build_stream(index, config, groups)
        self.out_norm: RMSNorm | None = None
        if config.norms_per_block() == 2:
            self.out_norm = build_norm(config, backend, groups)
        self.mixer = build_mixer(index, config, groups, backend)
        self.updates: RoutedUpdates | None = None
        if config.lora_mixer is not None:
            from amfm.model.routed_updates import put_updates

            self.updates = put_updates(self.mixer, config, groups, backend)
        # Of a package's mixer: ours draw by their own seeds (`set_draw_seed`).
        self.has_dropout = any(isinstance(module, _DropoutNd) for module in self.mixer.modules())

    def describe(self) -> str:
        """Name it in messages."""
        return f"block {self.index} ({self.letter})"

    def note(self, error: Exception) -> None:
        """Add to an error, once, that it came up in this block, and in which pass."""
        if not getattr(error, "__notes__", None):
            is_backward = torch._C._current_autograd_node() is not None
            error.add_note(
                f"in {self.describe()}, {'computed again for the backward pass' if is_backward else 'forward'}"
            )

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        """Set an attribute; another module takes the mixer's place as a `PlainMixer`."""
        super().__setattr__(name, as_mixer(value) if name == "mixer" else value)

    def forward(
        self, residual_BTD: Tensor, delta_BTD: Tensor | None, meta: PackMeta, state: BlockState = None
    ) -> tuple[Tensor, MixerOutput]:
        """Add delta to residual, both [B, T, D], and mix: returns the sum, and the mixer's output as the next delta.

        The residual keeps its own dtype; the mixer reads the normed sum in the dtype of the weights.
        """
        if self.recomputes and torch.is_grad_enabled():
            assert state is None, "decoding has no backward pass"
            # The sum is made outside: it is what the checkpoint keeps, one tensor in place of residual and delta.
            residual_BTD, delta_BTD = self._add(residual_BTD, delta_BTD)
            # Keeping generators copies a state from the device in each recomputed block, for nothing if none draws.
            done: tuple[Tensor, MixerOutput] = checkpoint(
                self._mix, residual_BTD, delta_BTD, meta, use_reentrant=False, preserve_rng_state=self.has_dropout
            )
            return done
        normed_BTD, residual_BTD, delta_BTD = self._add_and_norm(residual_BTD, delta_BTD)
        with self._recomputed_norm(normed_BTD, residual_BTD, delta_BTD) or nullcontext():
            mixed = self._leave(self.mixer(normed_BTD, meta, state))
        return self._finish(residual_BTD, delta_BTD, mixed)

    def steps(self, residual_BTD: Tensor, delta_BTD: Tensor | None, meta: PackMeta) -> BlockSteps:
        """Do what `forward` does, up to each place where the mixer's rows are sent and something else may run.

        Of a mixer that `travels`, in training; hooks of the modules do not see it. Each is continued by `advance`.
        """
        assert not self.recomputes, "checked: blocks under two-batch overlap keep their activations"
        normed_BTD, residual_BTD, delta_BTD = self._add_and_norm(residual_BTD, delta_BTD)
        steps, again = self.mixer.steps(normed_BTD, meta), self._recomputed_norm(normed_BTD, residual_BTD, delta_BTD)
        mixed = self._leave((yield from (steps if again is None else run_inside(again, steps))))
        return self._finish(residual_BTD, delta_BTD, mixed)

    def advance(self, steps: BlockSteps) -> tuple[Tensor, MixerOutput] | None:
        """Run one of its steps: None if rows have set out and more follows, at the end what `forward` returns."""
        try:
            return next(steps)
        except StopIteration as end:
            done: tuple[Tensor, MixerOutput] = end.value
            return done
        except Exception as error:
            self.note(error)
            raise

    def _mix(self, residual_BTD: Tensor, delta_BTD: Tensor | None, meta: PackMeta) -> tuple[Tensor, MixerOutput]:
        try:
            mixed: MixerOutput = self.mixer(self._norm(residual_BTD, delta_BTD), meta, None)
        except Exception as error:
            self.note(error)
            raise
        return self._finish(residual_BTD, delta_BTD, self._leave(mixed))

    def _leave(self, mixed: MixerOutput) -> MixerOutput:
        """The mixer's output, normed where its norm comes after it."""
        norm = self.norm if self.norm_after else self.out_norm
        return mixed if norm is None else mixed._replace(y_BTD=norm(mixed.y_BTD))

    def _finish(self, residual_BTD: Tensor, delta_BTD: Tensor | None, mixed: MixerOutput) -> tuple[Tensor, MixerOutput]:
        """What the block returns; delta: what `_add` has left of it."""
        y_BTD = multiply(mixed.y_BTD, self.multiplier)
        if self.stream is not None:
            residual_BTD, y_BTD = self.stream.leave(y_BTD, residual_BTD, delta_BTD)
        return residual_BTD, mixed._replace(y_BTD=y_BTD)

    def _norm(self, residual_BTD: Tensor, delta_BTD: Tensor | None = None) -> Tensor:
        """What the mixer reads of what `_add` returned, in the dtype of the weights."""
        read_BTD: Tensor = residual_BTD if self.stream is None else self.stream(residual_BTD, delta_BTD)
        normed_BTD: Tensor = read_BTD if self.norm_after else self.norm(read_BTD)
        return normed_BTD.to(self.norm.weight.dtype)

    def _add(self, residual_BTD: Tensor, delta_BTD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sum of both, or what another kind of stream leaves of them before it is read."""
        if self.stream is not None:
            return self.stream.add(residual_BTD, delta_BTD)
        return (residual_BTD if delta_BTD is None else residual_BTD + delta_BTD.to(residual_BTD.dtype)), None

    def _add_and_norm(self, residual_BTD: Tensor, delta_BTD: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the mixer reads, and what `_add` returns."""
        if delta_BTD is None or self.norm_after or self.stream is not None:
            residual_BTD, delta_BTD = self._add(residual_BTD, delta_BTD)
            return self._norm(residual_BTD, delta_BTD), residual_BTD, delta_BTD
        normed_BTD, residual_BTD = self.norm.add(delta_BTD, residual_BTD)
        return normed_BTD.to(self.norm.weight.dtype), residual_BTD, None

    def _recomputed_norm(self, normed_BTD: Tensor, residual_BTD: Tensor, delta_BTD: Tensor | None) -> Recomputed | None:
        """If nothing keeps the norm of this stream; None where it is kept, or nothing will ask for it.

        A split pass keeps it: what its operations get of kept weights must be the parameters themselves.
        """
        if self.keeps_norm or self.norm_after or is_splitting() or not torch.is_grad_enabled():
            return None
        delta_BTD = None if delta_BTD is None else delta_BTD.detach()
        return Recomputed(normed_BTD, partial(self._norm, residual_BTD.detach(), delta_BTD))


class Blocks(nn.Module):
    """Blocks by index: of the main model those that this rank holds, under their index in the whole pattern.

    A ModuleList would number them from 0 on every pipeline rank, and names of parameters would depend on the cut.
    """

    def __init__(self, blocks: dict[int, Block]) -> None:
        super().__init__()
        for index, block in blocks.items():
            self.add_module(str(index), block)

    def __getitem__(self, index: int) -> Block:
        return cast(Block, self._modules[str(index)])

    def __iter__(self) -> Iterator[Block]:
        return iter(cast(dict[str, Block], self._modules).values())

    def __len__(self) -> int:
        return len(self._modules)

    def indices(self) -> list[int]:
        """Indices of the blocks held here, in order."""
        return [int(name) for name in self._modules]


@dataclass
class Stream:
    """What flows from block to block.

    residual_BTD + delta_BTD [B, T, D] is the residual stream, if it is a sum (streams/); delta is None before the first
    block. auxiliary, expert_counts
    and states: what the blocks passed so far have given, as in `ModelOutput`.
    """

    residual_BTD: Tensor
    delta_BTD: Tensor | None = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    states: list[BlockState] = field(default_factory=list)

    def add(self, index: int, residual_BTD: Tensor, mixed: MixerOutput) -> None:
        """Continue after the block of this index, which made this of the residual stream."""
        self.residual_BTD, self.delta_BTD = residual_BTD, mixed.y_BTD
        self.states.append(mixed.state)
        if mixed.expert_counts_E is not None:
            self.add_counts(index, mixed.expert_counts_E)
        self.add_auxiliary(mixed.auxiliary or {})

    def add_counts(self, index: int, counts_E: Tensor) -> None:
        """Add choices of a block's experts; one that all MTP layers share is passed several times."""
        before_E = self.expert_counts.get(index)
        self.expert_counts[index] = counts_E if before_E is None else before_E + counts_E

    def add_auxiliary(self, losses: dict[str, Tensor]) -> None:
        """Add auxiliary losses by name."""
        for name, value in losses.items():
            self.auxiliary[name] = self.auxiliary[name] + value if name in self.auxiliary else value


def pass_through(
    stream: Stream, blocks: Iterable[tuple[int, Block]], meta: PackMeta, states: Sequence[BlockState] | None = None
) -> Stream:
    """Pass the residual stream through blocks, given with their indices, adding their auxiliary losses, counts and states to it.

    Returns a new Stream; the one given is not changed. states: of all blocks, by index.
    """
    passed = replace(
        stream,
        auxiliary=dict(stream.auxiliary),
        expert_counts=dict(stream.expert_counts),
        states=list(stream.states),
    )
    for index, block in blocks:
        state = None if states is None else states[index]
        try:
            passed.add(index, *block(passed.residual_BTD, passed.delta_BTD, meta.of_block(index), state))
        except Exception as error:
            block.note(error)
            raise
    return passed


def multiply(x: Tensor, multiplier: float) -> Tensor:
    """Multiply by a constant of the configuration; by one, nothing is computed."""
    return x if multiplier == 1.0 else x * multiplier


def use_at_once(part: str) -> None:
    """What `HybridModel.before_use` does if no one gathers weights: nothing."""
