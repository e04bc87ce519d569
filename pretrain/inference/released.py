"""What a released model brings next to its weights: how it talks, pads, ends and samples, and how long its texts
may be.

Training needs none of it, and who uses the continued model needs all of it: without the chat template it cannot answer, without
a pad token no batch can be made, and with one end token where it had two it never stops. So an import keeps these facts in one
file, a run that starts from the import copies the file into its directory, and an export writes them where transformers looks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.json_files import read_bounded, read_object, understood
from amfm.pretrain.checkpoint.manifest_file import CHECKPOINT_NAME

FILE = "released.json"
MAX_TEMPLATE_BYTES = 1 << 20
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)
# Of generation_config.json: who wrote it, which is us then.
NOT_KEPT = ("transformers_version", "_from_model_config")
# Files that are read, or that say nothing about how a model is used.
READ = (
    *(
        "config.json",
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ),
    *("merges.txt", "chat_template.jinja", "*.safetensors", "*.safetensors.index.json", "amfm_*.json", "*_amfm.py"),
    *("README.md", "LICENSE*", ".*", "__pycache__"),
)


@dataclass(frozen=True)
class Released:
    """Facts of a released model that an export of its successor has too.

    max_position_embeddings: tokens of a text at most. token_ids: special ids of config.json. generation:
    generation_config.json. special_tokens: of tokenizer_config.json. chat_template: a Jinja text, or several by name.
    dropped: what it had besides, for whoever imports it. model_type: its class, which an export with target auto prefers.
    """

    max_position_embeddings: int | None = None
    token_ids: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    special_tokens: dict[str, Any] = field(default_factory=dict)
    chat_template: Any = None
    dropped: tuple[str, ...] = ()
    model_type: str | None = None

    def describe(self) -> list[str]:
        """What is kept, in words."""
        ends = self.generation.get("eos_token_id", self.token_ids.get("eos_token_id"))
        sampling = ", ".join(f"{name} {value}" for name, value in self.generation.items() if name not in TOKEN_IDS)
        found = {
            "a chat template": self.chat_template is not None,
            f"end tokens {ends}": ends is not None,
            f"the pad token {_text_of(self.special_tokens.get('pad_token'))}": "pad_token" in self.special_tokens,
            f"generation settings ({sampling})": bool(sampling),
            f"{self.max_position_embeddings or 0:,} positions": self.max_position_embeddings is not None,
        }
        return [text for text, is_there in found.items() if is_there]

    def to_bytes(self) -> bytes:
        """The content of its file."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False).encode() + b"\n"


def read_released(source: Path, config: Mapping[str, Any]) -> Released:
    """Read them from a folder of transformers, whose config.json is given with its defaults. Raises ValueError for damaged files."""
    settings = _read(source / "special_tokens_map.json") | _read(source / "tokenizer_config.json")
    template: Any = settings.get("chat_template")
    path = source / "chat_template.jinja"
    if path.is_file():
        template = read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    length = config.get("max_position_embeddings")
    return Released(
        max_position_embeddings=length if isinstance(length, int) and length > 0 else None,
        token_ids={name: config[name] for name in TOKEN_IDS if config.get(name) is not None},
        generation={
            name: value for name, value in _read(source / "generation_config.json").items() if name not in NOT_KEPT
        },
        special_tokens={name: settings[name] for name in SPECIAL if settings.get(name)},
        chat_template=template,
        dropped=tuple(_find_dropped(source, settings)),
        model_type=config.get("model_type"),
    )


def find_released(path: Path) -> Released | None:
    """Those of an import, a run's directory or one of its checkpoints; None if there are none."""
    file = (path.parent.parent if CHECKPOINT_NAME.fullmatch(path.name) else path) / FILE
    if not file.is_file():
        return None
    record, known = read_object(file), {item.name for item in fields(Released)}
    with understood(file):
        return Released(**{key: value for key, value in record.items() if key in known} | {"dropped": ()})


def _find_dropped(source: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """What a user of the released model may miss."""
    for name in sorted(entry.name for entry in source.iterdir()):
        if not any(fnmatch(name, pattern) for pattern in READ):
            yield name
    for name in ("add_bos_token", "add_eos_token"):
        if settings.get(name):
            yield f"{name} of tokenizer_config.json: texts are encoded as in training, without it"


def _read(path: Path) -> dict[str, Any]:
    return dict(read_object(path)) if path.is_file() else {}


def _text_of(token: Any) -> Any:
    """The text of a special token, which a file gives as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token
