"""Registered mixers in the planner: what is counted without memory is what a real pass keeps."""

from __future__ import annotations

import pytest
import torch

from amfm.launch.plan.registered import COUNTED_TOKENS, id_of, registered_block
from amfm.model.config.kinds import registered_kinds
from amfm.model.packing import PackMeta
from tests.model.mixers.samples import mixer_config
from tests.model.small_models import small_model

# Several chunks and windows of the samples, which are smaller than those of a run.
TOKENS = 512


@pytest.mark.parametrize("name", list(registered_kinds()))
def test_kept_bytes_are_those_of_a_real_pass(name):
    config = mixer_config(name, blocks=1)
    mixer = small_model(config, dtype=torch.float32).blocks[0].mixer
    x_BTD = torch.randn(1, TOKENS, config.hidden_size, requires_grad=True)
    known = {id_of(tensor) for tensor in [x_BTD, *mixer.parameters(), *mixer.buffers()]}
    kept = {}

    def note(tensor):
        if id_of(tensor) not in known:
            kept[id_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = mixer(x_BTD, PackMeta.one_document_a_row(1, TOKENS))
    measured = sum(storage.nbytes() for storage in kept.values())
    del output
    counted = registered_block(config, registered_kinds()[name].symbol, torch.float32, TOKENS)
    # PyTorch pads what its attention keeps of each query.
    assert counted.kept_bytes * TOKENS == pytest.approx(measured, rel=0.03)
    assert sum(rows * columns for rows, columns in counted.matrices) == sum(
        weight.numel() for weight in mixer.parameters() if weight.dim() > 1
    )


@pytest.mark.parametrize("name", ["retnet", "gla", "gated_deltanet", "kda", "mamba1", "mla", "window"])
def test_what_triton_kernels_keep_is_counted_without_a_card_and_tensor_ranks_cut_it(name):
    config = mixer_config(name, blocks=1)
    symbol, options = registered_kinds()[name].symbol, getattr(config.mixers, name)
    chunks = {"chunk_size": 64} if hasattr(options, "chunk_size") else {}
    mixers = config.mixers.model_copy(update={name: options.model_copy(update=chunks)})
    config = config.model_copy(update={"mixers": mixers})
    own, cut, torch_own = (
        registered_block(config, symbol, torch.bfloat16, COUNTED_TOKENS, backend, ranks)
        for backend, ranks in (("triton", 1), ("triton", 2), ("torch", 1))
    )
    assert 0 < own.kept_bytes != torch_own.kept_bytes
    assert own.working_bytes > 0
    assert own.kept_bytes / 2 <= cut.kept_bytes < own.kept_bytes
