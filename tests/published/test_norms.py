"""The gradient norm of every single weight, whichever ranks hold it, is that of the whole weight."""

from __future__ import annotations

import torch

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.grad_norm import GlobalNorm
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.parallel.models import VARIANTS

CONFIG = ModelConfig.model_validate(
    VARIANTS["latent"] | {"attention": VARIANTS["latent"]["attention"] | {"num_kv_heads": 1}}
)


def whole_gradient(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A gradient of a weight of this number, in which every element weighs."""
    return 1.0 + torch.rand(shape, generator=torch.Generator().manual_seed(number))


def norms_of_rank() -> dict[str, tuple[float, float]]:
    """By name, the norm that two tensor ranks compute and that of the whole gradient."""
    section = ParallelConfig(tensor=2, sequence_parallel=True)
    parallel = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    model = HybridModel(CONFIG, parallel.groups)
    norm, found = GlobalNorm(model, parallel), {}
    for number, (name, parameter, shard) in enumerate(parameter_shards(model)):
        whole = whole_gradient(number, shard.whole_shape(parameter.shape))
        parameter.grad = shard.shard(whole, parallel.groups)
        found[name] = (float(norm.of_whole([parameter])), float(whole.double().norm()))
    return found


def test_the_norm_of_each_weight_is_that_of_the_whole_weight_on_two_tensor_ranks() -> None:
    ranks = run_ranks(norms_of_rank, num_ranks=2)
    assert ranks[0] == ranks[1]
    assert any(name.endswith("sinks") for name in ranks[0])
    for name, (found, expected) in ranks[0].items():
        # float32 sums of some hundred squares
        assert abs(found - expected) <= 1e-5 * expected, f"{name}: {found} for {expected}"
