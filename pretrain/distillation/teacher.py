"""Which weights teach, and how they read rows.

A teacher is named by a path. The path of a run means its newest checkpoint, which is another one tomorrow; so what was found at
first is kept with a digest of it (`Teacher`), and everything later is compared with that.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3
from torch import Tensor

from amfm.data_pipeline.durable.json_files import read_object, take
from amfm.model.config.schema import ModelConfig, read_saved_model
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.inspect import find_checkpoint
from amfm.pretrain.checkpoint.manifest_file import MANIFEST_NAME, list_checkpoints, read_manifest
from amfm.pretrain.config.saved import read_saved_config
from amfm.pretrain.inference.weights import DESCRIPTION, Weights, read_weights


@dataclass(frozen=True)
class Teacher:
    """What a path meant: the folder with the weights, and a digest of what decides them."""

    path: str
    folder: str
    digest: str

    @classmethod
    def find(cls, path: str, known: Teacher | None = None) -> Teacher:
        """The teacher that a path means; `known`: what it meant before, which it must still be.

        Of a run that is the checkpoint in `known`, or else its newest. Raises ValueError for weights other than the known
        ones, RuntimeError for a run whose checkpoint is gone.
        """
        folder = Path(path)
        saved = list_checkpoints(folder / "checkpoints") or list_checkpoints(folder)
        if saved and known is not None:
            folder = next((each for each in saved if each.name == Path(known.folder).name), Path(known.folder))
            if not (folder / MANIFEST_NAME).is_file():
                raise RuntimeError(
                    f"distill.teacher={path}: {known.folder}, the checkpoint that taught before, is gone; put it back, or start "
                    "from the beginning in another directory"
                )
        elif saved:
            folder = find_checkpoint(folder)
        found = cls(path, str(folder), digest_weights(folder))
        if known is not None and found.digest != known.digest:
            raise ValueError(
                f"distill.teacher={path} has weights of digest {found.digest}, and what taught before, {known.folder}, had "
                f"{known.digest}; put that back, or start from the beginning in another directory"
            )
        return found

    @classmethod
    def from_json(cls, file: Path) -> Teacher:
        """Read what `to_json` wrote; ValueError for another file."""
        record = read_object(file)
        path, folder, digest = (take(record, name, str, file) for name in ("path", "folder", "digest"))
        return cls(path, folder, digest)

    def to_json(self) -> bytes:
        """As a file of its own."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def read(self) -> Weights:
        """Read the weights, without MTP layers; of our own folders every byte is verified."""
        folder = Path(self.folder)
        if is_huggingface(folder):
            from amfm.pretrain.export.import_huggingface import read_huggingface

            return read_huggingface(folder)[0].without_depths()
        return read_weights(folder).without_depths()


def find_model(path: str) -> ModelConfig:
    """What the model of a teacher's path is, by its newest checkpoint if that is a run's, without reading weights."""
    folder = Path(path)
    folder = next(iter(list_checkpoints(folder / "checkpoints") or list_checkpoints(folder)), folder)
    if is_huggingface(folder):
        from amfm.pretrain.export.import_huggingface import choose_config, read_config_json

        return choose_config(folder, read_config_json(folder)).without_depths()
    if (folder / DESCRIPTION).is_file():
        described = read_object(folder / DESCRIPTION)
        saved = read_saved_model(described.get("model"), described.get("packages", {}))
        return ModelConfig.model_validate(saved).without_depths()
    if not (folder / MANIFEST_NAME).is_file():
        raise no_weights(folder)
    return read_saved_config(read_manifest(folder)).model.without_depths()


def no_weights(folder: Path) -> ValueError:
    """What to say of a folder that cannot teach."""
    return ValueError(
        f"distill.teacher={folder} is not a checkpoint, run directory or imported model, and no folder of transformers"
    )


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is of transformers."""
    return (folder / "config.json").is_file()


def digest_weights(folder: Path) -> str:
    """Digest of a checkpoint's or weights folder's list of digests, or of all files of a folder of transformers.

    Raises ValueError for any other folder.
    """
    named = [folder / name for name in (MANIFEST_NAME, DESCRIPTION) if (folder / name).is_file()]
    if not named and is_huggingface(folder):
        named = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if not named or (folder / "parts").is_dir():
        raise no_weights(folder)
    digest = blake3()
    for file in named:
        digest.update_mmap(file)
    return digest.hexdigest()


def require_same_tokens(teacher: Weights, tokenizer: str, vocab_size: int, path: str) -> None:
    """Reject a teacher whose probabilities are of other tokens than `tokenizer` (an identity) makes: ValueError says what differs."""
    found = teacher.tokenizer_identity()
    if found != tokenizer:
        raise ValueError(
            f"distill.teacher={path} was trained with tokenizer {found}, and the data of this run is of {tokenizer}; tokens mean "
            "other things there: prepare the data with the teacher's tokenizer, or give another teacher"
        )
    if teacher.model.vocab_size != vocab_size:
        raise ValueError(
            f"distill.teacher={path} has vocab_size {teacher.model.vocab_size}, and model.vocab_size={vocab_size}; "
            "probabilities are compared token by token: use the teacher's number"
        )
    if teacher.model.head is not None or teacher.model.lora_mixer is not None:
        raise ValueError(
            f"distill.teacher={path} has a head of a package or updates that a router chooses among; give another teacher"
        )


def read_rows(teacher: HybridModel, tokens_BT: Tensor, meta: PackMeta) -> Tensor:
    """What the teacher's head reads of rows, [B, T, D]."""
    stream = teacher.pass_blocks(teacher.embed(tokens_BT), teacher.blocks.indices(), meta)
    return teacher.read_head(stream)
