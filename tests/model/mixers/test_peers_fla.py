"""Mixers compute what flash-linear-attention's recurrences compute in PyTorch, with every gradient, in float32.

Its layers need a GPU for norms and convolutions. What runs on a processor is one recurrence a family, in a loop over
tokens, and the layer of Mamba but for its SiLU. So each mixer is compared with its own twin, whose recurrence is the
peer's. `make test-peers` makes the environment that it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model.mixers.recurrence import OpenScan, Recurrence, ScanRows, ScanSettings
from amfm.model.mixers.shared_layers import gate_heads
from amfm.model.packing import PackMeta
from tests.helpers.numbers import assert_near
from tests.model.mixers.samples import mixer_config, sample_options
from tests.model.mixers.test_peers import (
    FLOAT32,
    ROWS,
    TOKENS,
    WIDTH,
    compare,
    mamba1_weights,
    our_mixer,
    put,
    whole_rows,
)
from tests.model.small_models import small_model

pytest.importorskip("fla", reason="flash-linear-attention (fla) is not installed")

Read = Callable[[ScanRows], Tensor]


class PeerRecurrence(Recurrence):
    """Reads whole rows of one document with a peer's function; keeps no state."""

    def __init__(self, read: Read) -> None:
        self.read = read

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        assert how.document_ids_BT is None and state_BHKV is None, "a peer has no documents"
        return self.read(rows), rows.v.new_empty(0)

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        raise NotImplementedError

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        raise NotImplementedError


def unscaled(q: Tensor) -> Tensor:
    """Queries for a peer that divides them by the root of their size."""
    return q * q.shape[-1] ** 0.5


def for_each_head(rows: ScanRows) -> ScanRows:
    """Delta rows with a query and key for each value head, without the dimension of steps where there is one."""
    repeats = rows.v.shape[3] // rows.q.shape[2]
    q, k = rows.q.repeat_interleave(repeats, dim=2), rows.k.repeat_interleave(repeats, dim=3)
    return ScanRows(q, k, rows.v, rows.g, rows.beta)


def read_delta(rows: ScanRows) -> Tensor:
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    q, k, v, _, beta, _ = for_each_head(rows)
    one_step = (unscaled(q), k[:, :, 0], v[:, :, 0], beta[:, :, 0])
    return delta_rule_recurrence(*(x.transpose(1, 2) for x in one_step))[0].transpose(1, 2)


def read_gated_delta(rows: ScanRows) -> Tensor:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    q, k, v, g, beta, _ = for_each_head(rows)
    return naive_recurrent_gated_delta_rule(q, k[:, :, 0], v[:, :, 0], beta[:, :, 0], g, scale=1.0)[0]


def read_gated_delta_chunks(rows: ScanRows) -> Tensor:
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    q, k, v, g, beta, _ = for_each_head(rows)
    return naive_chunk_gated_delta_rule(q, k[:, :, 0], v[:, :, 0], g, beta[:, :, 0], chunk_size=16, scale=1.0)[0]


def read_delta_product(rows: ScanRows) -> Tensor:
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product

    q, k, v, g, beta, _ = for_each_head(rows)
    steps = (x.flatten(1, 2) for x in (k, v))
    return naive_recurrent_gated_delta_product(q, *steps, g, beta.flatten(1, 2), 1.0, num_householder=rows.v.shape[2])[
        0
    ]


def read_gated_delta_2(rows: ScanRows) -> Tensor:
    """The peer multiplies keys and values by gates itself: what ours asks with, over the key, is one; values are written whole."""
    from fla.ops.gdn2.naive import naive_recurrent_gdn2

    assert rows.erase is not None
    k, v = rows.k[:, :, 0], rows.v[:, :, 0]
    return naive_recurrent_gdn2(rows.q, k, v, rows.g, rows.erase / k, torch.ones_like(v), scale=1.0)[0]


def read_decay_a_channel(rows: ScanRows) -> Tensor:
    from fla.ops.gla.naive import naive_recurrent_gla

    return naive_recurrent_gla(unscaled(rows.q), rows.k, rows.v, rows.g)[0]


def read_decay_a_head(rows: ScanRows) -> Tensor:
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    return naive_recurrent_simple_gla(rows.q, rows.k, rows.v, rows.g, scale=1.0)[0]


def read_retention(rows: ScanRows) -> Tensor:
    """With the peer's own decays of heads."""
    from fla.ops.retention.naive import naive_retention

    return naive_retention(*(x.transpose(1, 2) for x in (unscaled(rows.q), rows.k, rows.v))).transpose(1, 2)


def read_no_decay(rows: ScanRows) -> Tensor:
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    return naive_recurrent_linear_attn(rows.q, rows.k, rows.v, scale=1.0)[0]


