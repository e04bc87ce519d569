"""Trials of what stands around the scans: attention, convolution, norms, rotation, activations, experts, router, head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.attention.op import attention, fastest_backend
from amfm.kernels.attention.varlen import DocumentEnds
from amfm.kernels.causal_conv1d.op import causal_conv1d
from amfm.kernels.linear_cross_entropy.op import linear_cross_entropy, linear_statistics
from amfm.kernels.moe.op import expert_feed_forward, grouped_feed_forward, route
from amfm.kernels.moe.rows.op import combine_choices, gather_choices, put_in_slots, sort_choices, sort_rows
from amfm.kernels.norm.op import gated_rms_norm, rms_norm
from amfm.kernels.proof.cases.case import EPSILON, Inputs
from amfm.kernels.proof.trials.trial import Sized, Trial, documents, slices
from amfm.kernels.rope.op import qk_norm_rope, rope_frequencies
from amfm.kernels.swiglu.op import squared_relu, swiglu


def attention_trial(
    inputs: Inputs, tokens: int, heads: int, kv_heads: int, size: int, *, keys: int | None = None,
    lengths: tuple[int, ...] = (), window: int | None = None, exact: str = "reference",
) -> Trial:  # fmt: skip
    """Causal attention; `keys` more than `tokens` are a cache before the queries."""
    keys = keys or tokens
    leaves = {"q": inputs.normal(1, tokens, heads, size)}
    leaves |= {name: inputs.normal(1, keys, kv_heads, size) for name in ("k", "v")}
    ids = documents(inputs, keys, *lengths) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        q, k, v = given.values()
        return {"y": attention(q, k, v, document_ids_BS=ids, window=window, backend=backend)}

    return Trial(leaves, run, exact=exact)


def packed_attention_trial(
    inputs: Inputs, heads: int, kv_heads: int, size: int, *, lengths: tuple[int, ...], window: int | None = None
) -> Trial:
    """Documents as a model has them, by what is fastest for them: on a card PyTorch's variable-length attention."""
    tokens = sum(lengths)
    leaves = {"q": inputs.normal(1, tokens, heads, size)}
    leaves |= {name: inputs.normal(1, tokens, kv_heads, size) for name in ("k", "v")}
    ids = documents(inputs, tokens, *lengths)
    offsets = torch.tensor([0, *lengths], device=inputs.device).cumsum(0).to(torch.int32)
    ends = DocumentEnds(offsets, max(lengths))

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        q, k, v = given.values()
        chosen = fastest_backend(backend, q, has_documents=True, keys=tokens, document_ends=ends)
        y = attention(q, k, v, document_ids_BS=ids, window=window, document_ends=ends, backend=chosen)
        return {"y": y}

    return Trial(leaves, run)


def attention_trials() -> Iterator[Sized]:
    """Heads of 64 and 128, documents, windows, a cache."""
    for size in (64, 128):
        build = partial(attention_trial, tokens=200, heads=2, kv_heads=1, size=size, lengths=(70, 1, 129))
        yield Sized(f"head {size} with documents", "first", build)
    yield Sized(
        "a query behind a cache", "small", partial(attention_trial, tokens=1, heads=4, kv_heads=2, size=8, keys=20)
    )
    yield Sized("uneven head", "small", partial(attention_trial, tokens=63, heads=2, kv_heads=2, size=20))
    windowed = partial(attention_trial, tokens=35, keys=70, heads=2, kv_heads=1, size=16, lengths=(20, 30, 19, 1))
    yield Sized("window and cache", "small", partial(windowed, window=18))
    packed = partial(packed_attention_trial, heads=4, kv_heads=2, size=64, lengths=(40, 1, 29))
    yield Sized("documents as a model has them", "small", packed)
    yield Sized("documents as a model has them, with a window", "small", partial(packed, window=13))
    long = partial(attention_trial, tokens=8205, heads=3, kv_heads=1, size=128, exact="torch")
    yield Sized("long row with documents", "long", partial(long, lengths=(4000, 1, 63, 4141)))
    yield Sized("long row with a window", "long", partial(long, window=1000))


