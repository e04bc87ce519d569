"""Routed experts: gather, grouped products, weighted sum; with the router before them where a block is timed.

The router's choice: scores, the best k, weights of the chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases import (
    CountedProblem,
    Goal,
    GpuSizes,
    HostSizes,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    formula_goals,
)
from amfm.kernels.linear.op import linear
from amfm.kernels.moe.capacity import drop_overflow, expert_capacity, recycle_overflow
from amfm.kernels.moe.op import (
    expert_feed_forward,
    feed_forward_bytes,
    feed_forward_flops,
    grouped_feed_forward,
    only_expert_feed_forward,
    route,
    route_bytes,
)
from amfm.kernels.moe.rows.op import (
    add_choices,
    choose_ranks,
    combine_choices,
    gather_choices,
    put_in_slots,
    row_bytes,
    sort_choices,
    sort_rows,
)
from amfm.kernels.swiglu.gate import find_gate

VALUE_BYTES = 2
RANKS = 4  # that hold the experts of `sent_problem`


def experts_problem(
    inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int, activation: str = "swiglu", *,
    chosen: int | None = None, exact: str = "reference",
) -> Problem:  # fmt: skip
    """Experts of inner width `width` over tokens whose choices are random and given, among the first `chosen` or all.

    Leaves: x [R, D], weights [R, K] float32, up [E, F, D], down [E, D, width]. Choices are fixed, so that every backend and
    every run does the same work.
    """
    ids = torch.randn(tokens, chosen or experts, device=inputs.device).topk(top_k).indices
    rows = width if find_gate(activation) is None else 2 * width
    leaves = {"x": inputs.normal(tokens, model), "weights": inputs.uniform(tokens, top_k, low=0.1)}
    leaves["up"] = inputs.normal(experts, rows, model, scale=model**-0.5)
    leaves["down"] = inputs.normal(experts, model, width, scale=width**-0.5)

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x, weights, up, down = given.values()
        return {"y": expert_feed_forward(x, ids, weights, up, down, activation=activation, backend=backend)}

    pairs, numbers = tokens * top_k, experts * model * (rows + width)
    # Read x, dy, hidden and weights; write dx and weight gradients; write and read the hidden gradient, the activation
    # and the rows of dx.
    moved = VALUE_BYTES * (3 * tokens * model + 2 * numbers + pairs * (3 * rows + 2 * width + 2 * model))
    flops = feed_forward_flops(pairs, model, width, activation)
    return Problem(
        leaves,
        run,
        f"{tokens}x{model}, {experts} experts x {width}, top {top_k}",
        Minimum(feed_forward_bytes(tokens, top_k, model, width, experts, activation, VALUE_BYTES), flops),
        Minimum(moved, 2 * flops),
        exact=exact,
    )


def block_problem(inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int) -> Problem:
    """The whole block of SwiGLU experts: router product, softmax over the chosen, experts.

    Its minima are those of only the experts, next to which the router's are small.
    """
    inner = experts_problem(inputs, tokens, model, experts, width, top_k)
    x, _, up, down = inner.tensors
    leaves = {"x": x, "router": inputs.normal(experts, model, scale=model**-0.5), "up": up, "down": down}

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x, router, up, down = given.values()
        logits = linear(x, router).float()
        chosen = route(logits, None, score="softmax", top_k=top_k, normalize=True, scaling=1.0, backend=backend)
        ids, weights = chosen.expert_ids_RK, chosen.weights_RK
        return {"y": expert_feed_forward(x, ids, weights, up, down, activation="swiglu", backend=backend)}

    return replace(inner, leaves=leaves, run=run)


def sent_problem(inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int) -> Problem:
    """Experts as ranks exchange rows, one to each rank of a token: copies, weighted sums of a rank's experts, sums by token.

    Each of RANKS has a part of the experts. One process is all of them here, and what is sent is the same memory; so all have
    the same experts, `experts` / RANKS. Leaves as in `experts_problem`.
    """
    inner = experts_problem(inputs, tokens, model, experts // RANKS, width, 1)
    up = inner.leaves["up"]
    leaves = {**inner.leaves, "weights": inputs.uniform(tokens, top_k)}
    ids = torch.randn(tokens, experts, device=inputs.device).topk(top_k).indices
    ranks = choose_ranks(ids, len(up), RANKS)
    rank_S, pair_S = ranks.flatten().sort(stable=True)
    sent, pairs = int((rank_S < RANKS).sum()), tokens * top_k
    local = ids[pair_S[:sent] // ranks.shape[1]] - rank_S[:sent, None] * len(up)
    local = torch.where((local >= 0) & (local < len(up)), local, len(up))

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x, weights, up, down = given.values()
        there = sort_choices(ranks, RANKS + 1, backend=backend)
        rows, weights = (gather_choices(each, there, sent, ranks.shape[1]) for each in (x, weights))
        y = expert_feed_forward(rows, local, weights, up, down, activation="swiglu", count=pairs, backend=backend)
        return {"y": add_choices(y, there, tokens, ranks.shape[1])}

    copies = row_bytes(tokens, sent, model, value_bytes=VALUE_BYTES)
    numbers = 3 * len(up) * model * width
    # As `experts_problem`, with rows for tokens: each has an own number of choices, together as many as there are pairs.
    forward = copies + VALUE_BYTES * (2 * sent * model + numbers + pairs * (4 * width + 2 * model))
    backward = copies + VALUE_BYTES * (3 * sent * model + 2 * numbers + pairs * (8 * width + 2 * model))
    flops = feed_forward_flops(pairs, model, width, "swiglu")
    return Problem(
        leaves,
        run,
        f"{tokens}x{model}, {experts} experts x {width} on {RANKS} ranks, top {top_k}",
        Minimum(forward, flops),
        Minimum(backward, 2 * flops),
    )


def slots_problem(inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int) -> Problem:
    """Experts as ranks exchange rows by slot: copies by choice, feed-forward of rows in a sender's order, weighted sum by token.

    One rank sends to itself here: what is sent is the same memory. Leaves as in `experts_problem`.
    """
    inner = experts_problem(inputs, tokens, model, experts, width, top_k)
    ids = torch.randn(tokens, experts, device=inputs.device).topk(top_k).indices
    # The order in which rows of several senders are: every second row first.
    arrived = torch.arange(tokens * top_k, device=inputs.device).view(-1, 2).t().flatten()

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x, weights, up, down = given.values()
        choices = sort_choices(ids, experts, backend=backend)
        rows = gather_choices(x, choices, ids.numel(), top_k)
        expert_S = ids.flatten().sort(stable=True).values[arrived]
        sources = sort_rows(expert_S, experts, backend=backend)
        rows = rows[arrived]  # the exchange
        counts = choices.counts_E
        y = grouped_feed_forward(rows, counts, up, down, activation="swiglu", sources_R=sources, backend=backend)
        return {"y": combine_choices(y[arrived.argsort()], choices, weights)}

    pairs, numbers = tokens * top_k, 3 * experts * model * width
    rows = row_bytes(tokens, pairs, model, value_bytes=VALUE_BYTES)
    # Of rows: read, hidden written, activation written and read, results written; backward as in `experts_problem`, with rows
    # for tokens, and the rows that came back once more for the weights.
    forward = rows + VALUE_BYTES * (numbers + pairs * (2 * model + 4 * width))
    backward = rows + VALUE_BYTES * (2 * numbers + pairs * (4 * model + 8 * width))
    least = Minimum(forward, inner.forward.operations), Minimum(backward, inner.backward.operations)
    return Problem(inner.leaves, run, f"{inner.shape}, sent", *least)


def counted_problems() -> Iterator[CountedProblem]:
    """Both activations over 8 experts, and experts over ranks."""
    for activation in ("swiglu", "squared_relu"):
        problem = experts_problem(bfloat16_inputs(), 256, 128, 8, 64, 2, activation)
        yield CountedProblem(f"moe_{activation}", problem, Goal("of the formula", problem.forward.bytes, 1.3))
    for name, make in (("moe_over_ranks", sent_problem), ("moe_in_slots", slots_problem)):
        problem = make(bfloat16_inputs(), 256, 128, 8, 64, 2)
        yield CountedProblem(name, problem, *formula_goals(problem, 1.3))


def trials() -> Iterator[Sized]:
    """Both activations, with experts that no one chose, and one expert that all chose."""

    def sent(inputs: Inputs, tokens: int, model: int, experts: int, width: int, *, slots: int | None = None) -> Problem:
        """Rows as ranks exchange them, the second half first, some choices lost."""
        ids = torch.randn(tokens, experts).topk(2).indices
        ids[: tokens // 4, 1] = experts
        counts = torch.bincount(ids.flatten(), minlength=experts + 1)[:experts]
        count = int(counts.sum()) if slots is None else experts * slots
        of_row = torch.arange(experts)
        if slots is None:
            of_row = of_row.repeat_interleave(counts)
        else:
            is_filled = torch.arange(slots) < counts[:, None]
            of_row = torch.where(is_filled, of_row[:, None], experts).flatten()
            counts[-1] += count - counts.sum()
        arrived = torch.arange(count).roll(count // 2)
        ids, counts, of_row, arrived = (each.to(inputs.device) for each in (ids, counts, of_row, arrived))
        leaves = experts_problem(inputs, tokens, model, experts, width, 2).leaves

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

        return Problem(leaves, run)

    def only(inputs: Inputs, tokens: int, model: int, width: int) -> Problem:
        """Rows of a rank's only expert."""

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            x, weights, up, down = given.values()
            y = only_expert_feed_forward(x, weights.squeeze(1), up, down, activation="swiglu", backend=backend)
            return {"y": y}

        return Problem(experts_problem(inputs, tokens, model, 1, width, 1).leaves, run)

    def limited(inputs: Inputs, tokens: int, experts: int, top_k: int, *, draws: bool = True) -> Problem:
        """Choices over a capacity are lost, or draw seats, by numbers that depend on who got one.

        Two thirds of the choices are of a third of the experts.
        """
        chances = torch.linspace(1, 0.05, experts, device=inputs.device).square().expand(tokens, -1)
        ids, seed = torch.multinomial(chances, top_k), torch.tensor(7)
        capacity = expert_capacity(tokens, top_k, experts, 1.25)

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            if draws:
                kept = recycle_overflow(ids, experts, capacity, seed, backend=backend)
            else:
                kept = drop_overflow(ids, experts, capacity, backend=backend)
            return {"y": given["x"] * (kept + 1)}

        return Problem({"x": inputs.normal(tokens, top_k, dtype=torch.float32)}, run, exact="torch")

    small = partial(experts_problem, tokens=70, model=64, experts=6, width=48, top_k=2)
    yield Sized("SwiGLU, empty experts", "first", partial(small, chosen=4))
    yield Sized("limited SwiGLU", "first", partial(small, activation="swiglu_oai@1.5"))
    for activation in ("squared_relu", "gelu", "gelu_tanh"):
        yield Sized(activation, "first", partial(small, activation=activation))
    yield Sized("rows of several ranks", "first", partial(sent, tokens=70, model=64, experts=6, width=48))
    yield Sized("recycled choices", "first", partial(limited, tokens=90, experts=12, top_k=2))
    yield Sized("limited choices", "first", partial(limited, tokens=90, experts=12, top_k=2, draws=False))
    yield Sized("rows in slots", "first", partial(sent, tokens=40, model=50, experts=4, width=37, slots=40))
    yield Sized("one expert", "small", partial(experts_problem, tokens=7, model=50, experts=1, width=37, top_k=1))
    yield Sized("rows of the only expert", "first", partial(only, tokens=70, model=50, width=37))
    yield Sized("4096 recycled choices of 128 experts", "long", partial(limited, tokens=4096, experts=128, top_k=1))
    long = partial(experts_problem, tokens=8205, model=1024, top_k=8, exact="torch")
    yield Sized("128 experts, 28 of them empty", "long", partial(long, experts=128, width=512, chosen=100))
    yield Sized("8 experts, squared ReLU", "long", partial(long, experts=8, width=1536, activation="squared_relu"))


