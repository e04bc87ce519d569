"""What every registered mixer must keep: the same suite for ours and for plugins, which are tested by being registered."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model.config.kinds import registered_kinds
from amfm.model.config.pattern import block_kind
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters, flops_per_token
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection, single_rank_groups
from amfm.model.parallel.shards import parameter_shards
from amfm.model.state_size import state_bytes
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.gradients import find_partial_gradients, sum_partial_gradients
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.shards import join_parts
from tests.helpers.spawn import run_ranks
from tests.model.mixers.samples import mixer_config, registered_name, sample_names
from tests.model.small_models import (
    ATTENTION,
    cut_batch,
    decode,
    loss_of,
    meta_of,
    packed_batch,
    small_config,
    small_model,
)

# float64: the same sums in another order.
EXACT = 1e-10
# bfloat16 weights and activations carry 2^-9 each.
BFLOAT16 = 2e-2
NAMES = sample_names()
# One mixer inside another, which all have a test of their own: each takes part in one or two quick tests in turn, and every
# ninth in those over ranks.
INSIDE = [name for name in NAMES if " over " in name]
TURNS = 9
# Mixers that sort tokens: what one document or later token changes moves where chunks begin for others, and so rounding. The
# last transforms whole documents: rounding of all tokens meets in each, and so does that of gradients, which are not
# zeros then.
SORTED = tuple(name for name in NAMES if registered_name(name) in ("mom", "seqboat", "monarch"))
LEAST_GRADIENT = {"monarch": 1e-12}
DOCUMENTS = ((7, 1, 13, 3), (24,))


def names_in_turn(turn: int) -> list[Any]:
    """The samples of the test that has this turn; those inside others whose turn it is not run in `make test-slow`."""
    waits = [name for number, name in enumerate(INSIDE) if number % TURNS != turn]
    return [pytest.param(name, marks=pytest.mark.slow) if name in waits else name for name in NAMES]


def run_model(model: HybridModel, documents: Any = DOCUMENTS, groups: Any = None) -> dict[str, Tensor]:
    """Loss, logits and gradients of packed sequences in training mode."""
    tokens_BT, labels_BT, meta = cut_batch(documents, groups or single_rank_groups())
    output = model(tokens_BT, meta, labels_BT)
    loss = loss_of(output)
    loss.backward()
    with torch.no_grad():
        logits_BTV = model(tokens_BT, meta).logits_BTV
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {"loss": loss.detach(), "logits": logits_BTV} | gradients


@pytest.mark.parametrize("name", names_in_turn(0))
def test_chunked_form_equals_the_definition_with_gradients(name: str) -> None:
    chunked = run_model(small_model(mixer_config(name, blocks=1)))
    definition = run_model(small_model(mixer_config(name, blocks=1), backend="reference"))
    for key, value in definition.items():
        assert_near(chunked[key], value, EXACT, key)


@pytest.mark.parametrize("name", names_in_turn(1))
def test_bfloat16_stays_near_float64(name: str) -> None:
    exact = small_model(mixer_config(name, blocks=1))
    rounded = small_model(mixer_config(name, blocks=1), dtype=torch.bfloat16)
    exact.load_state_dict({key: value.double() for key, value in rounded.state_dict().items()})
    expected, actual = run_model(exact), run_model(rounded)
    assert_near(actual["logits"], expected["logits"], BFLOAT16, "logits")


def assert_unmoved(name: str, actual: Tensor, expected: Tensor, what: str) -> None:
    if name in SORTED:
        assert_near(actual, expected, EXACT, what)
    else:
        assert_bitwise(actual, expected, what)


@pytest.mark.parametrize("name", names_in_turn(1))
def test_no_output_depends_on_a_later_token(name: str) -> None:
    model = small_model(mixer_config(name, blocks=1)).train()
    tokens_BT, _, _ = packed_batch(((24,),))
    before = model(tokens_BT, PackMeta.one_document_a_row(1, 24)).logits_BTV
    changed_BT = tokens_BT.clone()
    changed_BT[0, 11] = (changed_BT[0, 11] + 1) % 40
    after = model(changed_BT, PackMeta.one_document_a_row(1, 24)).logits_BTV
    assert_unmoved(name, after[:, :11], before[:, :11], "outputs before the changed token")
    assert not torch.equal(after[:, 11:], before[:, 11:]), "the changed token must change something"


@pytest.mark.parametrize("name", names_in_turn(2))
def test_no_gradient_reaches_another_document_row_or_later_token(name: str) -> None:
    mixer = small_model(mixer_config(name, blocks=1)).train().blocks[0].mixer
    x_BTD = torch.randn(2, 24, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    tokens_BT, _, ids_BT = packed_batch(DOCUMENTS)
    meta = meta_of(ids_BT).with_tokens(tokens_BT)
    mixer(x_BTD, meta).y_BTD[0, 8:15].sum().backward()
    reached_BT = x_BTD.grad.abs().sum(-1) > LEAST_GRADIENT.get(name, 0.0)
    assert not bool(reached_BT[1].any()), "the other row"
    assert not bool(reached_BT[0, :8].any()), "documents before"
    assert not bool(reached_BT[0, 15:].any()), "tokens after"
    assert bool(reached_BT[0, 8:15].all())


@pytest.mark.parametrize("name", names_in_turn(3))
def test_packed_documents_are_as_if_apart(name: str) -> None:
    lengths = (7, 1, 13, 3)
    packed, expected = (small_model(mixer_config(name, blocks=1)) for _ in range(2))
    tokens_BT, labels_BT, ids_BT = packed_batch((lengths,))
    output = packed(tokens_BT, meta_of(ids_BT), labels_BT)
    output.loss.total.backward()
    logits_BTV = packed(tokens_BT, meta_of(ids_BT)).logits_BTV
    start = 0
    for length in lengths:
        piece = slice(start, start + length)
        meta = PackMeta.one_document_a_row(1, length)
        expected(tokens_BT[:, piece], meta, labels_BT[:, piece]).loss.total.backward()
        assert_near(logits_BTV[:, piece], expected(tokens_BT[:, piece], meta).logits_BTV, EXACT, f"document at {start}")
        start += length
    for (key, weight), (_, other) in zip(packed.named_parameters(), expected.named_parameters()):
        assert_near(weight.grad, other.grad, EXACT, key)


@pytest.mark.parametrize("name", names_in_turn(4))
def test_rows_and_documents_do_not_feel_each_other(name: str) -> None:
    model = small_model(mixer_config(name, blocks=1), dtype=torch.float64 if name in SORTED else torch.float32).train()
    tokens_BT, _, ids_BT = packed_batch(DOCUMENTS)
    with torch.no_grad():
        before = model(tokens_BT, meta_of(ids_BT)).logits_BTV
        changed_BT = tokens_BT.clone()
        changed_BT[0, 8:21] = (changed_BT[0, 8:21] + 1) % 40
        after = model(changed_BT, meta_of(ids_BT)).logits_BTV
    assert_bitwise(after[1], before[1], "the other row")
    assert_unmoved(name, after[0, :8], before[0, :8], "documents before")
    assert_unmoved(name, after[0, 21:], before[0, 21:], "the document after")


@pytest.mark.parametrize("name", names_in_turn(5))
def test_a_text_in_pieces_is_the_whole_text(name: str) -> None:
    model = small_model(mixer_config(name)).eval()
    tokens_BT, _, _ = packed_batch(((31,), (31,)))
    with torch.no_grad():
        whole_BTV = model(tokens_BT, PackMeta.one_document_a_row(2, 31)).logits_BTV
        logits_BTV, _ = decode(model, tokens_BT, (9, 1, 1, 2, 17, 1))
    assert_near(logits_BTV, whole_BTV, EXACT, "logits")


@pytest.mark.parametrize("name", names_in_turn(2))
def test_the_state_has_the_bytes_that_are_counted(name: str) -> None:
    config = mixer_config(name, blocks=1)
    model = small_model(config, dtype=torch.float32)
    with torch.no_grad():
        output = model(
            torch.ones(1, 9, dtype=torch.long), PackMeta.one_document_a_row(1, 9), state=model.empty_state(1)
        )
    states = [own for block in output.state.blocks for own in getattr(block, "branches", (block,))]
    held = sum(tensor.nbytes for state in states for tensor in state.values())
    assert held == state_bytes(config, 9)  # more than the longest window and a chunk


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_without_the_model(name: str) -> None:
    config = mixer_config(name, blocks=3)
    counted = count_parameters(config)
    assert counted.total == sum(weight.numel() for weight in small_model(config).parameters())
    assert counted.active <= counted.total
    kind = block_kind(config.letters[0])
    assert flops_per_token(config, 64)[kind] > 6 * 0.5 * counted.active_by_kind[kind]


def spread_config(name: str) -> ModelConfig:
    """The model of a sample, or of the core's mixers side by side, with sinks."""
    return (
        mixer_config(name, blocks=1)
        if name in NAMES
        else small_config(name, attention=ATTENTION.model_copy(update={"sinks": True}))
    )


