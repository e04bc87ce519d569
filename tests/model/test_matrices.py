"""The matrices of every block are found: none is left out, cut in two, or taken for one when it is several."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.matrices import MatrixCut, MatrixStack, is_matrix, list_matrices, split_parameter
from amfm.model.parallel.groups import ProcessGroupCollection, single_rank_groups
from amfm.model.parallel.shards import Shard, ShardSpec, parameter_shards
from amfm.pretrain.config.file import load_config
from tests.model.mixers.samples import mixer_config, sample_names
from tests.parallel.models import VARIANTS

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# What has the shape of a matrix and is none, by the end of its name: taps, decays, biases, routers.
NOT_MATRICES = {"conv.weight", "conv_weight", "A_log", "gate_bias", "router.weight", "router", "shift_bias", "tables"}


class Place:
    """One rank of a group that does not exist: enough to cut a parameter."""

    def __init__(self, rank: int, size: int) -> None:
        self.number, self.ranks = rank, size

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.ranks


def build(model: ModelConfig | dict) -> tuple[HybridModel, ProcessGroupCollection]:
    config = model if isinstance(model, ModelConfig) else ModelConfig.model_validate(model)
    groups = single_rank_groups()
    return HybridModel(config, groups, device="meta"), groups


def assert_complete(model: HybridModel, stacks: list[MatrixStack]) -> None:
    """Matrices fill their parameters without gaps, and no parameter of two dims inside a block is missing."""
    filled: dict[str, int] = {}
    for stack in stacks:
        assert stack.start == filled.get(stack.name, 0), f"{stack.name} has a gap"
        filled[stack.name] = stack.start + stack.numel
    outside = set()
    for name, parameter, _ in parameter_shards(model):
        if name in filled:
            assert filled[name] == parameter.numel(), f"{name} is not covered"
        elif parameter.dim() > 1 and min(parameter.shape[-2:]) > 1 and not name.startswith(("embedding.", "head.")):
            own = re.sub(r"^(inner|branches\.\d+)\.", "", name.partition(".mixer.")[2])
            outside.add(own or name)
    assert outside <= NOT_MATRICES


@pytest.mark.parametrize("preset", PRESETS)
def test_no_matrix_of_a_preset_falls_between_the_two_optimizers(preset: str) -> None:
    model = load_config(CONFIGS / f"{preset}.yaml").model
    # One block of each kind has all names, after them the depths that predict more tokens.
    letters = "".join(dict.fromkeys(model.letters))
    depths = "".join(f"/{depth}" for depth in model.pattern.split("/")[1:])
    module, groups = build(model.model_copy(update={"pattern": letters + depths}))
    stacks = list_matrices(module, groups, per_head=True)
    assert_complete(module, stacks)
    assert any(stack.name.startswith("mtp.") for stack in stacks) == bool(depths)


@pytest.mark.parametrize("mixer", sample_names())
def test_no_matrix_of_a_registered_mixer_is_left_out(mixer: str) -> None:
    module, groups = build(mixer_config(mixer, blocks=1))
    assert_complete(module, list_matrices(module, groups, per_head=True))


def shapes(stacks: list[MatrixStack], name: str) -> list[tuple[int, int, int]]:
    return [(stack.count, stack.rows, stack.columns) for stack in stacks if stack.name.endswith(name)]


def test_a_fused_matrix_is_split_by_segment_and_by_head() -> None:
    module, groups = build(VARIANTS["mixers"])
    by_head = list_matrices(module, groups, per_head=True)
    together = list_matrices(module, groups, per_head=False)
    # z and x of 8 heads, B and C of 2 groups, one row per head of dt.
    assert shapes(by_head, "blocks.0.mixer.in_proj.weight") == [
        (8, 4, 32),
        (8, 4, 32),
        (2, 8, 32),
        (2, 8, 32),
        (1, 8, 32),
    ]
    assert shapes(together, "blocks.0.mixer.in_proj.weight") == [
        *((1, 32, 32), (1, 32, 32)),
        *((1, 16, 32), (1, 16, 32)),
        (1, 8, 32),
    ]
    assert shapes(by_head, "q_proj.weight") == [(8, 8, 32)] and shapes(by_head, "k_proj.weight") == [(2, 8, 32)]
    assert shapes(by_head, "o_proj.weight") == [(1, 32, 64)]
    # Experts one by one, and the gate of SwiGLU apart from its up matrix.
    assert shapes(by_head, "blocks.1.mixer.experts.up") == [(1, 16, 32)] * 8
    swiglu, _ = build(VARIANTS["latent"])
    stacks = list_matrices(swiglu, groups, per_head=True)
    # Latents of 12 channels, and those of biases.
    assert shapes(stacks, "blocks.1.mixer.experts.up") == [(1, 16, 20), (1, 16, 20)] * 8
    assert shapes(stacks, "blocks.3.mixer.up_proj.weight") == [(1, 48, 32), (1, 48, 32)]


def test_tensor_ranks_have_whole_heads_or_slices_of_a_matrix() -> None:
    groups = single_rank_groups()
    groups.tp = groups.expt_tp = Place(1, 4)
    keys = Shard((ShardSpec(0, "tp", (16,), (2,)),))
    beta = Shard((ShardSpec(0, "tp", (32, 8), (8, 8)),))
    gates = Shard((ShardSpec(0, "tp", (48, 48)),))
    output = Shard((ShardSpec(1, "tp", (64,)),))
    down = Shard((ShardSpec(0, "ep", (6,)), ShardSpec(2, "expt_tp", (16,))))

    def split(shape: tuple[int, ...], shard: Shard, *, per_head: bool = True) -> list[MatrixStack]:
        return list(split_parameter("blocks.0", shape, shard, groups, per_head=per_head))

    # Four ranks share two key heads: each has a whole one, or a half of both together, twice.
    assert split((8, 32), keys) == [MatrixStack("blocks.0", 0, 1, 8, 32)]
    (together,) = split((8, 32), keys, per_head=False)
    assert together == MatrixStack("blocks.0", 0, 1, 8, 32, MatrixCut("tp", 0, 2)) and together.shape == (16, 32)
    # Numbers are those of the whole: heads 2 and 3 are here, and the matrix after all eight.
    assert split((10, 32), beta) == [
        MatrixStack("blocks.0", 0, 2, 4, 32, first=2),
        MatrixStack("blocks.0", 256, 1, 2, 32, MatrixCut("tp", 0, 4), first=8),
    ]
    assert [(stack.start, stack.first) for stack in split((24, 32), gates)] == [(0, 0), (384, 1)]
    assert split((32, 16), output) == [MatrixStack("blocks.0", 0, 1, 32, 16, MatrixCut("tp", 1, 4))]
    stack = split((6, 32, 4), down)
    assert [part.start for part in stack] == [128 * expert for expert in range(6)]
    assert stack[0].cut == MatrixCut("expt_tp", 1, 4) and stack[0].shape == (32, 16)
    groups.ep = Place(1, 2)
    assert [part.first for part in split((3, 32, 4), down)] == [3, 4, 5]


def test_names_and_shapes_decide() -> None:
    assert is_matrix("blocks.0.mixer.in_proj.weight", (8, 4)) and is_matrix("mtp.0.in_proj.weight", (4, 8))
    assert is_matrix("blocks.3.mixer.experts.up", (2, 8, 4))
    for name, shape in (
        ("embedding.weight", (8, 4)),
        ("head.weight", (8, 4)),
        ("blocks.0.norm.weight", (4,)),
        ("blocks.0.mixer.conv.weight", (8, 4)),
        ("blocks.0.mixer.A_log", (8, 4)),
        ("blocks.0.mixer.router.weight", (8, 4)),
        ("blocks.0.mixer.shared_gate.weight", (1, 4)),
    ):
        assert not is_matrix(name, shape), name