def persistent_products() -> None:
    """The grouped product that only tuning chooses, down and up backward."""
    from amfm.kernels.moe.triton_products import OPTIONS, launch_persistent, product_tile

    x, tiles = torch.empty(8192, 1024, dtype=torch.bfloat16, device="meta"), torch.empty(0, device="meta").int()
    weight = torch.empty(128, 512, 1024, dtype=x.dtype, device="meta")
    for matrices in (weight, weight.view(128, 1024, 512).transpose(1, 2)):
        launch_persistent(x, matrices, x.new_empty(8192, 512), None, tiles, product_tile(8192, 128) | OPTIONS)


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return experts_problem(inputs, sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    tokens = sizes.rows * sizes.tokens
    return block_problem(inputs, tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


def _sent_on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return sent_problem(inputs, sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


def _slots_on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return slots_problem(inputs, sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


CASE = OperationCase(
    "moe",
    counted_problems,
    trials,
    on_gpu={"moe": _on_gpu, "moe_over_ranks": _sent_on_gpu, "moe_in_slots": _slots_on_gpu},
    on_host={"moe": _on_host},
    also=persistent_products,
)


def router_problem(
    inputs: Inputs, tokens: int, experts: int, top_k: int, *, score: str = "softmax", groups: tuple[int, int] = (1, 1),
    bias: bool = False,
) -> Problem:  # fmt: skip
    """From float32 logits [R, E], the leaf, to weights and scores; the best experts' ids are not compared, ties are."""
    leaves = {"logits": inputs.normal(tokens, experts, scale=3.0, dtype=torch.float32)}
    biases = inputs.normal(experts, scale=0.3, dtype=torch.float32).detach() if bias else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        routing = route(
            given["logits"], biases, score=score, top_k=top_k, normalize=True,
            scaling=2.5, num_groups=groups[0], group_top_k=groups[1], backend=backend,
        )  # fmt: skip
        return {"weights": routing.weights_RK, "scores": routing.scores_RE}

    text, forward = f"{tokens}, {experts} experts, top {top_k}", Minimum(route_bytes(tokens, experts, top_k), 0)
    return Problem(leaves, run, text, forward, exact="torch")


def counted_routers() -> Iterator[CountedProblem]:
    """Only forward; no goal is set."""
    yield CountedProblem("moe_route", router_problem(bfloat16_inputs(), 256, 64, 8), has_backward=False)


def router_trials() -> Iterator[Sized]:
    """Granite's softmax and DeepSeek-V3's sigmoid with bias in groups."""
    yield Sized("softmax, 72 experts", "first", partial(router_problem, tokens=40, experts=72, top_k=10))
    grouped = partial(router_problem, tokens=40, experts=128, top_k=8, score="sigmoid", groups=(8, 4), bias=True)
    yield Sized("sigmoid in groups", "first", grouped)
    yield Sized(
        "sqrt-softplus",
        "first",
        partial(router_problem, tokens=40, experts=96, top_k=6, score="sqrt_softplus", bias=True),
    )
    yield Sized("five experts", "small", partial(router_problem, tokens=1, experts=5, top_k=2))
    yield Sized("softmax, 512 experts", "long", partial(router_problem, tokens=8205, experts=512, top_k=22))


ROUTER_CASE = OperationCase("router", counted_routers, router_trials)
