"""Multi-token prediction: its formula, documents, sharing, and that the main model does not know of it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from amfm.model.config.checks import check_model
from amfm.model.config.schema import MtpConfig
from amfm.model.hybrid import HybridModel
from amfm.model.mtp import Ahead
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.pipeline_split import cut_pieces
from tests.helpers.numbers import assert_near
from tests.model.small_models import MOE, meta_of, packed_batch, small_config, small_model

FLOAT64 = 1e-10
LENGTHS = ((1, 2, 7, 3, 4, 6),)  # documents of k and k + 1 tokens among them, for both depths
BALANCED = MOE.model_copy(update={"auxiliary_loss_weight": 0.01})


def shift_batch(tokens_BT, labels_BT, ids_BT, depths):
    return [Ahead.of_rows(tokens_BT, labels_BT, ids_BT, depth) for depth in range(1, depths + 1)]


def run(model, batch):
    tokens_BT, labels_BT, ids_BT = batch
    return model(tokens_BT, meta_of(ids_BT), labels_BT, ahead=shift_batch(*batch, model.config.num_depths))


def total_of(output):
    return output.loss.total + sum(loss.total for loss in output.mtp) / 3 + sum(output.auxiliary.values())


def test_labels_ahead_are_those_of_the_same_document():
    tokens_BT, labels_BT, ids_BT = packed_batch(LENGTHS)
    for depth, given in enumerate(shift_batch(tokens_BT, labels_BT, ids_BT, 2), 1):
        by_hand = []
        for start, length in zip((0, 1, 3, 10, 13, 17), LENGTHS[0]):
            for place in range(length):
                has_label = place + depth + 1 < length
                by_hand.append(int(tokens_BT[0, start + place + depth + 1]) if has_label else -100)
        assert given.labels_BT[0].tolist() == by_hand
        assert (given.labels_BT != -100).sum() == sum(max(0, length - depth - 1) for length in LENGTHS[0])
        assert torch.equal(given.tokens_BT[:, :-depth], tokens_BT[:, depth:])


@pytest.mark.parametrize("shared", [False, True])
def test_a_depth_is_its_formula(shared):
    config = small_config("M/*E/*E", mtp=MtpConfig(shared=shared))
    model, batch = small_model(config), packed_batch(((23,),))
    tokens_BT, _, ids_BT = batch
    output = run(model, batch)
    parameters = dict(model.named_parameters())

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config.norm_epsilon).rsqrt() * parameters[f"{name}.weight"]

    stream = model.pass_blocks(model.embed(tokens_BT), [0], meta_of(ids_BT))
    hidden = norm(stream.residual_BTD + stream.delta_BTD, "final_norm")
    for number, given in enumerate(shift_batch(*batch, 2)):
        own = f"mtp.{0 if shared else number}"
        embedded = F.embedding(given.tokens_BT, model.embedding.weight)
        joined = torch.cat([norm(embedded, f"{own}.embed_norm"), norm(hidden, f"{own}.stream_norm")], -1)
        x = joined @ parameters[f"{own}.in_proj.weight"].T
        for place, block in enumerate(model.mtp[0 if shared else number].blocks):
            x = x + block.mixer(norm(x, f"{own}.blocks.{place}.norm"), meta_of(ids_BT)).y_BTD
        hidden = norm(x, f"{own}.norm")
        logits = hidden @ model.head.weight.T
        expected = F.cross_entropy(logits[0], given.labels_BT[0], reduction="sum")
        assert_near(output.mtp[number].total, expected, FLOAT64)
    assert output.expert_counts.keys() == ({2} if shared else {2, 4})
    assert sum(int(counts.sum()) for counts in output.expert_counts.values()) == 2 * 2 * 23


@pytest.mark.parametrize("shared", [False, True])
def test_packed_rows_are_documents_apart(shared):
    config = small_config("M/*E/*E", moe=MOE, mtp=MtpConfig(shared=shared))
    packed, apart = small_model(config), small_model(config)
    batch = packed_batch(LENGTHS)
    output = run(packed, batch)
    total_of(output).backward()
    expected = 0
    for piece in torch.arange(23).split(list(LENGTHS[0])):
        expected = expected + total_of(run(apart, tuple(x_BT[:, piece] for x_BT in batch)))
    expected.backward()
    assert_near(total_of(output), expected, FLOAT64)
    for (name, parameter), other in zip(packed.named_parameters(), apart.parameters()):
        assert_near(parameter.grad, other.grad, FLOAT64, name)


def test_a_depth_sees_the_token_ahead_and_none_after_it():
    model = small_model(small_config("M*/*-"))
    tokens_BT, labels_BT, ids_BT = packed_batch(((23,),))

    def losses(changed):
        other_BT = tokens_BT.clone()
        other_BT[0, changed] = (other_BT[0, changed] + 1) % 40
        given = Ahead(shift_batch(other_BT, labels_BT, ids_BT, 1)[0].tokens_BT, labels_BT)
        return model(other_BT, meta_of(ids_BT), labels_BT, ahead=[given]).mtp[0].token_nll_R

    before = losses([])
    # The residual stream at t has x_t, the embedding x_(t+1).
    assert torch.equal(losses(12)[:11], before[:11])
    assert losses(12)[11] != before[11]


def test_without_labels_a_depth_has_no_loss():
    model = small_model(small_config("*-/*-/*-"))
    tokens_BT, labels_BT, ids_BT = packed_batch(((2,) * 5,))
    output = run(model, (tokens_BT, labels_BT, ids_BT))
    assert [float(loss.total) for loss in output.mtp] == [0.0, 0.0]
    total_of(output).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_the_main_model_is_the_same_without_depths():
    batch = packed_batch()
    tokens_BT, labels_BT, ids_BT = batch
    plain, deep = (HybridModel(small_config(f"M*E-{end}"), single_rank_groups(), seed=3) for end in ("", "/*E"))
    values = deep.state_dict()
    assert all(torch.equal(values[name], value) for name, value in plain.state_dict().items())
    assert values.keys() - plain.state_dict().keys() == {name for name in values if name.startswith("mtp.")}
    expected = plain(tokens_BT, meta_of(ids_BT), labels_BT)
    assert torch.equal(run(deep, batch).loss.total, expected.loss.total)


def test_detached_depths_give_the_main_model_no_gradient():
    config = small_config("M*/*-", mtp=MtpConfig(detach=True))
    model, batch = small_model(config), packed_batch()
    sum(loss.total for loss in run(model, batch).mtp).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("mtp."), name


def test_hits_count_the_labels_that_a_depth_finds_most_likely():
    model, batch = small_model(small_config("M/*E/*E")).eval(), packed_batch()
    output = run(model, batch)
    assert output.mtp_hits.shape == (2,)
    model.train()
    assert run(model, batch).mtp_hits is None
    given = shift_batch(*batch, 1)[0]
    wrong = Ahead(given.tokens_BT, torch.where(given.labels_BT == -100, -100, 39))
    tokens_BT, labels_BT, ids_BT = batch
    assert int(model.eval()(tokens_BT, meta_of(ids_BT), labels_BT, ahead=[wrong]).mtp_hits[0]) <= 46


def test_the_last_piece_has_the_depths_and_a_copy_of_the_embedding():
    config = small_config("M*E-/*E", moe=BALANCED)
    batch = packed_batch()
    tokens_BT, labels_BT, ids_BT = batch
    whole = small_model(config)
    pieces = cut_pieces(config, 2, 23)
    first, last = (HybridModel(config, single_rank_groups(), seed=1, pieces=[piece]).double() for piece in pieces)
    assert len(first.mtp) == 0 and last.copied_parameters == {"embedding.weight"}
    for part in (first, last):
        part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
    stream = first.pass_blocks(first.embed(tokens_BT), first.blocks.indices(), meta_of(ids_BT))
    stream = last.pass_blocks(stream, last.blocks.indices(), meta_of(ids_BT))
    ahead = shift_batch(*batch, 1)
    output = last.finish(stream, labels_BT, ahead=ahead, meta=meta_of(ids_BT))
    expected = run(whole, batch)
    assert_near(total_of(output), total_of(expected), FLOAT64)
    total_of(output).backward()
    total_of(expected).backward()
    gradient = first.embedding.weight.grad + last.embedding.weight.grad
    assert_near(gradient, whole.embedding.weight.grad, FLOAT64)


def test_recomputed_depths_have_the_same_gradients():
    config = small_config("M/*E/*E", mtp=MtpConfig(shared=True))
    kept, recomputed, batch = small_model(config), small_model(config), packed_batch()
    recomputed.recompute_blocks("*E")
    total_of(run(kept, batch)).backward()
    total_of(run(recomputed, batch)).backward()
    for (name, parameter), other in zip(kept.named_parameters(), recomputed.named_parameters()):
        assert torch.equal(parameter.grad, other[1].grad), name


def test_settings_without_a_depth_are_refused():
    with pytest.raises(ValueError, match=r"model.mtp is set but model.pattern has no MTP layer"):
        check_model(small_config("M*", mtp=MtpConfig()))
    with pytest.raises(ValueError, match=r"model.pattern has '\*' .* but model.attention is missing"):
        check_model(small_config("M/*E", attention=None))
