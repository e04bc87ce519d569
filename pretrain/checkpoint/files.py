"""Files of a checkpoint: safetensors hashed while written, a manifest that guards itself, and their verification.

Each rank writes one safetensors file, whose format any library reads without our code. We write it ourselves and not with
`save_file`, because the digest is then computed in the one pass that writes, and memory holds one tensor at a time. The
manifest lists every file with size and SHA-256, and carries a SHA-256 of its own text: a cut, swapped or edited file is
found before anything is loaded. Files next to the manifest's are a fault if they hold tensors, else a warning.

A file lies in the folder of its block of ranks, so that no folder of a checkpoint has thousands of files that all ranks create at
once: a file system takes such entries one after the other. The first block's folder is the checkpoint itself.

A manifest of version 1, which knew data parallelism alone, is read as one of version 2 (`upgrade_manifest`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import Tensor

from amfm.data_pipeline.durable.files import sync
from amfm.data_pipeline.durable.foreign_files import inside, parse_object, read_bounded, take, understood
from amfm.data_pipeline.durable.naming import named
from amfm.data_pipeline.progress import Report, silent
from amfm.pretrain.tensor_files import TensorFile, encode_header, tensor_bytes

FORMAT = "amfm-checkpoint"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
# A checkpoint with a file of this name is never pruned; what is in it doesn't matter.
MARK_NAME = "keep"
EVERY = b"train.keep_every_steps\n"  # in a mark that a setting made; one with other content, or none, is someone's
# What a manifest has besides its step.
MAPPINGS = (
    *("files", "parameters", "shards", "buffers", "groups", "engine"),
    *("state", "config", "identities", "layout", "versions"),
)
CHUNK_BYTES = 1 << 24  # written, read and hashed at a time
BLOCK_RANKS = 256  # whose files share a folder
RANK_FILE = re.compile(r"(?:ranks-\d{5}/)?rank-(\d{5})\.safetensors")
FLOAT32_KINDS = ("weight/", "exp_avg/", "exp_avg_sq/", "momentum/")
NO_DIGEST = "0" * 64
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
READ_PAUSES = (0.2, 1.0, 3.0)  # seconds before a file is read again that the storage did not give
T = TypeVar("T")
Take = Callable[[str, int, Tensor], None]  # the name of a stored tensor, the first of the numbers, and they


@dataclass(frozen=True)
class FileEntry:
    """A file as the manifest lists it: its size and the SHA-256 of its bytes."""

    num_bytes: int
    sha256: str


def rank_file_name(rank: int) -> str:
    """Name of the file that a rank writes, below the folder of the checkpoint."""
    name, first = f"rank-{rank:05d}.safetensors", rank - rank % BLOCK_RANKS
    return f"ranks-{first:05d}/{name}" if first else name


def file_names_by_rank(manifest: Mapping[str, Any]) -> dict[int, str]:
    """Names of a checkpoint's files by the rank that wrote them; older ones lie in no folders of blocks."""
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
    there, OSError when the disk refuses, RuntimeError for a tensor with NaN or infinity: a state that cannot be
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
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise RuntimeError(f"tensor {key} holds NaN or infinity; the checkpoint is not written")
            data = tensor_bytes(tensor)
            for start in range(0, len(data), CHUNK_BYTES):
                put(data[start : start + CHUNK_BYTES])
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(num_bytes, digest.hexdigest())


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


class StorageError(RuntimeError):
    """The storage does not give a file that may well be whole: no reason to take the checkpoint for a damaged one."""


