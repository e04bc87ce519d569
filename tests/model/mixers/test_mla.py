"""Multi-head latent attention on a GPU: which of PyTorch's and our kernels its documents go to."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.attention.varlen import DocumentEnds, _refuse_own_release
from amfm.model.config.kinds import registered_kinds
from amfm.model.hybrid import HybridModel
from amfm.model.mixers.mla import MlaMixer
from amfm.model.parallel.groups import single_rank_groups
from tests.helpers.determinism import without_determinism
from tests.model.small_models import small_config


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
    sizes = {"latent_size": 64, "nope_head_dim": 128, "rope_head_dim": 64, "value_head_dim": 128, "num_heads": 4}
    config = small_config(registered_kinds()["mla"].symbol, mixers={"mla": sizes})
    (block,) = HybridModel(config, single_rank_groups(), device="meta", backend="triton").blocks
    mixer = block.mixer
    assert isinstance(mixer, MlaMixer)
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
        y = mixer._attend(q, k, v, ids, DocumentEnds(offsets, 40))
    assert y.shape == v.shape
    assert "_varlen_attn" in operations.names
