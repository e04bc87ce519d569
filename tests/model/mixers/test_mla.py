"""Multi-head latent attention on a GPU: which of PyTorch's and our kernels its documents go to."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.attention.varlen import DocumentEnds, _refuse_own_release
from amfm.model.mixers.mla import MlaMixer
from tests.helpers.determinism import without_determinism


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(_refuse_own_release() is not None, reason="this torch has no variable-length attention for us")
@without_determinism()
def test_documents_on_a_card_go_to_variable_length_attention_as_those_of_attention_do():
    """Kimi Linear's heads of 192 channels, whose values fill up to as many; on fake tensors."""
    mixer = SimpleNamespace(
        build=SimpleNamespace(backend="triton"), key_size=192, sinks=None, noted_logits=lambda: None
    )
    with FakeTensorMode(), Operations() as operations:
        q, k, v, ids = (
            torch.empty(shape, dtype=dtype, device="cuda")
            for shape, dtype in (
                ((1, 64, 4, 192), torch.bfloat16),
                ((1, 64, 4, 192), torch.bfloat16),
                ((1, 64, 4, 128), torch.bfloat16),
                ((1, 64), torch.int32),
            )
        )
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        y = MlaMixer._attend(mixer, q, k, v, ids, DocumentEnds(offsets, 40))
    assert y.shape == v.shape
    assert "_varlen_attn" in operations.names
