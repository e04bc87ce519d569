"""States that megatron-core's distributed optimizer saved in its buckets become those of our parameters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from amfm_foreign_states.adopt import import_state
from amfm_foreign_states.dcp_folder import DcpFolder
from amfm_foreign_states.megatron.buckets import states_by_parameter
from amfm_foreign_states.megatron.read import MegatronFolder
from amfm_foreign_states.state import WrittenRun
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.checkpoint.manifest_file import read_manifest
from tests.examples.foreign_states.test_megatron import MAMBA, MOE
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import tiny_config

BUCKET = "optimizer.distributed.dp_group_idx_{}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_{}"


def write_there(folder: str, kinds: tuple[str, ...], layout: dict[str, int]) -> list[int]:
    """States of a hybrid in several forms."""
    from tests.examples.foreign_states import megatron_optimizer as megatron

    return megatron.write_states(folder, MOE | MAMBA, layout, kinds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(2, {}), (4, {"tensor": 2, "expert": 2, "expert_tensor": 1})],
    ids=["two data ranks", "tensor, data and expert ranks"],
)
def test_states_in_buckets_are_those_that_the_optimizer_holds(
    data: DataConfig, tmp_path: Path, num_ranks: int, layout: dict[str, int]
) -> None:
    kinds = ("gathered", "dp_reshardable", "fully_reshardable")
    sizes = run_ranks(write_there, str(tmp_path), kinds, layout, num_ranks=num_ranks)
    assert all(len(of_rank) > 2 for of_rank in sizes)
    config = tiny_config(data, tmp_path / "run")
    held, buckets = (import_state(tmp_path / kind, tmp_path / f"{kind}-in", config) for kind in kinds[:2])
    assert isinstance(held, WrittenRun) and isinstance(buckets, WrittenRun)
    found = diff_checkpoints(held.checkpoint, buckets.checkpoint)
    assert not any(found[name] for name in ("tensors", "optimizer_steps", "only_in_first", "only_in_second")), found
    # The optimizer's counter, not the iterations.
    assert {entry["optimizer_step"] for entry in read_manifest(buckets.checkpoint)["parameters"].values()} == {3}
    # What version 0.16.1 saves by parameters is shifted behind a bucket with padding.
    with pytest.raises(ValueError, match=r"float32 weights of .* are not those that were saved"):
        import_state(tmp_path / "fully_reshardable", tmp_path / "shifted", config)


def drawn(*shape: int, seed: int) -> Tensor:
    """Float32 weights or moments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, tensors: Mapping[str, Tensor | str]) -> DcpFolder:
    """A folder of these tensors, each in one chunk."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        save(dict(tensors), storage_writer=FileSystemWriter(folder), no_dist=True)
    return DcpFolder(folder)


# By hand: a vector of 10, 54 numbers of padding, a matrix; and what two tensor ranks have of one more.
VECTOR, MATRIX, MOMENT = drawn(10, seed=1), drawn(9, 8, seed=2), drawn(136, seed=3)
IN_A_BUCKET = torch.cat([VECTOR, drawn(54, seed=4), MATRIX.flatten()])


def weights() -> dict[str, Tensor]:
    """Weights that the bucket's round to, and what is not a parameter."""
    named = {"decoder.norm.weight": VECTOR.bfloat16(), "decoder.fc.weight": MATRIX.bfloat16()}
    return named | {"decoder.router.expert_bias": torch.zeros(4)}


def test_parameters_begin_at_multiples_of_64_numbers_in_any_order(tmp_path: Path) -> None:
    bucket = BUCKET.format(0, 0)
    folder = write(tmp_path, {**weights(), f"{bucket}.param": IN_A_BUCKET, f"{bucket}.exp_avg": MOMENT})
    states = states_by_parameter(folder)
    assert states.keys() == {"param", "exp_avg"}
    assert folder.tensor(states["param"]["decoder.fc.weight"]).equal(MATRIX)
    assert folder.tensor(states["param"]["decoder.norm.weight"]).equal(VECTOR)
    assert folder.source(states["exp_avg"]["decoder.fc.weight"]).read(2, 9).equal(MOMENT[80:].view(7, 8))


def test_buckets_that_are_not_the_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    bucket = BUCKET.format(1, 0)
    other = torch.cat([VECTOR, torch.zeros(54), MATRIX.flatten() * 1.01])
    with pytest.raises(
        ValueError, match=r"weights of decoder.fc.weight are in no bucket .*dp_group_idx_1.*from number 10 of 136"
    ):
        states_by_parameter(write(tmp_path / "other", {**weights(), f"{bucket}.param": other}))
    alike = {**weights(), "decoder.other.weight": VECTOR.bfloat16(), f"{bucket}.param": IN_A_BUCKET}
    with pytest.raises(
        ValueError, match=r"have the same values, .* import a later checkpoint, save it once with --dist-ckpt"
    ):
        states_by_parameter(write(tmp_path / "alike", alike))
    quantized = bucket.replace("bfloat16", "uint8")
    with pytest.raises(ValueError, match="FP8 weights"):
        states_by_parameter(write(tmp_path / "quantized", {**weights(), f"{quantized}.param": IN_A_BUCKET}))


def test_states_with_the_numbers_of_a_chunk_in_their_last_dimension_get_their_shape(tmp_path: Path) -> None:
    """The default of versions 0.8 to 0.14: [chunks of rows, chunks of columns, numbers]."""
    flat = {"optimizer.state.exp_avg.decoder.fc.weight": MOMENT[:72].view(1, 1, 72)}
    flat |= {"optimizer.state.exp_avg.decoder.norm.weight": MOMENT[72:82].view(1, 10)}
    folder = write(tmp_path, {**weights(), **flat})
    states = states_by_parameter(folder)["exp_avg"]
    assert folder.source(states["decoder.fc.weight"]).read(1, 4).equal(MOMENT[8:32].view(3, 8))
    assert folder.tensor(states["decoder.norm.weight"]).equal(MOMENT[72:82])


def test_float32_weights_of_other_numbers_are_refused(tmp_path: Path) -> None:
    """As version 0.16.1 saves them by parameters, behind a bucket that has padding."""
    masters = {"optimizer.state.param.decoder.fc.weight": MATRIX, "optimizer.state.param.decoder.norm.weight": VECTOR}
    assert states_by_parameter(write(tmp_path / "right", {**weights(), **masters})) == {}
    shifted = masters | {"optimizer.state.param.decoder.fc.weight": MATRIX.flatten().roll(8).view(9, 8)}
    with pytest.raises(
        ValueError, match=r"weights of decoder.fc.weight are not those that were saved .*dp_reshardable"
    ):
        states_by_parameter(write(tmp_path / "shifted", {**weights(), **shifted}))


def test_states_in_one_object_of_a_rank_are_refused_with_what_to_do(data: DataConfig, tmp_path: Path) -> None:
    """`dp_zero_gather_scatter`, which was saved without --ckpt-fully-parallel-save."""
    gathered = "optimizer.distributed.dp_group_idx_0.param_state/shard_0_1"
    write(tmp_path, {**weights(), gathered: "all states"})
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    with pytest.raises(
        ValueError, match=r"param_state/shard_0_1 is optimizer state that is not read; save it once with --dist"
    ):
        MegatronFolder(tmp_path, tiny_config(data, tmp_path).model)
