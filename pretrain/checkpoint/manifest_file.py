"""The manifest of a checkpoint: it lists every file with size and SHA-256 and guards its own text. Read without torch.

A cut, swapped or edited manifest is found before anything that it names is loaded. One of version 1, which knew only data
parallelism, is read as one of version 2 (`upgrade_manifest`).

Names of checkpoints: which folders are complete ones, and the newest step among them, so that a launcher knows at once where
a run will continue.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from amfm.data_pipeline.durable.json_files import inside, parse_object, read_bounded, take, understood
from amfm.pretrain.launcher_protocol import find_rollback

if TYPE_CHECKING:
    from amfm.pretrain.config.schema import RunConfig


FORMAT = "amfm-checkpoint"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
# A checkpoint with a file of this name is never pruned; what is in it does not matter.
MARK_NAME = "keep"
EVERY = b"train.keep_every_steps\n"  # in a mark that a setting made; one with other content, or none, is someone's
# What a manifest has besides its step.
MAPPINGS = (
    *("files", "parameters", "shards", "buffers", "groups", "engine"),
    *("state", "config", "identities", "layout", "versions"),
)
BLOCK_RANKS = 256  # whose files share a folder
NO_DIGEST = "0" * 64
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
READ_PAUSES = (0.2, 1.0, 3.0)  # seconds before a file is read again that the storage did not give
T = TypeVar("T")


def rank_file_name(rank: int) -> str:
    """Name of the file that a rank writes, below the folder of the checkpoint."""
    name, first = f"rank-{rank:05d}.safetensors", rank - rank % BLOCK_RANKS
    return f"ranks-{first:05d}/{name}" if first else name


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
        raise RuntimeError(f"{path}: is of step {manifest['step']} but is in {checkpoint_dir.name}")
    return manifest


def check_manifest(checkpoint_dir: Path, manifest: dict[str, Any]) -> None:
    """Hold a manifest to its form: every key is there, and every file that it names is in the folder and is listed."""
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


# `step-N.old` is a complete checkpoint that is being replaced by another of the same step.
CHECKPOINT_NAME = re.compile(r"step-(\d{8,})(\.old)?")
TEACHER_FILE = "teacher.json"  # of a run directory: which weights the path of a teacher meant at its start


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """List the folders that are checkpoints by name, newest step first, a replaced one after its successor."""
    if not checkpoints_dir.is_dir():
        return []
    found = []
    for path in checkpoints_dir.iterdir():
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest_saved_step(run_dir: str | Path) -> int:
    """Step of the newest complete checkpoint of a run by its name, -1 without one."""
    found = list_checkpoints(Path(run_dir) / "checkpoints")
    return step_of(found[0]) if found else -1


def continued_step(config: RunConfig) -> int:
    """Step that the next start of a run continues from, -1 for none: that of `train.resume_step`, until it went back there."""
    run_dir, step = Path(config.run.dir), config.train.resume_step
    return newest_saved_step(run_dir) if step is None or find_rollback(run_dir) == step else step


def step_of(checkpoint: Path) -> int:
    """Step of a folder that is a checkpoint by name."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint.name} is not the name of a checkpoint"
    return int(match[1])
