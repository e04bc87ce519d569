"""Trials of the decaying scans: Mamba2's, with a gate a head, with a gate a key channel, and the first Mamba's.

Documents end inside chunks, at their ends and after one token; heads and groups are also those that tensor ranks have; long
rows with few heads are cut into segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.decay_scan.op import decay_scan, mamba2_scan
from amfm.kernels.diag_scan.op import diag_scan
from amfm.kernels.proof.cases.case import Inputs
from amfm.kernels.proof.trials.trial import Sized, Trial, documents, slices

SUMS = {"A_log": "dt", "dt_bias": "dt"}


def mamba2_trial(
    inputs: Inputs, tokens: int, heads: int, groups: int = 1, *, head_dim: int = 64, state: int = 128, chunk: int = 64,
    lengths: tuple[int, ...] = (), initial: bool = False, keep: bool = True, sliced: bool = False, rows: int = 1,
    exact: str = "reference",
) -> Trial:  # fmt: skip
    """Mamba2's scan; `sliced`: x, B and C are slices of one projection."""
    H, P, G, N = heads, head_dim, groups, state
    widths = (H * P, G * N, G * N)
    if sliced:
        x, B, C = slices(inputs.normal(rows, tokens, sum(widths)), *widths)
        shaped = (x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)))
        x, B, C = (each.detach().requires_grad_() for each in shaped)
    else:
        x, B, C = (
            inputs.normal(rows, tokens, H, P),
            inputs.normal(rows, tokens, G, N),
            inputs.normal(rows, tokens, G, N),
        )
    B = (B.detach() * N**-0.5).requires_grad_() if not sliced else B
    leaves = {
        "x": x,
        "dt": inputs.normal(rows, tokens, H),
        "A_log": inputs.uniform(H, low=-0.5, high=0.5),
        "B": B,
        "C": C,
    }
    leaves |= {"D": inputs.uniform(H, low=0.5, high=1.5), "dt_bias": inputs.uniform(H, low=-2.0, high=-1.0)}
    if initial:
        leaves["initial"] = inputs.normal(rows, H, P, N, dtype=torch.float32)
    ids = documents(inputs, tokens, *lengths, rows=rows) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        names = ("x", "dt", "A_log", "B", "C", "D", "dt_bias")
        out = mamba2_scan(
            *(given[name] for name in names), document_ids_BT=ids, initial_state_BHPN=given.get("initial"),
            chunk_size=chunk, keep_states=keep, backend=backend,
        )  # fmt: skip
        return {"y": out.y_BTHP, "final state": out.final_state_BHPN}

    return Trial(leaves, run, SUMS, exact)


def decay_trial(
    inputs: Inputs, tokens: int, heads: int, key: int, value: int, *, chunk: int = 64, channels: bool = False,
    lengths: tuple[int, ...] = (), initial: bool = False, keep: bool = True, exact: str = "reference",
) -> Trial:  # fmt: skip
    """Linear attention with decay, a gate a head or, with `channels`, a gate a key channel."""
    leaves = {name: inputs.normal(1, tokens, heads, key, scale=key**-0.5) for name in ("q", "k")}
    leaves["v"] = inputs.normal(1, tokens, heads, value)
    leaves["g"] = inputs.uniform(1, tokens, heads, *((key,) if channels else ()), low=-0.5)
    with torch.no_grad():
        leaves["g"].clamp_(max=0.0)
    if initial:
        leaves["initial"] = inputs.normal(1, heads, key, value, dtype=torch.float32)
    ids = documents(inputs, tokens, *lengths) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        out = decay_scan(
            given["q"], given["k"], given["v"], given["g"], document_ids_BT=ids, initial_state_BHKV=given.get("initial"),
            chunk_size=chunk, keep_states=keep, backend=backend,
        )  # fmt: skip
        return {"o": out.o_BTHV, "final state": out.final_state_BHKV}

    return Trial(leaves, run, exact=exact)


def selective_trial(
    inputs: Inputs, tokens: int, channels: int, state: int, *, rows: int = 1, lengths: tuple[int, ...] = (),
    initial: bool = False, exact: str = "reference",
) -> Trial:  # fmt: skip
    """The first Mamba's scan."""
    C, N = channels, state
    leaves = {"x": inputs.normal(rows, tokens, C), "dt": inputs.normal(rows, tokens, C)}
    leaves["A_log"] = torch.arange(1.0, N + 1, device=inputs.device).log().repeat(C, 1).requires_grad_()
    leaves |= {name: inputs.normal(rows, tokens, N, scale=0.5) for name in ("B", "C")}
    leaves |= {"D": inputs.uniform(C, low=0.5), "dt_bias": inputs.uniform(C, low=-2.0, high=-1.0)}
    if initial:
        leaves["initial"] = inputs.normal(rows, C, N, dtype=torch.float32)
    ids = documents(inputs, tokens, *lengths, rows=rows) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        names = ("x", "dt", "A_log", "B", "C", "D", "dt_bias")
        out = diag_scan(
            *(given[name] for name in names), document_ids_BT=ids, initial_state_BCN=given.get("initial"),
            backend=backend,
        )  # fmt: skip
        return {"y": out.y_BTC, "final state": out.final_state_BCN}

    return Trial(leaves, run, SUMS, exact)


