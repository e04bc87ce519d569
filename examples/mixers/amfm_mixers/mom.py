"""Mixture of memories: a linear mixer with several states, of which a router lets each token write and read a few.

Tokens that share a state interfere; with several states and a sparse choice the model remembers more, at the cost of the few
that a token uses. The sequences of memories differ in length from row to row, which a batched scan cannot have. So the copies of a
row's tokens are sorted by memory and stand one after another as documents of a packed sequence of T K' tokens: shapes are fixed,
and every linear mixer works inside without knowing of memories.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from amfm.kernels.moe.grouping import balance_loss, count_experts
from amfm.model.config.kinds import find_kind
from amfm.model.mixers.base import LinearMixer
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.packing import PackMeta, Padding, means_without
from amfm.model.parallel.regions import leave_tensor_region
from amfm.model.parallel.shards import Shard
from amfm_mixers.options import MomOptions


class MemoryRows(NamedTuple):
    """Rows of tokens sorted by memory, document and time, K' copies a token.

    order_BS [B, T K']: which copy (token * K' + choice) stands where. meta: the layout in which each pair of memory and
    document is its own document.
    """

    order_BS: Tensor
    meta: PackMeta


class MomMixer(SequenceMixer):
    """Any linear mixer over num_memories states: top_k of them, by a softmax router, and one that all tokens share.

    Copies of tokens are sorted by (memory, document, time) and mixed as packed documents, convolution included, so no state
    and no window ever sees another memory, document or row. Projections are shared by all memories.
    Source: Du et al. 2025, arXiv 2502.13685, section 3. Decoding goes token by token, prompts too.
    """

    def __init__(self, options: MomOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        inner = find_kind(options.mixer).load()(build.options_of(options.mixer), build)
        assert isinstance(inner, LinearMixer), f"check_model was not called: {options.mixer} is not a linear mixer"
        self.inner = inner
        self.router = nn.Parameter(torch.empty(options.num_memories, build.hidden_size))
        # Each rank has the gradient that its own heads give.
        self.shards = {"router": Shard(partial=("tp",))}

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """x [B, T, D] -> y [B, T, D]; with a state it continues from there and returns the next one."""
        parts, (logits_BTM,) = self.inner.project(x_BTD, [self.router])
        probabilities_BTM = logits_BTM.to(torch.promote_types(logits_BTM.dtype, torch.float32)).softmax(-1)
        weights_BTK, memory_BTK = self._choose(probabilities_BTM)
        next_state: MixerState | None = None
        if state is None:
            y_BTI = self._mix(parts, weights_BTK, memory_BTK, meta)
        else:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            y_BTI, next_state = self._go_on(parts, weights_BTK, memory_BTK, meta, state)
        auxiliary = self._balance(probabilities_BTM, memory_BTK, meta.padding) if self.training else {}
        y_BTD = leave_tensor_region(self.inner.out_proj(y_BTI), self.build.groups)
        return MixerOutput(y_BTD, next_state, auxiliary)

    def _choose(self, probabilities_BTM: Tensor) -> tuple[Tensor, Tensor]:
        """Choose weights and memories of each token [B, T, K'], the shared memory last with weight 1."""
        top_BTK, memory_BTK = probabilities_BTM.topk(self.options.top_k, dim=-1)
        weights_BTK = top_BTK / top_BTK.sum(-1, keepdim=True)
        if self.options.shared_memory:
            weights_BTK = functional.pad(weights_BTK, (0, 1), value=1.0)
            memory_BTK = functional.pad(memory_BTK, (0, 1), value=self.options.num_memories)
        return weights_BTK, memory_BTK

    def _mix(self, parts: dict[str, Tensor], weights_BTK: Tensor, memory_BTK: Tensor, meta: PackMeta) -> Tensor:
        """Mix whole rows: sort copies by memory, mix and gate them as documents, and sum each token's copies by weight."""
        copies = memory_BTK.shape[2]
        rows = sort_by_memory(memory_BTK, meta)
        order_BS = rows.order_BS
        place_BS = torch.empty_like(order_BS).scatter_(1, order_BS, _columns(order_BS))
        token_BS, places_BTK = order_BS // copies, place_BS.unflatten(1, (-1, copies))
        sorted_parts = {name: take_tokens(part, token_BS, places_BTK) for name, part in parts.items()}
        o_BSHV = self.inner.mix(sorted_parts, rows.meta)
        y_BSI = self.inner.output(o_BSHV, sorted_parts)
        y_BTKI = take_tokens(y_BSI, place_BS, order_BS[..., None]).unflatten(1, (-1, copies))
        return (y_BTKI * weights_BTK[..., None].to(y_BTKI.dtype)).sum(2)

    def _go_on(
        self, parts: dict[str, Tensor], weights_BTK: Tensor, memory_BTK: Tensor, meta: PackMeta, state: MixerState
    ) -> tuple[Tensor, MixerState]:
        """Continue from a state, token by token: the states of its memories are taken, advanced, and put back."""
        state, outputs = dict(state), []
        num_rows, num_tokens, copies = memory_BTK.shape
        row_BK = torch.arange(num_rows, device=memory_BTK.device)[:, None].expand(-1, copies)
        for token in range(num_tokens):
            memory_BK = memory_BTK[:, token]
            own = {name: tensor[row_BK, memory_BK].flatten(0, 1) for name, tensor in state.items()}
            each = {name: part[:, token : token + 1].repeat_interleave(copies, dim=0) for name, part in parts.items()}
            positions = meta.positions_BT[:, token : token + 1].repeat_interleave(copies, dim=0)
            layout = replace(
                PackMeta.one_document_a_row(len(positions), 1, device=positions.device), positions_BT=positions
            )
            o_R1HV, following = self.inner.extend(each, layout, own)
            y_BKI = self.inner.output(o_R1HV, each)[:, 0].unflatten(0, (num_rows, copies))
            outputs.append((y_BKI * weights_BTK[:, token, :, None].to(y_BKI.dtype)).sum(1))
            for name, tensor in following.items():
                kept = state[name].to(tensor.dtype, copy=True)
                kept[row_BK, memory_BK] = tensor.unflatten(0, (num_rows, copies))
                state[name] = kept
        return torch.stack(outputs, dim=1), state

    def _balance(self, probabilities_BTM: Tensor, memory_BTK: Tensor, padding: Padding | None) -> dict[str, Tensor]:
        """Compute the weighted loss that keeps memories evenly used (Fedus et al. 2021, arXiv 2101.03961, section 2.2).

        Padding has no part in counts and means.
        """
        weight, top_k, memories = self.options.balance_loss_weight, self.options.top_k, self.options.num_memories
        if not weight:
            return {}
        chosen_BTK, mean = memory_BTK[..., :top_k], None
        if padding is not None:
            chosen_BTK = chosen_BTK.masked_fill(padding.is_padding_BT[..., None], memories)
            mean, _ = means_without(padding, 1)
        counts_M = count_experts(chosen_BTK.flatten(0, 1), memories + 1)[:memories]
        loss = weight * balance_loss(probabilities_BTM.flatten(0, 1), counts_M, top_k, mean)
        # All tensor ranks compute the same loss, and their gradients are summed.
        return {"memory_balance": loss.detach() + (loss - loss.detach()) / self.build.groups.tp.size()}

    def reset_buffers(self) -> None:
        """Compute the buffers of the mixer inside."""
        self.inner.reset_buffers()

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw as the mixer inside does, for its parameters; the router is left to init.py."""
        place, _, own_name = name.partition("inner.")
        return self.inner.init_parameter(own_name, shape, generator) if not place else None

    def empty_state(self, num_rows: int) -> MixerState:
        """Build the state of the mixer inside once a memory: [B, memories, ...]."""
        memories = self.options.num_memories + self.options.shared_memory
        states = self.inner.empty_state(num_rows * memories)
        return {name: tensor.unflatten(0, (num_rows, memories)) for name, tensor in states.items()}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of the recurrence, which each of its copies passes."""
        copies = self.options.top_k + self.options.shared_memory
        return copies * self.inner.sequence_flops(sequence_length)


def sort_by_memory(memory_BTK: Tensor, meta: PackMeta) -> MemoryRows:
    """Sort copies so that those of a memory and document stand together, in time; shapes do not depend on the routing."""
    ids_BT, copies = meta.document_ids_BT, memory_BTK.shape[2]
    is_start_BT = torch.zeros_like(ids_BT, dtype=torch.int64)
    is_start_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    document_BT = is_start_BT.cumsum(1)
    key_BS = (memory_BTK * ids_BT.shape[1] + document_BT[..., None]).flatten(1)
    sorted_BS, order_BS = key_BS.sort(dim=1, stable=True)
    is_other_BS = torch.zeros_like(sorted_BS)
    is_other_BS[:, 1:] = sorted_BS[:, 1:] != sorted_BS[:, :-1]
    positions_BS = meta.positions_BT.repeat_interleave(copies, dim=1).gather(1, order_BS)
    # Linear mixers read ids and positions; to count documents would wait for the device.
    own_BS = is_other_BS.cumsum(1).to(torch.int32)
    return MemoryRows(order_BS, replace(meta, document_ids_BT=own_BS, positions_BT=positions_BS, single_document=False))


def take_tokens(x_BTX: Tensor, token_BS: Tensor, places_BTK: Tensor) -> Tensor:
    """Gather x[b, token[b, s]], [B, T, X] -> [B, S, X]; places inverts it: token[b, places[b, t, k]] = t."""
    if torch.compiler.is_compiling():
        return x_BTX.gather(1, token_BS[..., None].expand(-1, -1, x_BTX.shape[-1]))
    return _TakeTokens.apply(x_BTX, token_BS, places_BTK)


class _TakeTokens(torch.autograd.Function):
    """Reads in backward too: each token knows its copies, so that none is searched and no sum is scattered."""

    @staticmethod
    def forward(ctx: Any, x_BTX: Tensor, token_BS: Tensor, places_BTK: Tensor) -> Tensor:
        ctx.save_for_backward(places_BTK)
        return _read_rows(x_BTX, token_BS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BSX: Tensor) -> tuple[Tensor, None, None]:
        (places_BTK,) = ctx.saved_tensors
        d_BTX, *others = (_read_rows(d_BSX, place_BT) for place_BT in places_BTK.unbind(-1))
        for other in others:
            d_BTX += other
        return d_BTX, None, None


def _read_rows(x_BTX: Tensor, token_BS: Tensor) -> Tensor:
    """x[b, token[b, s]] as whole rows of memory, several times as fast as number by number."""
    first_B = torch.arange(0, x_BTX.shape[0] * x_BTX.shape[1], x_BTX.shape[1], device=x_BTX.device)
    rows_R = (token_BS + first_B[:, None]).flatten()
    return x_BTX.flatten(0, 1).index_select(0, rows_R).unflatten(0, token_BS.shape)


def _columns(order_BS: Tensor) -> Tensor:
    return torch.arange(order_BS.shape[1], device=order_BS.device).expand_as(order_BS)
