"""Files of a checkpoint: safetensors hashed while written, and their verification by the manifest.

Each rank writes one safetensors file, whose format any library reads without our code. We write it ourselves and not with
`save_file`, because the digest is then computed in the one pass that writes, and memory holds one tensor at a time. Files
next to those that the manifest lists (`manifest_file.py`) are a fault if they hold tensors, else a warning.

A file is in the folder of its block of ranks, so that no folder of a checkpoint has thousands of files that all ranks create at
once: a file system takes such entries one after the other. The first block's folder is the checkpoint itself.

Random state of one rank goes into its file as tensors: torch on the CPU and on the device, numpy, Python; JSON inside, because
unpickling a file runs code.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy
import torch
from torch import Tensor

from amfm.data_pipeline.durable.files import named, sync
from amfm.data_pipeline.terminal import Report, silent
from amfm.pretrain.checkpoint.manifest_file import MANIFEST_NAME, MARK_NAME, StorageError, read_manifest, read_patiently
from amfm.pretrain.tensor_files import TensorFile, encode_header, tensor_bytes

CHUNK_BYTES = 1 << 24  # written, read and hashed at a time
RANK_FILE = re.compile(r"(?:ranks-\d{5}/)?rank-(\d{5})\.safetensors")
FLOAT32_KINDS = ("weight/", "exp_avg/", "exp_avg_sq/", "momentum/", "ema/")
SUMMED = (torch.float32, torch.float64)  # sums of narrow dtypes overflow early
Take = Callable[[str, int, Tensor], None]  # the name of a stored tensor, the first of the numbers, and they


@dataclass(frozen=True)
class FileEntry:
    """A file as the manifest lists it: its size and the SHA-256 of its bytes."""

    num_bytes: int
    sha256: str


def file_names_by_rank(manifest: Mapping[str, Any]) -> dict[int, str]:
    """Names of a checkpoint's files by the rank that wrote them; older ones are in no folders of blocks."""
    found = {name: RANK_FILE.fullmatch(name) for name in manifest["files"]}
    return {int(match[1]): name for name, match in found.items() if match is not None}


def make_place(checkpoint_dir: Path, name: str) -> Path:
    """Path of a file to be written below the folder of a checkpoint, which is there; its block's folder is made."""
    path = checkpoint_dir / name
    if path.parent != checkpoint_dir:
        with named(path.parent):
            path.parent.mkdir(exist_ok=True)
    return path


def sync_folders(checkpoint_dir: Path) -> None:
    """Make the names of all files of a checkpoint durable. Raises OSError with the path."""
    for path in checkpoint_dir.glob("ranks-*/"):
        sync(path)
    sync(checkpoint_dir)


def measure_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Compute the bytes that `write_tensors` will write."""
    data_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return len(head_of(tensors, metadata)) + data_bytes


def head_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Encode the head of a file that holds these tensors in their order."""
    return encode_header({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}, metadata)[0]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileEntry:
    """Write a new safetensors file, hash it on the way, and return when the disk holds it.

    Tensors go out one after the other, so memory grows by one tensor at most. Raises FileExistsError when the file is
    there, OSError when the disk rejects, RuntimeError for a tensor with NaN or infinity: a state that cannot be
    resumed must not replace one that can.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    with named(path), path.open("xb") as file:

        def put(block: bytes | memoryview) -> None:
            nonlocal num_bytes
            digest.update(block)
            file.write(block)
            num_bytes += len(block)

        put(head_of(tensors, metadata))
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise RuntimeError(f"tensor {key} holds NaN or infinity; the checkpoint is not written")
            data = tensor_bytes(tensor)
            for start in range(0, len(data), CHUNK_BYTES):
                put(data[start : start + CHUNK_BYTES])
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(num_bytes, digest.hexdigest())


def is_finite(numbers: Tensor) -> bool:
    """Whether no element is NaN or infinite. A finite sum has no such element, and is a pass without a mask."""
    if numbers.dtype in SUMMED and bool(torch.isfinite(numbers.sum())):
        return True
    return bool(torch.isfinite(numbers).all())


def replace_text(path: Path, text: str) -> None:
    """Replace a small file atomically: after a crash the old content or the new one is there, never a part.

    What waits under the temporary name, left by a crash or put there, is removed and never written to.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with named(temporary), temporary.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync(path.parent)


def verify_file(
    checkpoint_dir: Path,
    name: str,
    entry: Mapping[str, Any],
    report: Report = silent,
    before: int = 0,
    total: int = 0,
    take: Take | None = None,
) -> str | None:
    """Verify one file of a checkpoint: returns what is wrong with it, or None.

    Compares size and SHA-256 with the manifest's entry; rejects a NaN or an infinity in any float tensor. The file is read
    once: `take` hears of each tensor's numbers as they pass, not yet known to be sound, and again from the start where
    the storage failed in passing. `report` hears of the bytes, after `before` of other files, of `total`. Raises
    StorageError if the storage does not give it.
    """
    path = checkpoint_dir / name
    try:
        return read_patiently(path, lambda: find_fault(path, entry, report, before, total, take))
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    except StorageError:
        raise
    except RuntimeError as error:
        return str(error)