def read_patiently(path: Path, read: Callable[[], T]) -> T:
    """Read from a file, again where the storage fails in passing (EIO, ESTALE, ETIMEDOUT).

    Raises OSError for what is not there at all, StorageError with path and error for all that lasts.
    """
    for pause in (*READ_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno in ABSENT:
                raise
            if pause is None:
                number = errno.errorcode.get(error.errno or 0, "no number")
                raise StorageError(
                    f"{path}: {error.strerror or error} ({number}) at {len(READ_PAUSES) + 1} attempts; the storage failed and the "
                    "file may be whole: continue when it answers again"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def encode_manifest(body: Mapping[str, Any]) -> str:
    """Encode a manifest as JSON that carries its own SHA-256 (computed with 64 zeros in that place)."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": NO_DIGEST, **body}
    text = json.dumps(document, indent=1) + "\n"
    return text.replace(NO_DIGEST, hashlib.sha256(text.encode()).hexdigest(), 1)


def read_manifest(checkpoint_dir: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and verify its own digest.

    Raises RuntimeError that names the file and what is wrong: absent, not JSON, another format or version, a digest
    that does not match, or the step of another folder. StorageError where the storage does not give it.
    """
    path = checkpoint_dir / MANIFEST_NAME
    try:
        raw = read_patiently(path, lambda: read_bounded(path, error=RuntimeError))
    except OSError as error:
        raise RuntimeError(f"{path}: cannot be read ({error.strerror}); the checkpoint was never completed") from error
    manifest = parse_object(raw, path, RuntimeError)
    text = raw.decode()
    if manifest.get("format") != FORMAT:
        raise RuntimeError(f"{path}: is not an amfm checkpoint manifest")
    version = manifest.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise RuntimeError(f"{path}: format version {version}, this program reads versions 1 and {FORMAT_VERSION}")
    stated = str(manifest.get("sha256"))
    found = hashlib.sha256(text.replace(stated, NO_DIGEST, 1).encode()).hexdigest()
    if found != stated:
        raise RuntimeError(f"{path}: content changed since it was written (SHA-256 {found}, states {stated})")
    with understood(path, RuntimeError):
        manifest = manifest if version == FORMAT_VERSION else upgrade_manifest(manifest)
        check_manifest(checkpoint_dir, manifest)
    named_step = checkpoint_dir.name.removesuffix(".old").removeprefix("step-")
    if named_step.isdigit() and int(named_step) != manifest["step"]:
        raise RuntimeError(f"{path}: is of step {manifest['step']} but lies in {checkpoint_dir.name}")
    return manifest


def check_manifest(checkpoint_dir: Path, manifest: dict[str, Any]) -> None:
    """Hold a manifest to its form: every key is there, and every file that it names lies in the folder and is listed."""
    path = checkpoint_dir / MANIFEST_NAME
    take(manifest, "step", int, path, RuntimeError)
    for key in MAPPINGS:
        take(manifest, key, dict, path, RuntimeError)
    for name, entry in manifest["files"].items():
        inside(checkpoint_dir, name, RuntimeError)
        take(entry, "bytes", int, path, RuntimeError)
        take(entry, "sha256", str, path, RuntimeError)
    used = {entry["file"] for entry in manifest["buffers"].values()}
    used |= {file for shards in manifest["shards"].values() for shard in shards for _, _, file in shard["ranges"]}
    if not used <= manifest["files"].keys():
        raise RuntimeError(
            f"{path}: names {sorted(used - manifest['files'].keys())[:3]}, which its `files` do not list"
        )
    if manifest["parameters"].keys() != manifest["shards"].keys():
        raise RuntimeError(f"{path}: parameters and shards name different tensors")


def upgrade_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Convert a manifest of version 1 to version 2: every parameter was whole, and rank 0 wrote the buffers.

    So each parameter becomes one shard without cuts, whose ranges are version 1's fragments.
    """
    upgraded = {key: value for key, value in manifest.items() if key != "fragments"}
    upgraded["shards"] = {
        name: [{"where": {}, "coordinates": {}, "ranges": ranges}] for name, ranges in manifest["fragments"].items()
    }
    upgraded["buffers"] = {name: {**entry, "file": rank_file_name(0)} for name, entry in manifest["buffers"].items()}
    upgraded["layout"] = {**manifest["layout"], "axes": {"dp": manifest["layout"]["world_size"]}}
    return upgraded


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

    Compares size and SHA-256 with the manifest's entry; refuses a NaN or an infinity in any float tensor. The file is read
    once: `take` hears of each tensor's numbers as they pass, not yet known to be sound, and again from the start where
    the storage failed in passing. `report` hears of the bytes, after `before` of other files, of `total`. Raises
    StorageError where the storage does not give it.
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
        return f"{path}: {num_bytes} bytes, the manifest says {entry['bytes']}"
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
            """The bytes up to `stop`, hashed, in blocks of whole numbers."""
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
                if stored.dtype.is_floating_point and not bool(torch.isfinite(numbers).all()):
                    fault = fault or f"{path}: tensor {key} holds NaN or infinity"
                if take is not None and fault is None:
                    take(key, start, numbers)
                start += numbers.numel()
        for _ in blocks(num_bytes):
            pass
    if digest.hexdigest() != entry["sha256"]:
        return f"{path}: SHA-256 {digest.hexdigest()}, the manifest says {entry['sha256']}"
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
