"""What stands in one document of a packed sequence never reaches another: bitwise, forwards and backwards."""

import pytest
import torch

from amfm.model.packing import PackMeta
from tests.model.small_models import MOE, packed_batch, small_config, small_model

LENGTHS = ((7, 1, 12, 3), (9, 14))


def outputs_and_gradients(config, dtype, tokens_BT, labels_BT, ids_BT, weights_BT):
    """Logits, and the gradient of a weighted loss with respect to each position's embedding."""
    model = small_model(config, dtype=dtype)
    meta = PackMeta.from_document_ids(ids_BT)
    vocabulary = tokens_BT.max() + 1
    # One row of the table a position, so that its gradient is only that position's.
    rows = model.embedding.weight.detach()[tokens_BT.flatten() % config.vocab_size].clone().requires_grad_()
    model.embedding.weight = torch.nn.Parameter(rows.detach())
    positions_BT = torch.arange(tokens_BT.numel()).view_as(tokens_BT)
    logits_BTV = model(positions_BT, meta).logits_BTV
    nll = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), labels_BT.flatten().clamp(max=vocabulary), reduction="none", ignore_index=-100
    )
    (nll.view_as(weights_BT) * weights_BT).sum().backward()
    return logits_BTV.detach(), model.embedding.weight.grad.view(*tokens_BT.shape, -1)


# Of logits and gradients of a few units: some roundings of 2^-24 and of 2^-9; a document that leaks changes them by far more.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "ME*-M*E"])
def test_changing_one_document_leaves_the_others_equal(pattern, dtype):
    config = small_config(pattern, moe=MOE.model_copy(update={"top_k": 3}))
    tokens_BT, labels_BT, ids_BT = packed_batch(LENGTHS)
    ones_BT = torch.ones(tokens_BT.shape, dtype=dtype)
    logits, gradients = outputs_and_gradients(config, dtype, tokens_BT, labels_BT, ids_BT, ones_BT)
    for row, document in ((0, 0), (0, 1), (0, 2), (1, 1)):
        changed = torch.zeros_like(tokens_BT, dtype=torch.bool)
        changed[row] = ids_BT[row] == document
        other_tokens = torch.where(changed, (tokens_BT * 7 + 11) % config.vocab_size, tokens_BT)
        other_labels = torch.where(changed & (labels_BT != -100), 5, labels_BT)
        other_weights = torch.where(changed, 3.0, ones_BT).to(dtype)
        new_logits, new_gradients = outputs_and_gradients(
            config, dtype, other_tokens, other_labels, ids_BT, other_weights
        )
        assert not torch.equal(new_logits[changed], logits[changed])
        # An expert that gets another number of rows is multiplied in another order on some processors.
        rounding = ROUNDING[dtype] if "E" in pattern else 0.0
        torch.testing.assert_close(new_logits[~changed], logits[~changed], rtol=0, atol=rounding)
        torch.testing.assert_close(new_gradients[~changed], gradients[~changed], rtol=0, atol=rounding)


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "ME*-M*E"])
def test_packed_documents_equal_documents_alone(pattern):
    config = small_config(pattern)
    model = small_model(config)
    tokens_BT, _, ids_BT = packed_batch(LENGTHS)
    logits_BTV = model(tokens_BT, PackMeta.from_document_ids(ids_BT)).logits_BTV
    for row in range(len(tokens_BT)):
        for document in ids_BT[row].unique():
            here = ids_BT[row] == document
            alone = model(tokens_BT[row][here][None], PackMeta.one_document_a_row(1, int(here.sum()))).logits_BTV[0]
            # float64; the chunks of the scan fall elsewhere.
            torch.testing.assert_close(logits_BTV[row][here], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pattern", ["M", "*", "ME*-M*E"])
def test_a_token_never_changes_the_logits_before_it(pattern):
    config = small_config(pattern)
    model = small_model(config, dtype=torch.float32)
    tokens_BT, _, _ = packed_batch(((23,),))
    meta = PackMeta.one_document_a_row(1, 23)
    logits_BTV = model(tokens_BT, meta).logits_BTV
    for position in (1, 8, 22):
        other = tokens_BT.clone()
        other[0, position] = (other[0, position] + 1) % config.vocab_size
        new_logits_BTV = model(other, meta).logits_BTV
        assert torch.equal(new_logits_BTV[:, :position], logits_BTV[:, :position])
        assert not torch.equal(new_logits_BTV[:, position], logits_BTV[:, position])