@lru_cache(maxsize=1)
def groups_of(section: ParallelConfig) -> ProcessGroupCollection:
    """The groups of a layout, made once for all models that follow each other in it. Every rank must call this."""
    return initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1).groups


def run_spread(config: ModelConfig, section: ParallelConfig) -> dict[str, Tensor]:
    """What `run_model` gives, of whole weights, on every rank."""
    groups = groups_of(section)
    model = HybridModel(config, groups, seed=1).double()
    found = run_model(model, groups=groups)
    sum_partial_gradients(find_partial_gradients(model, groups), groups)
    if groups.cp.size() > 1:
        for value in [found["loss"], *(weight.grad for weight in model.parameters())]:
            torch.distributed.all_reduce(value, group=groups.cp)
    gradients = {key: join_parts(weight.grad, shard, groups) for key, weight, shard in parameter_shards(model)}
    weights = {f"weight of {key}": join_parts(w.detach(), shard, groups) for key, w, shard in parameter_shards(model)}
    return {"loss": found["loss"], "logits": found["logits"]} | gradients | weights


def run_all_spread(layouts: list[tuple[str, ParallelConfig]]) -> list[dict[str, Tensor]]:
    return [run_spread(spread_config(name), section) for name, section in layouts]


SECTIONS = {
    "tensor": ParallelConfig(tensor=2),
    "tokens too": ParallelConfig(tensor=2, sequence_parallel=True),
    "context": ParallelConfig(context=2),
}
LAYOUTS = [
    (name, kind)
    for name in NAMES
    for kind in SECTIONS
    if ("context" if kind == "context" else "tensor") not in registered_kinds()[registered_name(name)].refuses
] + [("(M&*)", "tokens too"), ("(M&*)", "context")]