def convolution_trials() -> Iterator[Sized]:
    """Width 4 as models have it; slices of a wider projection; other widths."""

    def trial(
        inputs: Inputs, rows: int, tokens: int, channels: int, width: int = 4, *, lengths: tuple[int, ...] = (),
        before: int = 0, initial: bool = False, exact: str = "reference",
    ) -> Trial:  # fmt: skip
        x = slices(inputs.normal(rows, tokens, before + channels), before, channels)[1]
        leaves = {"x": x, "weight": inputs.normal(channels, width, scale=0.5), "bias": inputs.normal(channels)}
        if initial:
            leaves["window"] = inputs.normal(rows, width - 1, channels)
        ids = documents(inputs, tokens, *lengths, rows=rows) if lengths else None

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            return {
                "y": causal_conv1d(
                    given["x"], given["weight"], given["bias"], document_ids_BT=ids,
                    initial_window_BWC=given.get("window"), backend=backend,
                )
            }  # fmt: skip

        return Trial(leaves, run, exact=exact)

    yield Sized("with documents", "first", partial(trial, rows=2, tokens=100, channels=136, lengths=(40, 1, 59)))
    yield Sized(
        "width 3 behind a window", "small", partial(trial, rows=2, tokens=40, channels=33, width=3, initial=True)
    )
    yield Sized("an unaligned slice", "small", partial(trial, rows=1, tokens=35, channels=41, before=7))
    long = partial(trial, rows=1, tokens=8205, lengths=(4000, 1, 4204), exact="torch")
    yield Sized("8448 channels of a projection", "long", partial(long, channels=8448, before=8192))
    yield Sized("1560 channels, unaligned", "long", partial(long, channels=1560, before=1537))


def norm_trials() -> Iterator[Sized]:
    """With the residual stream's sum, and gated in groups."""

    def trial(
        inputs: Inputs, rows: int, width: int, *, groups: int = 0, residual: bool = False, exact: str = "reference"
    ) -> Trial:
        leaves = {"x": inputs.normal(rows, width)}
        if groups or residual:
            leaves["z" if groups else "residual"] = inputs.normal(rows, width)
        leaves["weight"] = inputs.normal(width)

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            x, weight = given["x"], given["weight"]
            if groups:
                return {"y": gated_rms_norm(x, given["z"], weight, EPSILON, num_groups=groups, backend=backend)}
            if residual:
                y, h = rms_norm(x, weight, EPSILON, residual=given["residual"], backend=backend)
                return {"y": y, "h": h}
            return {"y": rms_norm(x, weight, EPSILON, backend=backend)}

        return Trial(leaves, run, exact=exact)

    yield Sized("with residual, 1024 wide", "first", partial(trial, rows=37, width=1024, residual=True))
    yield Sized("gated, groups of 512", "first", partial(trial, rows=37, width=1024, groups=2))
    yield Sized("uneven width", "small", partial(trial, rows=63, width=129))
    yield Sized("gated, 8 uneven groups", "small", partial(trial, rows=9, width=24, groups=8))
    yield Sized("with residual, 4096 wide", "long", partial(trial, rows=8205, width=4096, residual=True, exact="torch"))
    yield Sized("gated, 8192 wide", "long", partial(trial, rows=8205, width=8192, groups=1, exact="torch"))
    yield Sized("gated, 3072 wide in 3 groups", "long", partial(trial, rows=8205, width=3072, groups=3, exact="torch"))


def rope_trials() -> Iterator[Sized]:
    """With and without the norm of queries and keys; a part of the channels rotated."""

    def trial(
        inputs: Inputs, tokens: int, heads: int, kv_heads: int, size: int, *, rotated: int, norm: bool = True,
        exact: str = "reference",
    ) -> Trial:  # fmt: skip
        frequencies, factor = rope_frequencies(rotated, theta=10000.0)
        frequencies, positions = frequencies.to(inputs.device), torch.arange(tokens, device=inputs.device)[None]
        leaves = {"q": inputs.normal(1, tokens, heads, size), "k": inputs.normal(1, tokens, kv_heads, size)}
        if norm:
            leaves |= {"q_weight": inputs.normal(size), "k_weight": inputs.normal(size)}

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            q, k = qk_norm_rope(
                given["q"], given["k"], positions, frequencies, factor, q_weight_K=given.get("q_weight"),
                k_weight_K=given.get("k_weight"), backend=backend,
            )  # fmt: skip
            return {"q": q, "k": k}

        return Trial(leaves, run, exact=exact)

    yield Sized(
        "heads of 128 with norm", "first", partial(trial, tokens=40, heads=4, kv_heads=1, size=128, rotated=128)
    )
    yield Sized(
        "part of a head", "small", partial(trial, tokens=63, heads=3, kv_heads=3, size=24, rotated=16, norm=False)
    )
    long = partial(trial, tokens=8205, heads=32, kv_heads=8, size=128, exact="torch")
    yield Sized("long row", "long", partial(long, rotated=128))


