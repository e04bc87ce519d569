"""Models and layouts that hypothesis draws, and ranks that compute them in float64 for as long as a test asks.

A drawn case is a model (blocks, sizes, features), documents of packed sequences, and axes. Ranks and one process compute its
loss and all gradients; both are handed the same weights by name and seed.
"""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.mtp import Ahead
from amfm.model.parallel.groups import ProcessGroupCollection, single_rank_groups
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.gradients import find_partial_gradients, sum_partial_gradients
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.shards import join_parts
from tests.helpers.spawn import run_ranks
from tests.model.small_models import meta_of, packed_batch

LENGTH = 24  # of rows, which context and tensor ranks can cut
AXES: dict[int, list[dict[str, Any]]] = {
    2: [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"context": 2},
        {"expert": 2},
        {"context": 2, "expert": 2},
        {"tensor": 2, "expert": 2},
        {"tensor": 2, "sequence_parallel": True, "expert": 2},
    ],
    4: [
        {"tensor": 2, "context": 2},
        {"tensor": 2, "sequence_parallel": True, "context": 2},
        {"tensor": 2, "context": 2, "expert": 2},
        {"tensor": 2, "sequence_parallel": True, "expert": 4},
        {"tensor": 2, "expert": 2, "expert_tensor": 2},
        {"tensor": 4, "sequence_parallel": True},
        {"context": 4},
        {"context": 2, "expert": 4},
        {"context": 2, "expert": 2},
    ],
}

LEARNED = ("stream.query", "stream.maps.weight", "stream.maps.scale")
STREAMS: list[dict[str, Any]] = [
    {},
    {"attention_residuals": {"blocks_per_source": 1}},
    {"attention_residuals": {"blocks_per_source": 3}},
    {"hyper_connections": {"streams": 3}},
]


@dataclass(frozen=True)
class Case:
    """A model, the documents of each row by their lengths, and the `parallel` section."""

    model: dict[str, Any]
    documents: tuple[tuple[int, ...], ...]
    parallel: dict[str, Any]


@st.composite
def documents(draw: st.DrawFn) -> tuple[int, ...]:
    """Lengths of documents that fill a row."""
    ends = draw(st.sets(st.integers(1, LENGTH - 1), max_size=5))
    places = [0, *sorted(ends), LENGTH]
    return tuple(stop - start for start, stop in pairwise(places))


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """A model section of four unlike blocks, with an optional MTP layer."""
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (8, 2)]))
    pattern = "".join(draw(st.permutations("M*E-WGC+"))[:4])
    depth = draw(st.sampled_from(["", "", "/*", "/*E"]))
    attention = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": draw(st.sampled_from([2, 6]))}
    moe = {
        "num_experts": draw(st.sampled_from([4, 8])),
        "top_k": draw(st.integers(2, 3)),
        "expert_hidden_size": 8,
        "shared_expert_hidden_size": draw(st.sampled_from([0, 8])),
        "latent_size": draw(st.sampled_from([None, 6])),
        "bias": draw(st.booleans()),
        "expert_bias": draw(st.booleans()),
        "router": "sigmoid",
        "activation": draw(st.sampled_from(["swiglu", "squared_relu"])),
        "auxiliary_loss_weight": 0.1,
        "sequence_loss_weight": 0.1,
        "z_loss_weight": 0.1,
    }
    return {
        "pattern": pattern + depth,
        "vocab_size": 40,
        "hidden_size": draw(st.sampled_from([8, 12])),
        "initializer_range": 0.3,
        "tie_embeddings": draw(st.booleans()),
        **draw(st.sampled_from(STREAMS)),
        "logits_z_loss_weight": draw(st.sampled_from([0.0, 0.05])),
        "mamba": {
            "num_heads": 4,
            "head_dim": draw(st.sampled_from([1, 3])),
            "state_size": draw(st.sampled_from([1, 5])),
            "num_groups": draw(st.sampled_from([1, 2, 4])),
            "chunk_size": draw(st.sampled_from([4, 16])),
        },
        "attention": attention
        | {
            "qk_norm": draw(st.booleans()),
            "positions": draw(st.sampled_from(["none", "rope"])),
            "sinks": draw(st.booleans()),
            "gate": draw(st.sampled_from(["none", "head", "element"])),
            "bias": draw(st.booleans()),
        },
        "feed_forward": {"hidden_size": 8, "activation": draw(st.sampled_from(["swiglu", "squared_relu"]))},
        "moe": moe,
        "mixers": {
            "window": attention | {"window": draw(st.integers(1, 4)), "sinks": draw(st.booleans())},
            "gated_deltanet": {"num_heads": 4, "head_dim": 4, "value_head_dim": 3, "chunk_size": 8},
            "short_conv": {"conv_kernel": draw(st.integers(2, 4))},
            "mla": {
                "num_heads": 4,
                "latent_size": 6,
                "nope_head_dim": 4,
                "rope_head_dim": 2,
                "value_head_dim": 3,
                "positions": "rope",
            },
        },
    }