# Tensor ranks that cut tokens too do all that is done without; one mixer shows the difference, which is not its own.
SLOW_LAYOUTS = [(name, kind) for name, kind in LAYOUTS if kind == "tensor" and name != NAMES[0]]
# What context ranks tell each other is in the classes of recurrences and in `DeltaBlock`: of the mixers that only inherit it,
# deltanet, kda, hgrn2 and retnet are quick.
INHERITED = (
    "gated_deltanet",
    "comba",
    "gdn2",
    "kda with whole gates",
    "gla",
    "hedgehog",
    "lightning",
    "plstm",
    "transnormer",
)
SLOW_LAYOUTS += [(name, "context") for name in (*INHERITED, "mla with sinks")]
SLOW_LAYOUTS += [(name, kind) for number, name in enumerate(INSIDE) for kind in ("tokens too", "context") if number % 9]


@cache
def spread(layouts: tuple[tuple[str, str], ...]) -> dict[tuple[str, str], list[dict[str, Tensor]]]:
    """What each rank found, by layout, of one pair of processes."""
    ranks = run_ranks(run_all_spread, [(name, SECTIONS[kind]) for name, kind in layouts], num_ranks=2)
    return {layout: list(results) for layout, results in zip(layouts, zip(*ranks))}


def chosen(request: pytest.FixtureRequest, *, slow: bool) -> tuple[tuple[str, str], ...]:
    """The quick layouts, or the slow ones, of the tests that were asked for, those with the same ranks next to each other.

    A broken mixer fails no test of another's.
    """
    items = [item for item in request.session.items if getattr(item, "function", None) is request.function]
    asked = {(item.callspec.params["name"], item.callspec.params["kind"]) for item in items}  # type: ignore[attr-defined]
    layouts = [layout for layout in LAYOUTS if layout in asked and (layout in SLOW_LAYOUTS) == slow]
    return tuple(sorted(layouts, key=lambda layout: layout[1]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*layout, marks=pytest.mark.slow if layout in SLOW_LAYOUTS else ()) for layout in LAYOUTS],
)
def test_two_ranks_compute_what_one_does(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    layouts = chosen(request, slow=(name, kind) in SLOW_LAYOUTS)
    assert_spread(spread_config(name), kind, spread(layouts)[name, kind])


@cache
def alone(config: ModelConfig) -> dict[str, Tensor]:
    """What one rank finds, and the weights that it begins with."""
    model = HybridModel(config, single_rank_groups(), seed=1).double()
    return run_model(model) | {f"weight of {key}": weight.detach() for key, weight in model.named_parameters()}


def assert_spread(config: ModelConfig, kind: str, ranks: list[dict[str, Tensor]]) -> None:
    """Fail unless each of two ranks found what one does."""
    expected = alone(config)
    for rank, actual in enumerate(ranks):
        logits_BTV = expected["logits"]
        if kind == "context":
            segments = meta_of(packed_batch(DOCUMENTS)[2]).cut(rank, 2).segments
            logits_BTV = segments.take(logits_BTV)
        assert_near(actual["logits"], logits_BTV, EXACT, "logits")
        for key, value in expected.items():
            if key != "logits":
                assert_near(actual[key], value, EXACT, key)
