"""Blocks that are computed again in the backward pass: bitwise identical results, less memory kept."""

import pytest
import torch

from amfm.launch.plan.activations import Storage, recomputed_bytes
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.model import block as block_file
from amfm.model.build import build_mixer
from amfm.model.config.moe import MoeConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from tests.model.small_models import loss_of, meta_of, packed_batch, small_config

CONFIG = small_config(
    "M*E-M", moe=MoeConfig(num_experts=5, top_k=2, expert_hidden_size=8, auxiliary_loss_weight=0.1, z_loss_weight=0.1)
)


def build(letters, config=CONFIG):
    model = HybridModel(config, single_rank_groups(), seed=3)
    model.recompute_blocks(letters)
    return model


def loss_and_gradients(model):
    tokens_BT, labels_BT, ids_BT = packed_batch()
    output = model(tokens_BT, meta_of(ids_BT), labels_BT)
    loss = loss_of(output)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, output.expert_counts


@pytest.mark.parametrize(
    ("pattern", "letters", "compiler", "placement"),
    [
        pytest.param("M*E-M", "M", None, "before", marks=pytest.mark.slow),
        ("M*E-M", "*E", None, "before"),
        ("M*E-M", "M*E-", None, "before"),
        ("*-", "*-", "aot_eager", "before"),
        pytest.param("M*E-M", "M*E-", "aot_eager", "before", marks=pytest.mark.slow),
        ("M*E-M", "M*E-", None, "after_attention"),
        ("M*E-M", "M*E-", None, "both"),
    ],
)
def test_losses_and_gradients_keep_every_bit(pattern, letters, compiler, placement):
    config = CONFIG.model_copy(update={"norm_placement": placement, "pattern": pattern})
    plain, again = build("", config), build(letters, config)
    if compiler is not None:
        plain.compile_blocks(compiler=compiler)
        again.compile_blocks(compiler=compiler)
    (loss, gradients, counts), (other, others, other_counts) = loss_and_gradients(plain), loss_and_gradients(again)
    assert torch.equal(loss, other)
    assert all(torch.equal(counts[block], other_counts[block]) for block in counts)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


def test_a_mixer_with_dropout_drops_the_same_when_it_is_computed_again(monkeypatch):
    """As a package's may: blocks of ours draw by their own seeds, and keep no generators."""

    def build_with_dropout(*given):
        mixer = build_mixer(*given)
        mixer.dropout = torch.nn.Dropout(0.5)
        mixer.register_forward_hook(lambda own, _, mixed: mixed._replace(y_BTD=own.dropout(mixed.y_BTD)))
        return mixer

    assert not any(block.has_dropout for block in build("").blocks)
    monkeypatch.setattr(block_file, "build_mixer", build_with_dropout)
    found = []
    for letters in ("", "M*E-"):
        torch.manual_seed(5)
        found.append(loss_and_gradients(build(letters)))
    (loss, gradients, _), (other, others, _) = found
    assert torch.equal(loss, other)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def kept_bytes(model, meta, tokens_BT):
    """Bytes that a forward pass keeps for the backward pass: each storage once, weights and the input left out."""
    given = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), tokens_BT]}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stream = model.pass_blocks(model.embed(tokens_BT), model.blocks.indices(), meta)
    assert stream.delta_BTD.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def test_a_block_keeps_its_input_alone():
    tokens_BT = torch.randint(40, (2, 64))
    meta = PackMeta.one_document_a_row(2, 64)
    stream = tokens_BT.numel() * CONFIG.hidden_size * 4
    kept = {letters: kept_bytes(build(letters), meta, tokens_BT) for letters in ("", "M", "M*E-")}
    assert kept["M*E-"] == 5 * stream
    assert kept["M*E-"] < kept["M"] < kept[""]
    storage = Storage(4, "torch")
    planned = recomputed_bytes(block_bytes(CONFIG, "M", storage), CONFIG, storage)
    assert planned.kept * tokens_BT.numel() == stream
    assert planned.working > block_bytes(CONFIG, "M", storage).working


def test_decoding_and_evaluation_compute_once():
    model = build("M*E-")
    tokens_BT, labels_BT, ids_BT = packed_batch()
    with torch.no_grad():
        output = model(tokens_BT, meta_of(ids_BT), labels_BT)
        assert torch.equal(output.loss.nll_sum, build("")(tokens_BT, meta_of(ids_BT), labels_BT).loss.nll_sum)
        rows = PackMeta.one_document_a_row(2, 5)
        assert model(tokens_BT[:, :5], rows, state=model.empty_state(2)).state.length == 5
