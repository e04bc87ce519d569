"""Trials of Mamba2's mixer from its projection to its output: documents, groups, states that are made again, long rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.common.documents import first_tokens
from amfm.kernels.mamba2.op import MixerSizes, mamba2_mix
from amfm.kernels.proof.cases.case import EPSILON, Inputs
from amfm.kernels.proof.trials.trial import Sized, Trial, documents

SUMS = {"A_log": "dt", "dt_bias": "dt"}


def mixer_trial(
    inputs: Inputs, tokens: int, heads: int, groups: int = 1, *, model: int = 64, head_dim: int = 64, state: int = 128,
    norm_groups: int = 1, width: int = 4, chunk: int = 64, lengths: tuple[int, ...] = (), keep: bool = True, rows: int = 1,
    exact: str = "reference",
) -> Trial:  # fmt: skip
    """The parts of the projection are leaves of their own, so that each one's gradient is judged by its own size."""
    sizes = MixerSizes(heads, head_dim, groups, state, norm_groups, EPSILON)
    names = ("z", "x", "B", "C", "dt")
    widths = (sizes.inner, sizes.inner, groups * state, groups * state, heads)
    leaves = {name: inputs.normal(rows, tokens, each) for name, each in zip(names, widths)}
    leaves |= {
        "conv_weight": inputs.normal(sizes.channels, width, scale=0.5),
        "conv_bias": inputs.normal(sizes.channels, scale=0.1),
        "A_log": inputs.uniform(heads, low=-0.5, high=0.5),
        "D": inputs.uniform(heads, low=0.5, high=1.5),
        "dt_bias": inputs.uniform(heads, low=-2.0, high=-1.0),
        "norm_weight": inputs.normal(sizes.inner),
        "out_weight": inputs.normal(model, sizes.inner, scale=sizes.inner**-0.5),
    }
    starts = first_tokens(documents(inputs, tokens, *lengths, rows=rows)) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        z, x, B, C, dt, conv, bias, A_log, D, dt_bias, norm, out = given.values()
        projected = torch.cat((z, x, B, C, dt), dim=-1)
        mixed = mamba2_mix(
            projected, conv, bias, A_log, D, dt_bias, norm, out, sizes,
            document_starts_BT=starts, chunk_size=chunk, keep_states=keep, backend=backend,
        )  # fmt: skip
        return {"out": mixed}

    return Trial(leaves, run, SUMS, exact)


def mixer_trials() -> Iterator[Sized]:
    """Both chunk sizes of the kernel, heads and groups that tensor ranks have, and heads that share a group's sums."""
    for chunk, lengths in ((64, (40, 1, 23)), (128, (128, 20, 45))):
        build = partial(mixer_trial, tokens=193, heads=2, chunk=chunk, lengths=lengths, keep=chunk == 64)
        yield Sized(f"mixer with documents, chunks of {chunk}", "first", build)
    yield Sized("mixer, one token", "small", partial(mixer_trial, tokens=1, heads=1, chunk=16))
    yield Sized(
        "mixer, two groups, two rows, uneven sizes", "small",
        partial(
            mixer_trial, tokens=70, heads=4, groups=2, model=40, head_dim=40, state=72, norm_groups=2, width=3, chunk=32,
            rows=2, lengths=(3, 60, 7),
        ),
    )  # fmt: skip
    long = partial(mixer_trial, tokens=8205, model=1024, lengths=(4000, 1, 63, 4141), exact="torch")
    yield Sized(
        "mixer, 128 heads, documents, states made again", "long", partial(long, heads=128, chunk=128, keep=False)
    )
    yield Sized("mixer, 24 heads in 4 groups", "long", partial(long, heads=24, groups=4, norm_groups=4))