def decay_scan_trials() -> Iterator[Sized]:
    """Mamba2 and a gate a head, at both chunk sizes of the kernel."""
    for chunk, lengths in ((64, (40, 1, 23)), (128, (128, 20, 45))):
        build = partial(mamba2_trial, tokens=193, heads=2, chunk=chunk, lengths=lengths, initial=True, keep=chunk == 64)
        yield Sized(f"Mamba2 with documents, chunks of {chunk}", "first", build)
    yield Sized("Mamba2, one token", "small", partial(mamba2_trial, tokens=1, heads=1, chunk=16, initial=True))
    yield Sized(
        "Mamba2, two groups, two rows, uneven sizes", "small",
        partial(mamba2_trial, tokens=100, heads=4, groups=2, head_dim=40, state=72, chunk=32, rows=2, lengths=(3, 90, 7)),
    )  # fmt: skip
    yield Sized("Mamba2, slices of a projection", "small", partial(mamba2_trial, tokens=63, heads=3, sliced=True))
    yield Sized("gate a head", "small", partial(decay_trial, tokens=129, heads=2, key=32, value=48, lengths=(70, 59)))
    yield Sized(
        "Mamba2, 128 heads and documents", "long",
        partial(mamba2_trial, tokens=8205, heads=128, chunk=128, lengths=(4000, 1, 63, 4141), keep=False, exact="torch"),
    )  # fmt: skip
    yield Sized(
        "Mamba2, 24 heads (48 on 2 tensor ranks), slices", "long",
        partial(mamba2_trial, tokens=8205, heads=24, groups=4, sliced=True, exact="torch"),
    )  # fmt: skip
    yield Sized(
        "Mamba2, 2 heads in segments", "long",
        partial(mamba2_trial, tokens=32771, heads=2, lengths=(20000, 12771), initial=True, exact="torch"),
    )  # fmt: skip
    yield Sized(
        "gate a head, states of 256 x 256", "long",
        partial(decay_trial, tokens=8205, heads=8, key=256, value=256, chunk=128, initial=True, exact="torch"),
    )  # fmt: skip


def vector_scan_trials() -> Iterator[Sized]:
    """A gate a key channel: HGRN2's states, GLA's, and uneven ones."""
    yield Sized(
        "HGRN2 with documents", "first",
        partial(decay_trial, tokens=150, heads=2, key=128, value=128, channels=True, lengths=(64, 1, 85), initial=True),
    )  # fmt: skip
    yield Sized(
        "uneven sizes, states made again", "small",
        partial(decay_trial, tokens=100, heads=1, key=40, value=24, channels=True, chunk=32, keep=False),
    )  # fmt: skip
    yield Sized(
        "GLA, K = 256", "long",
        partial(decay_trial, tokens=8205, heads=4, key=256, value=512, channels=True, lengths=(5000, 3205), exact="torch"),
    )  # fmt: skip


def diag_scan_trials() -> Iterator[Sized]:
    """The first Mamba with 16 state numbers a channel, and with few."""
    yield Sized(
        "16 states with documents", "first",
        partial(selective_trial, tokens=100, channels=24, state=16, lengths=(33, 1, 66), initial=True),
    )  # fmt: skip
    yield Sized("few states, two rows", "small", partial(selective_trial, tokens=63, channels=11, state=3, rows=2))
    yield Sized(
        "long row with documents", "long",
        partial(selective_trial, tokens=8205, channels=512, state=16, lengths=(4000, 1, 4204), exact="torch"),
    )  # fmt: skip


def delta_scan_trials() -> Iterator[Sized]:
    """Gated DeltaNet, DeltaProduct and Kimi Delta Attention."""
    from amfm.kernels.delta_scan.op import delta_scan

    def delta_trial(
        inputs: Inputs, tokens: int, key_heads: int, heads: int, *, steps: int = 1, key: int = 128, value: int = 128,
        channels: bool = False, lengths: tuple[int, ...] = (), initial: bool = False, exact: str = "reference",
    ) -> Trial:  # fmt: skip
        T, G, H, N = tokens, key_heads, heads, steps
        keys = F.normalize(torch.randn(1, T, N, G, key, device=inputs.device), dim=-1)
        leaves = {"q": inputs.normal(1, T, G, key, scale=key**-0.5), "k": keys.to(inputs.dtype).requires_grad_()}
        leaves |= {"v": inputs.normal(1, T, N, H, value), "beta": inputs.uniform(1, T, N, H)}
        leaves["g"] = inputs.uniform(1, T, H, *((key,) if channels else ()), low=-0.5, high=0.0)
        if initial:
            leaves["initial"] = inputs.normal(1, H, key, value, dtype=torch.float32)
        ids = documents(inputs, T, *lengths) if lengths else None

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            out = delta_scan(
                *(given[name] for name in ("q", "k", "v", "beta", "g")), document_ids_BT=ids,
                initial_state_BHKV=given.get("initial"), backend=backend,
            )  # fmt: skip
            return {"o": out.o_BTHV, "final state": out.final_state_BHKV}

        return Trial(leaves, run, exact=exact)

    with_documents = partial(delta_trial, tokens=130, lengths=(64, 1, 65), initial=True)
    yield Sized("gated, with documents", "first", partial(with_documents, key_heads=1, heads=2))
    yield Sized(
        "gates of channels, with documents", "first", partial(with_documents, key_heads=2, heads=2, channels=True)
    )
    yield Sized("two steps a token", "small", partial(delta_trial, tokens=50, key_heads=1, heads=2, steps=2))
    yield Sized("uneven sizes", "small", partial(delta_trial, tokens=100, key_heads=2, heads=2, key=72, value=40))
    long = partial(delta_trial, tokens=8205, lengths=(4000, 1, 4204), exact="torch")
    yield Sized("16 key heads, 32 heads, documents", "long", partial(long, key_heads=16, heads=32))
    yield Sized("states of 256 x 128", "long", partial(long, key_heads=4, heads=4, key=256))
    yield Sized("gates of channels", "long", partial(long, key_heads=8, heads=8, channels=True))
