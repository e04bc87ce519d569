"""Routed experts: gather, grouped products, weighted sum; with the router before them where a block is timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import (
    CardSizes,
    CountedProblem,
    Goal,
    HostSizes,
    Inputs,
    Minimum,
    Problem,
    bfloat16_inputs,
    formula_goals,
)
from amfm.kernels.cases.trial import Sized, Trial
from amfm.kernels.linear.op import linear
from amfm.kernels.moe.capacity import ROUNDS, expert_capacity, recycle_overflow
from amfm.kernels.moe.op import expert_feed_forward, feed_forward_bytes, feed_forward_flops, grouped_feed_forward, route
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
from amfm.kernels.swiglu.gate import find_gate, unit_constants

VALUE_BYTES = 2
RANKS = 4  # that hold the experts of `sent_problem`


def expert_leaves(
    inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int, activation: str = "swiglu",
    *, low: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """x [R, D], weights [R, K] float32 from `low` to 1, up [E, F, D], down [E, D, width]."""
    rows = width if find_gate(activation) is None else 2 * width
    leaves = {"x": inputs.normal(tokens, model), "weights": inputs.uniform(tokens, top_k, low=low)}
    leaves["up"] = inputs.normal(experts, rows, model, scale=model**-0.5)
    leaves["down"] = inputs.normal(experts, model, width, scale=width**-0.5)
    return leaves


def experts_problem(
    inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int, activation: str = "swiglu"
) -> Problem:
    """Experts of inner width `width` over tokens whose choices are random and given.

    Leaves as `expert_leaves`. Choices are fixed, so that every backend and every run does the same work.
    """
    ids = torch.randn(tokens, experts, device=inputs.device).topk(top_k).indices
    leaves = tuple(expert_leaves(inputs, tokens, model, experts, width, top_k, activation).values())
    rows = leaves[2].shape[1]

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, backend: str) -> Tensor:
        return expert_feed_forward(x, ids, weights, up, down, activation=activation, backend=backend)

    pairs, numbers = tokens * top_k, experts * model * (rows + width)
    # Read x, dy, hidden and weights; write dx and weight gradients; write and read the hidden gradient, the activation
    # and the rows of dx.
    moved = VALUE_BYTES * (3 * tokens * model + 2 * numbers + pairs * (3 * rows + 2 * width + 2 * model))
    flops = feed_forward_flops(pairs, model, width, activation)
    return Problem(
        f"{tokens}x{model}, {experts} experts x {width}, top {top_k}",
        leaves,
        run,
        Minimum(feed_forward_bytes(tokens, top_k, model, width, experts, activation, VALUE_BYTES), flops),
        Minimum(moved, 2 * flops),
    )


def block_problem(inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int) -> Problem:
    """The whole block of SwiGLU experts: router product, softmax over the chosen, experts.

    Its minima are those of the experts alone, next to which the router's are small.
    """
    inner = experts_problem(inputs, tokens, model, experts, width, top_k)
    x, _, up, down = inner.leaves
    router = inputs.normal(experts, model, scale=model**-0.5)

    def run(x: Tensor, router: Tensor, up: Tensor, down: Tensor, backend: str) -> Tensor:
        logits = linear(x, router).float()
        chosen = route(logits, None, score="softmax", top_k=top_k, normalize=True, scaling=1.0, backend=backend)
        ids, weights = chosen.expert_ids_RK, chosen.weights_RK
        return expert_feed_forward(x, ids, weights, up, down, activation="swiglu", backend=backend)

    return Problem(inner.shape, (x, router, up, down), run, inner.forward, inner.backward)


def sent_problem(inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int) -> Problem:
    """Experts as ranks exchange rows, one to each rank of a token: copies, weighted sums of a rank's experts, sums by token.

    Each of RANKS has a part of the experts. One process is all of them here, and what travels is the same memory; so all have
    the same experts, `experts` / RANKS. Leaves as in `experts_problem`.
    """
    inner = experts_problem(inputs, tokens, model, experts // RANKS, width, 1)
    x, _, up, down = inner.leaves
    leaves = x, inputs.uniform(tokens, top_k), up, down
    ids = torch.randn(tokens, experts, device=inputs.device).topk(top_k).indices
    ranks = choose_ranks(ids, len(up), RANKS)
    rank_S, pair_S = ranks.flatten().sort(stable=True)
    sent, pairs = int((rank_S < RANKS).sum()), tokens * top_k
    local = ids[pair_S[:sent] // ranks.shape[1]] - rank_S[:sent, None] * len(up)
    local = torch.where((local >= 0) & (local < len(up)), local, len(up))

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, backend: str) -> Tensor:
        there = sort_choices(ranks, RANKS + 1, backend=backend)
        rows, given = (gather_choices(each, there, sent, ranks.shape[1]) for each in (x, weights))
        y = expert_feed_forward(rows, local, given, up, down, activation="swiglu", count=pairs, backend=backend)
        return add_choices(y, there, tokens, ranks.shape[1])

    copies = row_bytes(tokens, sent, model, value_bytes=VALUE_BYTES)
    numbers = 3 * len(up) * model * width
    # As `experts_problem`, with rows for tokens: each has an own number of choices, together as many as there are pairs.
    forward = copies + VALUE_BYTES * (2 * sent * model + numbers + pairs * (4 * width + 2 * model))
    backward = copies + VALUE_BYTES * (3 * sent * model + 2 * numbers + pairs * (8 * width + 2 * model))
    flops = feed_forward_flops(pairs, model, width, "swiglu")
    return Problem(
        f"{tokens}x{model}, {experts} experts x {width} on {RANKS} ranks, top {top_k}",
        leaves,
        run,
        Minimum(forward, flops),
        Minimum(backward, 2 * flops),
    )


def slots_problem(inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int) -> Problem:
    """Experts as ranks exchange rows by slot: copies by choice, feed-forward of rows in a sender's order, weighted sum by token.

    One rank sends to itself here: what travels is the same memory. Leaves as in `experts_problem`.
    """
    inner = experts_problem(inputs, tokens, model, experts, width, top_k)
    ids = torch.randn(tokens, experts, device=inputs.device).topk(top_k).indices
    # The order in which rows of several senders lie: every second row first.
    arrived = torch.arange(tokens * top_k, device=inputs.device).view(-1, 2).t().flatten()

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, backend: str) -> Tensor:
        choices = sort_choices(ids, experts, backend=backend)
        rows = gather_choices(x, choices, ids.numel(), top_k)
        expert_S = ids.flatten().sort(stable=True).values[arrived]
        sources = sort_rows(expert_S, experts, backend=backend)
        rows = rows[arrived]  # the exchange
        counts = choices.counts_E
        y = grouped_feed_forward(rows, counts, up, down, activation="swiglu", sources_R=sources, backend=backend)
        return combine_choices(y[arrived.argsort()], choices, weights)

    pairs, numbers = tokens * top_k, 3 * experts * model * width
    rows = row_bytes(tokens, pairs, model, value_bytes=VALUE_BYTES)
    # Of rows: read, hidden written, activation written and read, results written; backward as in `experts_problem`, with rows
    # for tokens, and the rows that came back once more for the weights.
    forward = rows + VALUE_BYTES * (numbers + pairs * (2 * model + 4 * width))
    backward = rows + VALUE_BYTES * (2 * numbers + pairs * (4 * model + 8 * width))
    operations = inner.forward.operations, inner.backward.operations
    return Problem(
        f"{inner.shape}, sent", inner.leaves, run, Minimum(forward, operations[0]), Minimum(backward, operations[1])
    )


def counted_problems() -> Iterator[CountedProblem]:
    """Both activations over 8 experts, and experts over ranks."""
    for activation in ("swiglu", "squared_relu"):
        problem = experts_problem(bfloat16_inputs(), 256, 128, 8, 64, 2, activation)
        yield CountedProblem(f"moe_{activation}", problem, Goal("of the formula", problem.forward.bytes, 1.3))
    for name, make in (("moe_over_ranks", sent_problem), ("moe_in_slots", slots_problem)):
        problem = make(bfloat16_inputs(), 256, 128, 8, 64, 2)
        yield CountedProblem(name, problem, *formula_goals(problem, 1.3))


def launches() -> Iterator[KernelLaunch]:
    """Every kernel of the experts, for few and many rows per expert."""
    import triton.language as tl

    from amfm.kernels.moe import persistent
    from amfm.kernels.moe import triton_kernels as kernels
    from amfm.kernels.moe import triton_products as products
    from amfm.kernels.moe.rows import triton_impl as copies

    inputs = ("x", "weight", "up", "down", "hidden", "d_y", "left", "right", "rows_SD")
    types = dict.fromkeys((*inputs, "y", "active", "d_hidden", "result"), "*bf16")
    types |= dict.fromkeys(("pairs", "sources", "tiles", "places", "offsets"), "*i32")
    types |= {"weights": "*fp32", "d_weights": "*fp32", "choices": "i32", "experts": "i32:16"}
    sizes = ("columns", "inner", "width", "rows", "model", "lefts", "rights", "tokens")
    types |= dict.fromkeys((*sizes, "weight_expert", "weight_row", "weight_column"), "i32:16")
    for rows, label in ((64, "64 rows per expert"), (1024, "1024 rows per expert")):
        product = {**products.product_tile(rows * 128, 128), **products.OPTIONS}
        narrow = {**products.narrow_tile(rows * 128, 128), **products.OPTIONS}
        shared = {"DOT": tl.bfloat16}
        for strides, way in (({"weight_column": 1}, "down"), ({"weight_row": 1}, "up backward")):
            constants = {"SCATTER": False, "TRANSPOSED": way != "down", "sources": None, **shared}
            depth, width, height = product["BLOCK_K"], product["BLOCK_N"], product["BLOCK_M"]
            matrix = f"1, {width}, {depth}" if way == "down" else f"1, {depth}, {width}"
            described = types | {"rows": f"tensordesc<bf16[{height}, {depth}]>", "works": "i32"}
            described |= {"matrices": f"tensordesc<bf16[{matrix}]>"}
            name = f"experts {way}, persistent, {label}"
            yield kernel_launch(name, persistent.persistent_product_kernel, described, constants, product)
            constants = {"GATHER": False, "SCATTER": False, "sources": None, **shared, **strides}
            kernel = kernels.grouped_product_kernel
            yield kernel_launch(f"experts {way}, {label}", kernel, types, constants, product)
        for activation, title in (
            ("swiglu", "SwiGLU"), ("swiglu_oai@7.0", "limited SwiGLU"), ("squared_relu", "squared ReLU")
        ):  # fmt: skip
            unit = unit_constants(activation)
            constants = {**unit, "GATHER": True, "WEIGHTED": True, **shared}
            name, config = f"experts up, {title}, {label}", narrow if unit["SWIGLU"] else product
            yield kernel_launch(name, kernels.up_kernel, types, constants, config)
            for by_row, pairs in ((False, ""), (True, ", some lost")):
                name = f"experts down backward, {title}{pairs}, {label}"
                by = constants | {"BY_ROW": by_row}
                yield kernel_launch(name, kernels.down_backward_kernel, types, by, narrow)
    outer = {**products.OUTER_TILE, **products.OPTIONS}
    for left, name in ((True, "d_down"), (False, "d_up")):
        for adds, into, way in (
            (False, "*bf16", ""),
            (False, "*fp32", ", stored in the sum"),
            (True, "*fp32", ", added to the sum"),
        ):
            constants = {"GATHER_LEFT": left, "GATHER_RIGHT": not left, "ADD": adds, "DOT": tl.bfloat16}
            kernel = kernels.grouped_outer_kernel
            yield kernel_launch(f"experts {name}{way}", kernel, types | {"result": into}, constants, outer)
    for weighted, name in ((False, "experts sum over choices"), (True, "rows weighted sum")):
        constants = {"WEIGHTED": weighted} | ({} if weighted else {"weights": None})
        yield kernel_launch(name, kernels.sum_choices_kernel, types, constants, products.SUM_TILE)
    types |= {"x": "*bf16", "d_rows": "*bf16"}
    yield kernel_launch("rows spread", copies.spread_rows_kernel, types, {}, copies.COPY_TILE)
    yield kernel_launch("rows cleared", copies.clear_gaps_kernel, types | {"gaps": "*u8"}, {}, copies.COPY_TILE)
    yield kernel_launch("rows weighted sum, backward", copies.combine_backward_kernel, types, {}, copies.COPY_TILE)
    yield from _sort_launches()


def _sort_launches() -> Iterator[KernelLaunch]:
    """The counting sort and the list of tiles, for 128 experts."""
    from amfm.kernels.moe import counting_sort as sort

    types = dict.fromkeys(("counts", "sorted_pairs", "tokens", "places", "offsets", "tiles"), "*i32")
    types |= dict.fromkeys(("ids", "totals", "kept"), "*i64")
    types |= dict.fromkeys(("pairs", "experts", "blocks", "choices", "bound", "capacity"), "i32")
    experts = {"EXPERTS": 128}
    yield kernel_launch("sort counts", sort.count_pairs_kernel, types, experts, sort.SORT_TILE)
    yield kernel_launch("sort places", sort.place_pairs_kernel, types, experts | {"ROWS": sort.ROWS}, sort.SORT_TILE)
    yield kernel_launch("sort limit", sort.limit_pairs_kernel, types, {"BLOCK": sort.LIMIT_BLOCK})
    yield kernel_launch("tiles", sort.list_tiles_kernel, types, experts | {"ROWS": sort.ROWS, "BLOCK_M": 128})
    yield from _recycle_launches()


def _recycle_launches() -> Iterator[KernelLaunch]:
    """The draw of seats for what is over capacity, for 128 experts."""
    from amfm.kernels.moe import counting_sort as sort
    from amfm.kernels.moe import recycling

    types = dict.fromkeys(("ids", "hashes", "kept", "state"), "*i64") | {"seed": "i64"}
    lists = ("counts", "waiting", "order", "ends", "still_waiting", "still_free", "is_new")
    types |= dict.fromkeys(lists, "*i32")
    types |= dict.fromkeys(("pairs", "experts", "capacity", "blocks", "strips", "choices"), "i32")
    experts = {"EXPERTS": 128}
    yield kernel_launch("recycle hashes", recycling.hash_choices_kernel, types, experts, sort.SORT_TILE)
    ordered = experts | {"BITS": 7, "ROWS": sort.ROWS} | recycling.SEAT_TILE
    yield kernel_launch("recycle order of seats", recycling.order_seats_kernel, types, ordered, sort.SORT_TILE)
    draw = recycling.draw_seats_kernel
    yield kernel_launch("recycle draw", draw, types, {"ROUNDS": ROUNDS}, recycling.DRAW_TILE)


def experts_trial(
    inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int, *, chosen: int | None = None,
    activation: str = "swiglu", exact: str = "reference",
) -> Trial:  # fmt: skip
    """Experts over tokens that choose among the first `chosen` of them, or among all."""
    ids = torch.randn(tokens, chosen or experts, device=inputs.device).topk(top_k).indices
    leaves = expert_leaves(inputs, tokens, model, experts, width, top_k, activation, low=0.1)

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x, weights, up, down = given.values()
        return {"y": expert_feed_forward(x, ids, weights, up, down, activation=activation, backend=backend)}

    return Trial(leaves, run, exact=exact)


def trials() -> Iterator[Sized]:
    """Both activations, with experts that no one chose, and one expert that all chose."""

    def sent(inputs: Inputs, tokens: int, model: int, experts: int, width: int, *, slots: int | None = None) -> Trial:
        """Rows as ranks exchange them, the second half first, some choices lost."""
        ids = torch.randn(tokens, experts, device=inputs.device).topk(2).indices
        ids[: tokens // 4, 1] = experts
        leaves = expert_leaves(inputs, tokens, model, experts, width, 2, low=0.1)
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

    def recycled(inputs: Inputs, tokens: int, experts: int, top_k: int) -> Trial:
        """Draws of seats, by numbers that depend on who got one: two thirds of the choices are of a third of the experts."""
        chances = torch.linspace(1, 0.05, experts, device=inputs.device).square().expand(tokens, -1)
        ids, seed = torch.multinomial(chances, top_k), torch.tensor(7)
        capacity = expert_capacity(tokens, top_k, experts, 1.25)

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            kept = recycle_overflow(ids, experts, capacity, seed, backend=backend)
            return {"y": given["x"] * (kept + 1)}

        return Trial({"x": inputs.normal(tokens, top_k, dtype=torch.float32)}, run, exact="torch")

    small = partial(experts_trial, tokens=70, model=64, experts=6, width=48, top_k=2)
    yield Sized("SwiGLU, empty experts", "first", partial(small, chosen=4))
    yield Sized("limited SwiGLU", "first", partial(small, activation="swiglu_oai@1.5"))
    yield Sized("squared ReLU", "first", partial(small, activation="squared_relu"))
    yield Sized("rows of several ranks", "first", partial(sent, tokens=70, model=64, experts=6, width=48))
    yield Sized("recycled choices", "first", partial(recycled, tokens=90, experts=12, top_k=2))
    yield Sized("rows in slots", "small", partial(sent, tokens=40, model=50, experts=4, width=37, slots=40))
    yield Sized("one expert", "small", partial(experts_trial, tokens=7, model=50, experts=1, width=37, top_k=1))
    yield Sized("4096 recycled choices of 128 experts", "long", partial(recycled, tokens=4096, experts=128, top_k=1))
    long = partial(experts_trial, tokens=8205, model=1024, top_k=8, exact="torch")
    yield Sized("128 experts, 28 of them empty", "long", partial(long, experts=128, width=512, chosen=100))
    yield Sized("8 experts, squared ReLU", "long", partial(long, experts=8, width=1536, activation="squared_relu"))


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return experts_problem(inputs, sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    tokens = sizes.rows * sizes.tokens
    return block_problem(inputs, tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


def _sent_on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return sent_problem(inputs, sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


def _slots_on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return slots_problem(inputs, sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


CASE = OperationCase(
    "moe",
    launches,
    counted_problems,
    trials,
    on_card={"moe": _on_card, "moe_over_ranks": _sent_on_card, "moe_in_slots": _slots_on_card},
    on_host={"moe": _on_host},
)
