"""Moving averages of each channel of a stream, on the diagonal scan of Mamba."""

from __future__ import annotations

import math

import torch
from amfm_mixers.diag_scan.op import diag_scan
from amfm_mixers.diag_scan.torch_impl import read_carried_state
from torch import Tensor

from amfm.model.packing import PackMeta
from amfm.model.parallel.context import receive_states
from amfm.model.parallel.groups import ProcessGroupCollection

ONE_STEP = math.log(math.e - 1)  # softplus of it is 1
SLOWEST, FASTEST = 0.01, 1.0  # rates of the first averages: half is forgotten in 69 tokens to one


def average(
    x_BTD: Tensor,
    log_rates_DN: Tensor,
    shares_DN: Tensor,
    meta: PackMeta,
    groups: ProcessGroupCollection,
    *,
    state_BCN: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """sum_n shares_n avg_n, avg_t = e^(-rate) avg_(t-1) + (1 - e^(-rate)) x_t a channel; and the averages after the last token.

    Every rank of `groups.cp` must call.
    """
    number, wide = log_rates_DN.shape[1], torch.promote_types(x_BTD.dtype, torch.float32)
    x_BTC = x_BTD.repeat_interleave(number, dim=-1)  # each average is its own channel with one state number
    segments = meta.segments
    ids_BT = meta.boundaries_BT() if segments is None else meta.document_ids_BT
    if segments is not None:
        x_BTC, ids_BT = segments.as_rows(x_BTC), segments.as_rows(ids_BT)
    steps_BTC = x_BTC.new_full(x_BTC.shape, ONE_STEP, dtype=wide)
    ones_BTN, zeros_C = x_BTC.new_ones(*x_BTC.shape[:2], 1), x_BTC.new_zeros(x_BTC.shape[-1])
    log_rates_C1 = log_rates_DN.to(wide).reshape(-1, 1)
    scanned = diag_scan(
        x_BTC,
        steps_BTC,
        log_rates_C1,
        ones_BTN,
        ones_BTN,
        zeros_C,
        zeros_C,
        document_ids_BT=ids_BT,
        initial_state_BCN=state_BCN,
        chunk_size=chunk_size,
        backend=backend,
    )
    y_BTC = scanned.y_BTC.to(wide)
    if segments is not None:
        by_row = (x_BTD.shape[0], 2)
        final, transfer = scanned.final_state_BCN[..., None], scanned.total_decay_BCN
        entering = receive_states(final.unflatten(0, by_row), transfer.unflatten(0, by_row), segments, groups)
        carried = read_carried_state(
            steps_BTC, log_rates_C1, ones_BTN, zeros_C, entering.flatten(0, 1)[..., 0], document_ids_BT=ids_BT
        )
        y_BTC = (y_BTC + carried).reshape(*x_BTD.shape[:2], -1)
    gain_C = shares_DN.to(wide).flatten() * (1 - (-log_rates_C1[:, 0].exp()).exp())
    h_BTD = (y_BTC * gain_C).unflatten(-1, (-1, number)).sum(-1)
    return h_BTD.to(x_BTD.dtype), scanned.final_state_BCN


def first_rates(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw log rates, log-uniform."""
    return torch.empty(shape).uniform_(math.log(SLOWEST), math.log(FASTEST), generator=generator)
