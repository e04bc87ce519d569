"""Folders to import that someone else wrote: their pickles and archives run nothing, and reserve no more than they have."""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from amfm_foreign_states import dcp_folder
from amfm_foreign_states.dcp_folder import DcpFolder
from amfm_foreign_states.torch_file import Unread, read_common, read_param
from amfm_foreign_states.universal import MODEL_STATES, UniversalFolder
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from amfm.launch.cli import run
from tests.examples.foreign_states.conftest import Evil

CONFIG = Path(__file__).parents[3] / "configs" / "tiny_cpu.yaml"
PRECIOUS = b"precious" * 8


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Writes an archive whose loading by torch overwrites a file outside of its folder, and names that file."""
    place = tmp_path_factory.mktemp("torchscript")
    precious = place / "precious"

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = str(precious)
            self.bytes = torch.zeros(64, dtype=torch.uint8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        @torch.jit.export
        def __getstate__(self) -> str:
            return self.path

        @torch.jit.export
        def __setstate__(self, state: str) -> None:
            self.path, self.training = state, True
            self.bytes = torch.from_file(state, True, 64, dtype=torch.uint8).fill_(65)

    precious.write_bytes(PRECIOUS)
    torch.jit.script(Archive()).save(place / "archive.pt")
    precious.write_bytes(PRECIOUS)

    def write(path: Path) -> Path:
        shutil.copy(place / "archive.pt", path)
        return precious

    return write


def test_the_archive_of_these_tests_would_run(torchscript: Callable[[Path], Path], tmp_path: Path) -> None:
    precious = torchscript(tmp_path / "common.pt")
    torch.jit.load(tmp_path / "common.pt")
    assert precious.read_bytes() == b"A" * 64
    precious.write_bytes(PRECIOUS)


def test_torchscript_as_common_state_of_megatron_is_refused_and_does_not_run(
    torchscript: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "megatron"
    dcp.save({"embedding.word_embeddings.weight": torch.zeros(448, 32)}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    precious = torchscript(folder / "common.pt")
    assert run(["import", str(folder), str(tmp_path / "out"), "--config", str(CONFIG)]) == 2
    assert precious.read_bytes() == PRECIOUS
    assert "common.pt is not a whole file of torch.save" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODEL_STATES)
def test_torchscript_as_states_of_deepspeed_is_refused_and_does_not_run(
    torchscript: Callable[[Path], Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "zero" / "a").mkdir(parents=True)
    precious = torchscript(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is not a whole file of torch.save"):
        UniversalFolder(tmp_path).module({"buffer": (1,)})
    shutil.copy(tmp_path / name, tmp_path / "zero" / "a" / "fp32.pt")
    with pytest.raises(ValueError, match=r"fp32.pt is not a whole file of torch.save"):
        read_param(tmp_path / "zero" / "a" / "fp32.pt")
    shutil.copy(tmp_path / name, tmp_path / "zero" / "optimizer_state.pt")
    with pytest.raises(ValueError, match=r"optimizer_state.pt is not a whole file of torch.save"):
        UniversalFolder(tmp_path).step(["a"])
    assert precious.read_bytes() == PRECIOUS


def test_common_state_gives_numbers_and_tensors_between_objects_that_are_not_read(tmp_path: Path) -> None:
    args = argparse.Namespace(hidden_size=8, evil=Evil(tmp_path / "touched"))
    state = {"args": args, "buffer": torch.arange(3.0), "kind": FileSystemWriter, "half": torch.bfloat16, "set": {1}}
    torch.save(state, tmp_path / "common.pt")
    found = read_common(tmp_path / "common.pt")
    assert found["args"].hidden_size == 8 and isinstance(found["args"].evil, Unread) and found["kind"] is Unread
    assert found["buffer"].tolist() == [0, 1, 2] and found["half"] is torch.bfloat16 and found["set"] == {1}
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_protocol_of_pickle_runs_code(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps({"iteration": Evil(tmp_path / "touched")}, protocol)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="not the metadata of torch Distributed Checkpoint"):
        DcpFolder(tmp_path)
    torch.save({"iteration": Evil(tmp_path / "touched")}, tmp_path / "common.pt", pickle_protocol=protocol)
    try:
        found: dict[str, Any] = read_common(tmp_path / "common.pt")
    except ValueError as error:
        assert "common.pt is not a whole file of torch.save" in str(error)  # torch reads protocol 2, which it writes
    else:
        assert isinstance(found["iteration"], Unread)
    (tmp_path / "common.pt").write_bytes(content)  # not an archive
    with pytest.raises(ValueError, match=r"common.pt is not a whole file of torch.save"):
        read_common(tmp_path / "common.pt")
    assert not (tmp_path / "touched").exists()


def test_metadata_makes_no_object_of_torch_that_is_no_record(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(FileSystemWriter))
    with pytest.raises(ValueError, match="it holds type"):
        DcpFolder(tmp_path)


def chunk_faults(shape: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> list[str]:
    """What is wrong with chunks at (offsets, sizes) that are all stored."""
    cut = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    stored = {MetadataIndex("x", chunk.offsets): None for chunk in cut}
    found = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), cut)
    return dcp_folder._chunk_faults("x", found, stored)


def test_chunks_that_overlap_and_leave_a_gap_are_refused_whatever_their_sum() -> None:
    overlapping = "x: its chunks overlap, and so do not hold all of it"
    assert chunk_faults((6,), ((0,), (2,)), ((2,), (4,))) == []
    assert chunk_faults((6,), ((0,), (4,)), ((2,), (2,))) == [overlapping]  # 4 and 5 are in none
    assert chunk_faults((4, 4), ((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 2), (2, 2))) == []
    assert chunk_faults((4, 4), ((0, 0), (3, 4)), ((2, 1), (2, 2))) == [overlapping]
    pinwheel = ((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))
    assert chunk_faults((3, 3), *pinwheel) == []  # no straight line cuts it
    assert chunk_faults((3, 3), *pinwheel[:3], ((1, 0), (1, 2)), ((2, 0), (1, 1))) == []
    assert chunk_faults((3, 3), *pinwheel[:3], ((1, 0), (1, 2)), ((1, 1), (1, 1))) == [overlapping]
    assert chunk_faults((6,), ((-2,), (4,)), ((2,), (2,))) == ["x: a chunk ends outside of shape [6]"]
    assert chunk_faults((2, 3), ((0,), (6,))) == ["x: a chunk has other dimensions than shape [2, 3]"]
    assert chunk_faults((4,), ((0,), (4,)), ((4,), (0,))) == []
    assert chunk_faults((), ((), ())) == [] and chunk_faults((0, 3)) == []


def test_a_large_grid_of_chunks_is_looked_at_once() -> None:
    grid = [((row * 3, column * 5), (3, 5)) for row in range(50) for column in range(60)]
    assert chunk_faults((150, 300), *grid) == []
    moved = [((0, 1), (3, 5)) if place == (0, 0) else (place, size) for place, size in grid]
    assert chunk_faults((150, 300), *moved) == ["x: its chunks overlap, and so do not hold all of it"]


@pytest.mark.parametrize("properties", [None, TensorProperties(dtype=32)])  # type: ignore[arg-type]
def test_a_tensor_without_a_dtype_is_refused(tmp_path: Path, properties: TensorProperties | None) -> None:
    tensor = TensorStorageMetadata(properties, torch.Size([0]), [])  # type: ignore[arg-type]
    if properties is None:
        del tensor.properties
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"x": tensor}, storage_data={})))
    with pytest.raises(ValueError, match=r"\.metadata is not as its format asks|x has the dtype 32, which is not one"):
        DcpFolder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02K\x01r\xff\xff\xff\x0f.",  # LONG_BINPUT: a place of the memo
        b"\x80\x05\x96" + (1 << 35).to_bytes(8, "little") + b".",  # BYTEARRAY8
        b"\x80\x04\x8d" + (1 << 35).to_bytes(8, "little") + b"a.",  # BINUNICODE8
        b"\x80\x04\x8e" + (1 << 35).to_bytes(8, "little") + b"a.",  # BINBYTES8
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # LONG4
        b"\x80\x04\x95" + (1 << 35).to_bytes(8, "little") + b"K\x01.",  # FRAME
    ],
)
def test_metadata_that_claims_a_size_takes_no_memory(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="not the metadata of torch Distributed Checkpoint"):
        DcpFolder(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB; they ask for 2 to 32 GiB