def read_comba(feedback_H: Tensor, rows: ScanRows) -> Tensor:
    """The peer takes what it asks with apart: b k of each head."""
    from fla.ops.comba.naive import naive_recurrent_comba

    q, k, v, g, beta, _ = for_each_head(rows)
    k, v, b_H1 = k[:, :, 0], v[:, :, 0], feedback_H.sigmoid()[:, None]
    return naive_recurrent_comba(q, k, v * b_H1, b_H1 * k, beta[:, :, 0] / b_H1[:, 0], g, scale=1.0)[0]


def read_mesa(rows: ScanRows) -> Tensor:
    """Solved exactly by the peer."""
    from fla.ops.mesa_net.naive import naive_mesa_net_exact

    assert rows.erase is not None
    return naive_mesa_net_exact(rows.q, rows.k, rows.v, rows.g, rows.erase[0, 0], rows.beta)[0]


def read_log_linear(rows: ScanRows) -> Tensor:
    """Of all pairs of tokens; the peer's keys and queries are those of one group."""
    from fla.ops.log_linear_attn.naive import construct_H_matrix

    assert rows.g is not None and rows.erase is not None
    weights = construct_H_matrix(rows.g.permute(0, 2, 1), rows.erase.permute(0, 2, 3, 1))
    scores = torch.einsum("bhts,bthk,bshk->bhts", weights, rows.q, rows.k)
    return torch.einsum("bhts,bshv->bthv", scores, rows.v)


def read_two_updates(rows: ScanRows) -> Tensor:
    """RWKV-7's are those of diagonal plus low rank."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    assert rows.beta is not None and rows.erase is not None
    inputs = (unscaled(rows.q), rows.k, rows.v, rows.erase, -rows.beta * rows.erase, rows.g)
    return dplr_recurrence(*(x.transpose(1, 2) for x in inputs))[0].transpose(1, 2)  # type: ignore[union-attr]


def read_weights_that_sum_to_1(rows: ScanRows) -> Tensor:
    """Divided by the peer; the last column, by which the mixer would divide, is 1."""
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    read = naive_recurrent_linear_attn(rows.q, rows.k, rows.v[..., :-1].contiguous(), scale=1.0, normalize=True)[0]
    return torch.nn.functional.pad(read, (0, 1), value=1.0)


PEERS: list[tuple[str, Read, dict[str, Any]]] = [
    ("deltanet", read_delta, {}),
    ("deltanet", read_delta, {"allow_negative_eigenvalues": True}),
    ("gated_deltanet", read_gated_delta, {}),
    ("gated_deltanet", read_gated_delta_chunks, {}),
    ("deltaproduct", read_delta_product, {}),
    ("deltaproduct", read_delta_product, {"num_steps": 3, "decay": False, "allow_negative_eigenvalues": False}),
    ("gdn2", read_gated_delta_2, {}),
    ("gla", read_decay_a_channel, {}),
    ("hgrn2", read_decay_a_channel, {}),
    ("lightnet", read_decay_a_channel, {}),
    ("lightning", read_decay_a_head, {}),
    ("log_linear", read_log_linear, {"max_tokens": 64}),
    ("mesa", read_mesa, {"value_head_dim": 6}),
    ("plstm", read_decay_a_head, {}),
    ("retnet", read_retention, {}),
    ("rwkv7", read_two_updates, {}),
    ("transnormer", read_no_decay, {}),
    ("hedgehog", read_weights_that_sum_to_1, {}),
]


@pytest.mark.parametrize(("name", "read", "options"), PEERS)
def test_the_recurrence_equals_the_peers(name: str, read: Read, options: dict[str, Any]) -> None:
    mixers = {name: sample_options(name) | options}
    ours, twin = (our_mixer("{" + name + "}", **mixers) for _ in range(2))
    assert_recurrences_equal(ours, twin, read)


def test_combas_recurrence_equals_the_peers() -> None:
    ours, twin = (our_mixer("{comba}", comba=sample_options("comba")) for _ in range(2))
    assert_recurrences_equal(ours, twin, partial(read_comba, twin.feedback_logit))


def assert_recurrences_equal(ours: Any, twin: Any, read: Read) -> None:
    """Outputs and the gradients of input and weights, of a mixer and of one whose recurrence is a peer's."""
    twin.recurrence = PeerRecurrence(read)
    compare(whole_rows(ours), whole_rows(twin))
    x_BTD = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    for mixer in (ours, twin):
        whole_rows(mixer)(x_BTD).square().sum().backward()
    for (key, weight), other in zip(ours.named_parameters(), twin.parameters()):
        assert other.grad is not None and float(other.grad.abs().max()) > 0, key
        assert_near(weight.grad, other.grad, 5 * FLOAT32, key)


def test_lightnets_running_softmax_is_that_of_torch() -> None:
    # The peer makes keys and gates in the function that then calls its GPU kernel.
    mixer = our_mixer("{lightnet}", lightnet=sample_options("lightnet"))
    seen: list[ScanRows] = []

    def read(rows: ScanRows) -> Tensor:
        seen.append(rows)
        return rows.v

    mixer.recurrence = PeerRecurrence(read)
    x_BTD = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    parts, _ = mixer.project(x_BTD)
    mixer.mix(parts, PackMeta.one_document_a_row(ROWS, TOKENS))
    k_BTHK, (rows,) = mixer.heads(parts["k"]), seen
    z_BTHK = k_BTHK.logcumsumexp(1)
    assert_near(rows.k, (k_BTHK - z_BTHK).exp(), FLOAT32, "keys")
    assert rows.g is not None
    assert_near(rows.g[:, 1:], -z_BTHK.diff(dim=1), FLOAT32, "gates")