@st.composite
def cases(draw: st.DrawFn, num_ranks: int) -> Case:
    """A case for so many ranks, with a row for each of them."""
    rows = draw(st.lists(documents(), min_size=num_ranks, max_size=num_ranks))
    return Case(draw(models()), tuple(rows), draw(st.sampled_from(AXES[num_ranks])))


def used_sections(model: dict[str, Any]) -> dict[str, Any]:
    """The model without sections that its pattern does not read, which would be rejected."""
    letters = {"W": "window", "G": "gated_deltanet", "C": "short_conv", "+": "mla"}
    mixers = {name: model["mixers"][name] for letter, name in letters.items() if letter in model["pattern"]}
    return model | {"mixers": mixers}


def compute(case: Case, groups: ProcessGroupCollection, shares: range, num_shares: int) -> dict[str, Tensor]:
    """Loss and whole gradients of a case in float64; `shares`: of the rows, those that this data rank has.

    Each share is a micro-batch, as auxiliary losses are means over those. Every rank of the groups must call this.
    """
    config = ModelConfig.model_validate(used_sections(case.model))
    model = HybridModel(config, groups, seed=3).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(LEARNED):  # of zeros, sources would all count the same
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    total = torch.zeros((), dtype=torch.float64)
    for share in shares:
        tokens_BT, labels_BT, ids_BT = packed_batch(case.documents[share::num_shares], seed=share)
        meta = meta_of(ids_BT).cut(groups.cp.rank(), groups.cp.size())
        ahead = [Ahead.of_rows(tokens_BT, labels_BT, ids_BT, depth + 1) for depth in range(config.num_depths)]
        if meta.segments is not None:
            take = meta.segments.take
            tokens_BT, labels_BT = take(tokens_BT), take(labels_BT)
            ahead = [each.map_tensors(take) for each in ahead]
        output = model(tokens_BT, meta, labels_BT, ahead=tuple(ahead))
        assert output.loss is not None
        loss = output.loss.total + 0.3 * sum(each.total for each in output.mtp) + sum(output.auxiliary.values())
        loss.backward()
        total += loss.detach()
    sum_partial_gradients(find_partial_gradients(model, groups), groups)
    if groups.dp_cp.size() > 1:
        torch.distributed.all_reduce(total, group=groups.dp_cp)
    found = {"loss": total}
    for name, parameter, shard in parameter_shards(model):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        group = groups.expt_dp if shard.per_expert and groups.ep.size() > 1 else groups.dp_cp
        if group.size() > 1:
            torch.distributed.all_reduce(gradient, group=group)
        found[name] = join_parts(gradient, shard, groups)
    return found


def compute_alone(case: Case, num_ranks: int) -> dict[str, Tensor]:
    """What one rank finds for all rows, in as many micro-batches as the layout has data ranks."""
    num_shares = num_ranks // (case.parallel.get("tensor", 1) * case.parallel.get("context", 1))
    return compute(case, single_rank_groups(), range(num_shares), num_shares)


def serve_cases(address: str) -> None:
    """Compute the cases that a test sends to this rank, until it ends."""
    with Client(address) as connection:
        while (case := connection.recv()) is not None:
            try:
                groups = initialize_parallel(
                    ParallelConfig(**case.parallel), timeout_seconds=PATIENCE_SECONDS, num_threads=1
                ).groups
                own = groups.dp.rank()
                found = compute(case, groups, range(own, own + 1), groups.dp.size())
                connection.send({name: value.numpy() for name, value in found.items()})
            except Exception:
                connection.send(traceback.format_exc())
                raise


class Ranks:
    """Ranks that compute cases, one after the other."""

    def __init__(self, connections: list[Connection]) -> None:
        self.connections = connections

    def compute(self, case: Case) -> list[dict[str, Tensor]]:
        """What each rank finds. Fails with a rank's traceback where one fails."""
        for connection in self.connections:
            connection.send(case)
        found: dict[int, dict[str, Tensor]] = {}
        while len(found) < len(self.connections):
            waiting = [connection for rank, connection in enumerate(self.connections) if rank not in found]
            for connection in wait(waiting):
                assert isinstance(connection, Connection)
                answer = connection.recv()
                assert not isinstance(answer, str), answer
                rank = self.connections.index(connection)
                found[rank] = {name: torch.from_numpy(value) for name, value in answer.items()}
        return [found[rank] for rank in range(len(found))]


@contextmanager
def ranks_that_wait(num_ranks: int) -> Iterator[Ranks]:
    """Ranks for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        address = os.path.join(folder, "socket")
        with Listener(address, backlog=num_ranks) as listener:
            thread = threading.Thread(target=run_ranks, args=(serve_cases, address), kwargs={"num_ranks": num_ranks})
            thread.start()
            connections = [listener.accept() for _ in range(num_ranks)]
        try:
            yield Ranks(connections)
        finally:
            for connection in connections:
                with suppress(OSError):
                    connection.send(None)
            thread.join()
