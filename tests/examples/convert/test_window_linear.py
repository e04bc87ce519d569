"""The mixer of conversions against its definition over all pairs of tokens, for each preset; the suite of mixers has the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from amfm_convert.window_linear import WindowLinearMixer
from torch import Tensor

from amfm.kernels.rope.op import norm_rope_reference
from amfm.model.config.checks import check_model
from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.rope import Llama3Stretch, RopeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.mixers.recurrence import window_sum
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.gradients import find_partial_gradients, sum_partial_gradients
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.numbers import assert_near
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.shards import join_parts
from tests.helpers.spawn import run_ranks
from tests.model.mixers.samples import WINDOW_LINEAR_FORMS as FORMS
from tests.model.small_models import cut_batch, meta_of, packed_batch, small_config, small_model

# float64: the same sums in another order.
EXACT = 1e-10
WINDOW = 4
# Documents shorter than a window, as long, one token longer, and much longer.
DOCUMENTS = ((3, 4, 5, 12), (24,))
OPTIONS = {"window": WINDOW, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "positions": "rope", "chunk_size": 8}


def config_of(form: dict[str, Any], **changes: Any) -> ModelConfig:
    return small_config("{window_linear}", mixers={"window_linear": OPTIONS | form | changes})


def mixer_of(form: dict[str, Any], **changes: Any) -> WindowLinearMixer:
    mixer = small_model(config_of(form, **changes)).blocks[0].mixer
    assert isinstance(mixer, WindowLinearMixer)
    return mixer.train()


def stream(rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 24, 12, dtype=torch.float64, generator=generator, requires_grad=True)


def over_all_pairs(mixer: WindowLinearMixer, x_BTD: Tensor, meta: PackMeta) -> Tensor:
    """The definition: every weight of every pair of tokens, in matrices [T, T]."""
    options, form = mixer.options, mixer.form
    heads, repeat = options.num_heads, options.num_heads // options.kv_heads()
    q, k, v = (
        (x_BTD @ proj.weight.T).unflatten(-1, (-1, options.head_dim))
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    rotated_q, rotated_k = (
        norm_rope_reference(x, meta.positions_BT, mixer.inverse_frequencies, 1.0, None, 0.0) for x in (q, k)
    )
    seen = (rotated_q, rotated_k) if form.linear_positions == "rotary" else (q, k)

    def features(x: Tensor, name: str) -> Tensor:
        if form.features == "softmax":
            return x.softmax(-1)
        mapped = torch.einsum("bthk,hjk->bthj", x, getattr(mixer, name))
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1)

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(repeat, dim=2)

    phi_q, phi_k = features(seen[0], "query_features"), spread(features(seen[1], "key_features"))
    fading = torch.zeros(*x_BTD.shape[:2], heads, phi_k.shape[-1], dtype=x_BTD.dtype)
    if form.gate == "key":
        fading = spread(torch.nn.functional.logsigmoid(k) / 16)
    elif form.gate == "learned":
        fading = fading + spread(torch.nn.functional.logsigmoid(x_BTD @ mixer.decay_proj.weight.T + 4))[..., None]
    elif form.gate == "channel":
        decays = (x_BTD @ mixer.decay_proj.weight.T).unflatten(-1, (options.kv_heads(), -1))
        fading = spread(torch.nn.functional.logsigmoid(decays + 4))
    summed = fading.cumsum(1)
    between = (summed[:, :, None] - summed[:, None]).exp()
    distance = torch.arange(24)[:, None] - torch.arange(24)
    same = meta.document_ids_BT[:, :, None] == meta.document_ids_BT[:, None]
    in_window = (same & (distance >= 0) & (distance < options.window))[..., None]
    allowed = (same & (distance >= 0))[..., None, None]
    linear = (phi_q[:, :, None] * phi_k[:, None] * torch.where(allowed, between, 0.0)).sum(-1)
    scores = torch.einsum("bihk,bjhk->bijh", rotated_q, spread(rotated_k)) * options.head_dim**-0.5
    scores = scores.masked_fill(~in_window, -torch.inf)
    values = spread(v)
    if options.meta_tokens:
        meta_scores = torch.einsum("bihk,hnk->binh", rotated_q, mixer.meta_keys.repeat_interleave(repeat, 0))
        scores = torch.cat([scores, meta_scores * options.head_dim**-0.5], dim=2)
        meta_values = mixer.meta_values.repeat_interleave(repeat, 0).transpose(0, 1).expand(len(x_BTD), -1, -1, -1)
        values = torch.cat([values, meta_values], dim=1)
    if form.combine == "average":
        share = options.linear_weight
        o = (1 - share) * torch.einsum("bijh,bjhv->bihv", scores.softmax(2), values)
        return o + share * torch.einsum("bijh,bjhv->bihv", linear, spread(v))
    weights = mixer.window_weight.sigmoid() * (scores - scores.amax(2, keepdim=True)).exp()
    older = torch.where((distance >= options.window)[None, :, :, None], linear, 0.0)
    o = torch.einsum("bijh,bjhv->bihv", weights, values) + torch.einsum("bijh,bjhv->bihv", older, spread(v))
    return o / (weights.sum(2) + older.sum(2))[..., None]


@pytest.mark.parametrize("name", FORMS)
def test_a_scan_gives_what_the_sum_over_all_pairs_gives_with_gradients(name: str) -> None:
    meta = meta_of(packed_batch(DOCUMENTS)[2])
    found: list[dict[str, Tensor]] = []
    for compute in (
        lambda m, x: m(x, meta).y_BTD,
        lambda m, x: over_all_pairs(m, x, meta).flatten(2) @ m.o_proj.weight.T,
    ):
        mixer, x_BTD = mixer_of(FORMS[name]), stream()
        y_BTD = compute(mixer, x_BTD)
        (y_BTD * torch.linspace(-1, 1, y_BTD.numel(), dtype=torch.float64).view_as(y_BTD)).sum().backward()
        gradients = {key: weight.grad for key, weight in mixer.named_parameters()}
        found.append({"y": y_BTD.detach(), "x": x_BTD.grad} | gradients)
    for key, expected in found[1].items():
        assert_near(found[0][key], expected, EXACT, key)


@pytest.mark.parametrize("stretched", [False, True])
def test_a_window_as_long_as_the_row_is_the_attention_that_it_replaces(stretched: bool) -> None:
    stretch = Llama3Stretch(factor=4.0, original_length=16)
    rope = RopeConfig(theta=10_000.0, scaling="llama3", llama3=stretch) if stretched else RopeConfig(theta=10_000.0)
    section = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, positions="rope", rope=rope)
    teacher = small_model(small_config("*", attention=section))
    student = small_model(config_of({}, window=24, rope_llama3=rope.llama3))
    student.load_state_dict(teacher.state_dict(), strict=False)
    tokens_BT, _, ids_BT = packed_batch(DOCUMENTS)
    expected = teacher(tokens_BT, meta_of(ids_BT)).logits_BTV
    assert_near(student(tokens_BT, meta_of(ids_BT)).logits_BTV, expected, EXACT, "logits")


@pytest.mark.parametrize("name", FORMS)
def test_every_form_decodes_what_it_computes_at_once(name: str) -> None:
    model = small_model(config_of(FORMS[name])).eval()
    tokens_BT = packed_batch(((24,),))[0]
    with torch.no_grad():
        whole_BTV = model(tokens_BT, PackMeta.one_document_a_row(1, 24)).logits_BTV
        state, pieces, start = model.empty_state(1), [], 0
        for length in (2, 1, 1, 9, 1, 10):
            meta = PackMeta.one_document_a_row(1, length, start=start)
            output = model(tokens_BT[:, start : start + length], meta, state=state)
            state, start = output.state, start + length
            pieces.append(output.logits_BTV)
    assert_near(torch.cat(pieces, dim=1), whole_BTV, EXACT, "logits")


def run_form(model: HybridModel, groups: Any) -> dict[str, Tensor]:
    """Outputs and gradients of the language model, then the loss and gradients of a transfer."""
    tokens_BT, labels_BT, meta = cut_batch(DOCUMENTS, groups)
    found = {}
    for stage in ("tune", "transfer"):
        model.zero_grad()
        model.blocks[0].mixer.transfer_scale = 1000.0 if stage == "transfer" else None
        output = model.train()(tokens_BT, meta, labels_BT)
        loss = output.loss.total / 10 if stage == "tune" else output.auxiliary["transfer"]
        loss.backward()
        sum_partial_gradients(find_partial_gradients(model, groups), groups)
        values = {"loss": loss.detach()} | {name: own_grad(weight) for name, weight in model.named_parameters()}
        if groups.cp.size() > 1:
            for value in values.values():
                torch.distributed.all_reduce(value, group=groups.cp)
        shards = {name: shard for name, _, shard in parameter_shards(model)}
        joined = {name: join_parts(value, shards[name], groups) for name, value in values.items() if name in shards}
        found |= {f"{stage} {name}": value for name, value in (values | joined).items()}
    return found


def own_grad(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def run_forms(names: list[str]) -> dict[tuple[str, str], dict[str, Tensor]]:
    found = {}
    for kind, section in (("tensor", ParallelConfig(tensor=2)), ("context", ParallelConfig(context=2))):
        groups = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1).groups
        for name in names:
            found[name, kind] = run_form(HybridModel(config_of(FORMS[name]), groups, seed=1).double(), groups)
    return found


@pytest.mark.slow  # the suite of mixers runs one form on two ranks
def test_two_ranks_transfer_and_tune_as_one_does() -> None:
    names = ["learned", "lizard", "liger", "fading channels in one sum"]
    for found in run_ranks(run_forms, names):
        for (name, kind), actual in found.items():
            model = HybridModel(config_of(FORMS[name]), single_rank_groups(), seed=1).double()
            for key, expected in run_form(model, single_rank_groups()).items():
                assert_near(actual[key], expected, EXACT, f"{name}, {kind}, {key}")


def test_a_transfer_hands_on_the_teacher_and_trains_the_new_weights_alone() -> None:
    mixer, x_BTD = mixer_of({}), stream()
    meta = meta_of(packed_batch(DOCUMENTS)[2])
    plain = mixer(x_BTD, meta).y_BTD
    mixer.transfer_scale = 10.0
    output = mixer(x_BTD, meta)
    whole = mixer_of({}, window=24)
    whole.load_state_dict(mixer.state_dict())
    assert_near(output.y_BTD, whole(x_BTD, meta).y_BTD, EXACT, "softmax attention's output")
    assert not torch.allclose(plain, output.y_BTD)
    output.auxiliary["transfer"].backward()
    assert x_BTD.grad is None, "no gradient crosses a block"
    assert mixer.query_features.grad is not None and mixer.window_weight.grad is not None


def test_a_transfer_brings_the_output_near_the_teachers() -> None:
    mixer, x_BTD = mixer_of({}), stream().detach()
    meta = PackMeta.one_document_a_row(2, 24)
    mixer.transfer_scale = 1.0
    optimizer = torch.optim.Adam([mixer.query_features, mixer.key_features, mixer.window_weight], lr=0.05)
    distances = []
    for _ in range(40):
        optimizer.zero_grad()
        distance = mixer(x_BTD, meta).auxiliary["transfer"]
        distance.backward()
        optimizer.step()
        distances.append(float(distance.detach()))
    assert distances[-1] < 0.7 * distances[0], distances


def test_branches_add_up_and_their_share_is_measured() -> None:
    mixer, x_BTD = mixer_of({}), stream()
    meta = PackMeta.one_document_a_row(2, 24)
    mixer.measured = torch.zeros(2)
    mixer(x_BTD, meta)
    total, count = mixer.measured.tolist()
    assert count == 2 * (24 - 2 * WINDOW) * OPTIONS["num_heads"]
    assert 0.0 < total / count < 1.0
    both = mixer(x_BTD, meta).y_BTD
    for used in ("window", "linear"):
        mixer.used = used
        assert not torch.allclose(mixer(x_BTD, meta).y_BTD, both)


def test_sums_of_windows_add_each_window_alone() -> None:
    x_BSX = torch.randn(2, 19, 3, dtype=torch.float64)
    for width in (1, 2, 5, 7, 8, 19):
        expected = torch.stack([x_BSX[:, max(0, end - width + 1) : end + 1].sum(1) for end in range(19)], dim=1)
        assert_near(window_sum(x_BSX, width), expected, 1e-14, f"{width} tokens")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"combine": "average"}, "combine=average has features of hedgehog without the denominator"),
        ({"preset": "liger", "features": "hedgehog", "gate": "none"}, "features=hedgehog has features of hedgehog"),
        ({"gate": "key"}, "gate=key has one decay per key channel"),
        ({"features": "softmax", "feature_size": 4}, "feature_size=4 has no effect"),
        ({"positions": "none", "linear_positions": "rotary"}, "linear_positions=rotary needs positions: rope"),
        ({"linear_weight": 0.2}, "linear_weight=0.2 has no effect with combine: joint"),
    ],
)
def test_forms_that_do_not_exist_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(config_of(changes))


@pytest.mark.parametrize("changes", [{"window": 1}, {"feature_size": 0}])
def test_sizes_below_the_least_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        config_of(changes)