def find_fault(
    path: Path, entry: Mapping[str, Any], report: Report, before: int, total: int, take: Take | None
) -> str | None:
    """Find what is wrong with a file by its entry, as `verify_file`. Raises OSError.

    A digest that does not match is the fault to tell: whatever else is wrong follows from it.
    """
    num_bytes = path.stat().st_size
    if num_bytes != entry["bytes"]:
        return f"{path}: {num_bytes} bytes, the manifest states {entry['bytes']}"
    fault, parts = None, []
    try:
        tensors = TensorFile(path, RuntimeError).tensors
        parts = sorted(tensors.items(), key=lambda part: part[1].first_byte)
    except RuntimeError as error:
        fault = str(error)
    digest = hashlib.sha256()
    # Pinned where a GPU takes the numbers, which is several times as fast.
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=take is not None and torch.cuda.is_available())
    array: Any = buffer.numpy()
    memory = memoryview(array)
    with path.open("rb", buffering=0) as file:

        def blocks(stop: int) -> Iterator[Tensor]:
            """The bytes up to `stop`, hashed, in blocks of integers."""
            nonlocal before
            while file.tell() < stop:
                wanted, got = memory[: stop - file.tell()], 0
                while got < len(wanted) and (count := file.readinto(wanted[got:])):
                    got += count
                digest.update(wanted[:got])
                before += got
                report(f"reading {path.parent.name}", before, total)
                if got < len(wanted):
                    return  # cut while it was read: the digest tells
                yield buffer[:got]

        for key, stored in parts:
            for _ in blocks(stored.first_byte):
                pass
            start, kind = 0, key.startswith(FLOAT32_KINDS)
            if kind and stored.dtype != torch.float32:
                fault = fault or f"{path}: tensor {key} is {stored.dtype}, saved are float32"
            for block in blocks(stored.first_byte + stored.numel * stored.dtype.itemsize):
                numbers = block.view(stored.dtype)
                if stored.dtype.is_floating_point and not is_finite(numbers):
                    fault = fault or f"{path}: tensor {key} holds NaN or infinity"
                if take is not None and fault is None:
                    take(key, start, numbers)
                start += numbers.numel()
        for _ in blocks(num_bytes):
            pass
    if digest.hexdigest() != entry["sha256"]:
        return f"{path}: SHA-256 {digest.hexdigest()}, the manifest states {entry['sha256']}"
    return fault


def find_foreign_files(checkpoint_dir: Path, manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """List files that the manifest does not: (tensor files, which are a fault; others, which deserve a warning)."""
    blocks = {str(PurePosixPath(name).parent) for name in manifest["files"]} | {"."}
    known = {MANIFEST_NAME, MARK_NAME, *blocks, *manifest["files"]}
    folders = [path for path in (checkpoint_dir / block for block in blocks) if path.is_dir()]
    there = (str(entry.relative_to(checkpoint_dir)) for path in folders for entry in path.iterdir())
    foreign = sorted(name for name in there if name not in known)
    tensor_files = [name for name in foreign if name.endswith(".safetensors")]
    return tensor_files, [name for name in foreign if name not in tensor_files]


def verify_checkpoint(checkpoint_dir: Path, report: Report = silent) -> tuple[dict[str, Any] | None, list[str]]:
    """Verify all of a checkpoint: returns its manifest (None when that is broken) and all problems found."""
    try:
        manifest = read_manifest(checkpoint_dir)
    except RuntimeError as error:
        return None, [str(error)]
    problems = []
    done, total = 0, sum(entry["bytes"] for entry in manifest["files"].values())
    for name, entry in manifest["files"].items():
        try:
            problem = verify_file(checkpoint_dir, name, entry, report, done, total)
        except StorageError as error:
            problem = str(error)
        done += entry["bytes"]
        if problem is not None:
            problems.append(problem)
    foreign, _ = find_foreign_files(checkpoint_dir, manifest)
    problems += [f"{checkpoint_dir / name}: is not in the manifest" for name in foreign]
    return manifest, problems


def collect_random_state() -> dict[str, Tensor]:
    """Copy the states of all generators that a rank may draw from, as bytes."""
    numpy_state: Any = numpy.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    version, numbers, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": encode_json(numpy_state),
        "python": encode_json([version, list(numbers), gauss]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, Tensor]) -> None:
    """Restore the generators from collected states; a CUDA state is dropped if there is no CUDA."""
    torch.set_rng_state(states["torch"])
    numpy_state = decode_json(states["numpy"])
    numpy_state["state"]["key"] = numpy.array(numpy_state["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state(numpy_state)
    version, numbers, gauss = decode_json(states["python"])
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def encode_json(value: Any) -> Tensor:
    """Encode a value as JSON in a tensor of bytes (JSON writes floats so that they read back exactly)."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def decode_json(encoded: Tensor) -> Any:
    """Decode what `encode_json` encoded."""
    return json.loads(bytes(encoded.tolist()))