def test_window_equals_the_peers_attention() -> None:
    from fla.ops.attn.naive import naive_parallel_attn

    model = small_model(mixer_config("window", blocks=1), dtype=torch.float32)
    mixer: Any = model.blocks[0].mixer
    meta = PackMeta.one_document_a_row(ROWS, TOKENS)

    def peer(x_BTD: Tensor) -> Tensor:
        q, k, v = mixer._heads(x_BTD @ mixer.in_proj.weight.mT, meta)
        o_BTX = naive_parallel_attn(q, k, v, window_size=mixer.options.window)[0].flatten(-2)
        return mixer.out_proj(o_BTX * torch.sigmoid(x_BTD @ mixer.g_proj.weight.mT))

    compare(lambda x_BTD: mixer(x_BTD, meta).y_BTD, peer)


def test_forgetting_attention_equals_the_peers() -> None:
    from fla.ops.forgetting_attn.naive import naive_forgetting_attn

    mixer: Any = small_model(mixer_config("fox", blocks=1), dtype=torch.float32).blocks[0].mixer
    generator = torch.Generator().manual_seed(2)
    # Biases begin at zero: let every head forget.
    mixer.f_proj.bias.data -= torch.rand(mixer.num_heads, generator=generator)
    meta = PackMeta.one_document_a_row(ROWS, TOKENS)

    def peer(x_BTD: Tensor) -> Tensor:
        q, k, v = mixer._heads(mixer.in_proj(x_BTD), meta)
        o_BTHK = naive_forgetting_attn(q, k, v, torch.nn.functional.logsigmoid(mixer.f_proj(x_BTD)))
        gated_BTHK = o_BTHK if mixer.g_proj is None else gate_heads(o_BTHK, mixer.g_proj(x_BTD))
        return mixer.out_proj(gated_BTHK.flatten(-2))

    compare(lambda x_BTD: mixer(x_BTD, meta).y_BTD, peer)


def test_mamba1_equals_the_peers_layer() -> None:
    from fla.layers.mamba import Mamba

    mixer: Any = our_mixer("{mamba1}", mamba1={"inner_size": 24, "state_size": 5, "dt_rank": 3, "chunk_size": 8})
    peer = Mamba(hidden_size=WIDTH, intermediate_size=24, state_size=5, dt_rank=3, use_conv_bias=False)
    # Its own SiLU is a GPU kernel.
    peer.act = torch.nn.SiLU()
    put(peer, mamba1_weights(mixer))
    compare(whole_rows(mixer), lambda x_BTD: peer(x_BTD)[0])


def test_mom_equals_the_peers_recurrence_in_each_memory() -> None:
    # The peer's own routing sorts tokens by memory with an unstable sort, which shuffles them in time on a processor with
    # AVX-512, and its layer norms the sum of memories and not each. So memories are taken one after another here.
    ours, twin = (
        small_model(mixer_config("mom over gated_deltanet", blocks=1), dtype=torch.float32).blocks[0].mixer.eval()
        for _ in range(2)
    )
    twin.inner.recurrence = PeerRecurrence(read_gated_delta)
    compare(lambda x_BTD: ours(x_BTD, PackMeta.one_document_a_row(ROWS, TOKENS)).y_BTD, lambda x: one_by_one(twin, x))


def one_by_one(mixer: Any, x_BTD: Tensor) -> Tensor:
    """Each row's memories from the tokens that chose them, and the shared one from all."""
    inner, options = mixer.inner, mixer.options
    parts, _ = inner.project(x_BTD)
    weights_BTK, memory_BTK = (x_BTD @ mixer.router.mT).softmax(-1).topk(options.top_k, dim=-1)
    weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdim=True)
    rows = []
    for row in range(ROWS):
        total_TI = 0.0
        for memory in range(options.num_memories + 1):
            weight_T = (weights_BTK[row] * (memory_BTK[row] == memory)).sum(-1)
            if memory == options.num_memories:
                weight_T = torch.ones(TOKENS)
            token_S = weight_T.nonzero()[:, 0]
            own = {name: part[row : row + 1, token_S] for name, part in parts.items()}
            o_1SHV = inner.mix(own, PackMeta.one_document_a_row(1, len(token_S)))
            y_SI = inner.output(o_1SHV, own)[0] * weight_T[token_S, None]
            total_TI = total_TI + y_SI.new_zeros(TOKENS, y_SI.shape[1]).index_copy(0, token_S, y_SI)
        rows.append(total_TI)
    return inner.out_proj(torch.stack(rows))