def activation_trials() -> Iterator[Sized]:
    """SwiGLU and the squared ReLU."""

    def gated(inputs: Inputs, rows: int, width: int) -> Trial:
        leaves = {"gate_up": inputs.normal(rows, 2 * width)}
        return Trial(leaves, lambda given, backend: {"y": swiglu(given["gate_up"], backend=backend)}, exact="torch")

    def squared(inputs: Inputs, rows: int, width: int) -> Trial:
        leaves = {"x": inputs.normal(rows, width)}
        return Trial(leaves, lambda given, backend: {"y": squared_relu(given["x"], backend=backend)}, exact="torch")

    yield Sized("SwiGLU", "first", partial(gated, rows=33, width=600))
    yield Sized("squared ReLU", "first", partial(squared, rows=33, width=600))
    yield Sized("SwiGLU, one row of 7", "small", partial(gated, rows=1, width=7))
    yield Sized("SwiGLU, long", "long", partial(gated, rows=8205, width=12288))
    yield Sized("squared ReLU, long", "long", partial(squared, rows=8205, width=12288))


def expert_trials() -> Iterator[Sized]:
    """Both activations, with experts that nobody chose, and one expert that all chose."""

    def trial(
        inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int, *, chosen: int | None = None,
        activation: str = "swiglu", exact: str = "reference",
    ) -> Trial:  # fmt: skip
        ids = torch.randn(tokens, chosen or experts, device=inputs.device).topk(top_k).indices
        rows = 2 * width if activation == "swiglu" else width
        leaves = {"x": inputs.normal(tokens, model), "weights": inputs.uniform(tokens, top_k, low=0.1)}
        leaves["up"] = inputs.normal(experts, rows, model, scale=model**-0.5)
        leaves["down"] = inputs.normal(experts, model, width, scale=width**-0.5)

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            x, weights, up, down = given.values()
            return {"y": expert_feed_forward(x, ids, weights, up, down, activation=activation, backend=backend)}

        return Trial(leaves, run, exact=exact)

    def sent(inputs: Inputs, tokens: int, model: int, experts: int, width: int, *, slots: int | None = None) -> Trial:
        """Rows as ranks exchange them, the second half first, some choices lost."""
        ids = torch.randn(tokens, experts, device=inputs.device).topk(2).indices
        ids[: tokens // 4, 1] = experts
        leaves = {"x": inputs.normal(tokens, model), "weights": inputs.uniform(tokens, 2, low=0.1)}
        leaves["up"] = inputs.normal(experts, 2 * width, model, scale=model**-0.5)
        leaves["down"] = inputs.normal(experts, model, width, scale=width**-0.5)
        counts = torch.bincount(ids.flatten(), minlength=experts + 1)[:experts]
        count = int(counts.sum()) if slots is None else experts * slots
        of_row = torch.arange(experts, device=inputs.device)
        if slots is None:
            of_row = of_row.repeat_interleave(counts)
        else:
            is_filled = torch.arange(slots, device=inputs.device) < counts[:, None]
            of_row = torch.where(is_filled, of_row[:, None], experts).flatten()
            counts[-1] += count - counts.sum()
        arrived = torch.arange(count, device=inputs.device).roll(count // 2)

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            x, weights, up, down = given.values()
            choices = sort_choices(ids, experts + 1, backend=backend)
            choices = choices if slots is None else put_in_slots(choices, ids, slots)
            rows = gather_choices(x, choices, count, 2)
            sources = sort_rows(of_row[arrived], experts + 1, backend=backend)
            y = grouped_feed_forward(
                rows[arrived], counts, up, down, activation="swiglu", sources_R=sources, backend=backend
            )
            return {"y": combine_choices(y[arrived.argsort()], choices, weights)}

        return Trial(leaves, run)

    small = partial(trial, tokens=70, model=64, experts=6, width=48, top_k=2)
    yield Sized("SwiGLU, empty experts", "first", partial(small, chosen=4))
    yield Sized("squared ReLU", "first", partial(small, activation="squared_relu"))
    yield Sized("rows of several ranks", "first", partial(sent, tokens=70, model=64, experts=6, width=48))
    yield Sized("rows in slots", "small", partial(sent, tokens=40, model=50, experts=4, width=37, slots=40))
    yield Sized("one expert", "small", partial(trial, tokens=7, model=50, experts=1, width=37, top_k=1))
    long = partial(trial, tokens=8205, model=1024, top_k=8, exact="torch")
    yield Sized("128 experts, 28 of them empty", "long", partial(long, experts=128, width=512, chosen=100))
    yield Sized("8 experts, squared ReLU", "long", partial(long, experts=8, width=1536, activation="squared_relu"))


def router_trials() -> Iterator[Sized]:
    """Granite's softmax and DeepSeek-V3's sigmoid with bias in groups; the best experts' ids are not compared, ties are."""

    def trial(
        inputs: Inputs, tokens: int, experts: int, top_k: int, *, groups: tuple[int, int] = (1, 1), bias: bool = False
    ) -> Trial:
        leaves = {"logits": inputs.normal(tokens, experts, scale=3.0, dtype=torch.float32)}
        biases = inputs.normal(experts, scale=0.3, dtype=torch.float32).detach() if bias else None

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            routing = route(
                given["logits"], biases, score="sigmoid" if bias else "softmax", top_k=top_k, normalize=True,
                scaling=2.5, num_groups=groups[0], group_top_k=groups[1], backend=backend,
            )  # fmt: skip
            return {"weights": routing.weights_RK, "scores": routing.scores_RE}

        return Trial(leaves, run, exact="torch")

    yield Sized("softmax, 72 experts", "first", partial(trial, tokens=40, experts=72, top_k=10))
    yield Sized("sigmoid in groups", "first", partial(trial, tokens=40, experts=128, top_k=8, groups=(8, 4), bias=True))
    yield Sized("five experts", "small", partial(trial, tokens=1, experts=5, top_k=2))
    yield Sized("softmax, 512 experts", "long", partial(trial, tokens=8205, experts=512, top_k=22))


def head_trials() -> Iterator[Sized]:
    """The loss with ignored rows, whole and as a tensor rank's share of the vocabulary."""

    def whole(inputs: Inputs, rows: int, model: int, vocabulary: int, exact: str = "reference") -> Trial:
        labels = torch.randint(0, vocabulary, (rows,), device=inputs.device)
        labels[::5] = -100
        leaves = {"hidden": inputs.normal(rows, model), "weight": inputs.normal(vocabulary, model, scale=model**-0.5)}

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            hidden, weight = given.values()
            loss = linear_cross_entropy(hidden, weight, labels, z_loss_weight=1e-3, backend=backend)
            return {"total": loss.total, "token losses": loss.token_nll_R}

        return Trial(leaves, run, exact=exact)

    def share(inputs: Inputs, rows: int, model: int, vocabulary: int) -> Trial:
        labels = torch.randint(0, 2 * vocabulary, (rows,), device=inputs.device)
        leaves = {"hidden": inputs.normal(rows, model), "weight": inputs.normal(vocabulary, model, scale=model**-0.5)}

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            hidden, weight = given.values()
            log_sum, target = linear_statistics(hidden, weight, labels, first_row=vocabulary // 2, backend=backend)
            return {"log sums": log_sum, "targets": target}

        return Trial(leaves, run, exact="torch")

    yield Sized("ignored rows", "first", partial(whole, rows=100, model=96, vocabulary=260))
    yield Sized("a share of the vocabulary", "first", partial(share, rows=100, model=96, vocabulary=260))
    yield Sized("uneven sizes", "small", partial(whole, rows=63, model=12, vocabulary=101))
    yield Sized("100352 tokens", "long", partial(whole, rows=2051, model=2048, vocabulary=100352, exact="torch"))
    yield Sized("a share of 50176", "long", partial(share, rows=2051, model=2048, vocabulary=50176))
