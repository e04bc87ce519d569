"""Where arguments of Megatron-LM are written: a script, a list of flags, the list in a log, YAML, or a checkpoint."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from amfm.data_pipeline.durable.foreign_files import read_bounded, understood
from amfm.pretrain.foreign_states.megatron_arguments.shell import find_flags
from amfm.pretrain.foreign_states.megatron_arguments.table import Arguments, resolve

MAX_BYTES = 1 << 24
RUN_CONFIG = "run_config.yaml"
# As Megatron-LM prints its arguments: a name, dots, the value.
PRINTED = re.compile(r"^(?:\[[^\]]*\]:?|\d+:)?\s*([A-Za-z_]\w*) \.{3,} (.*?)\s*$", re.MULTILINE)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
WORDS = {"None": None, "True": True, "False": False, "true": True, "false": False, "null": None}
# Sections of Megatron-Bridge's run_config.yaml; a later one stands where two have a name.
SECTIONS = (
    "dist",
    "ddp",
    "logger",
    "checkpoint",
    "tokenizer",
    "dataset",
    "mixed_precision",
    "train",
    "validation",
    "rng",
    "scheduler",
    "optimizer",
    "model",
)
DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def read_arguments(path: Path) -> Arguments:
    """Read a script, a text of flags, a log, YAML or a checkpoint's folder. Raises ValueError if no flag is found."""
    if path.is_dir():
        found = read_folder(path)
        if found is None:
            raise ValueError(
                f"{path} records no arguments of Megatron-LM: neither common.pt with `args` nor {RUN_CONFIG}; give the script "
                "of the run"
            )
        return found
    text = read_bounded(path, MAX_BYTES).decode("utf-8", errors="replace")
    if path.suffix in (".yaml", ".yml"):
        return of_yaml(text, path)
    printed = PRINTED.findall(text)
    if len(printed) > 10:
        return resolve(str(path), {name: read_value(value) for name, value in printed}, is_record=True)
    flags = pair_flags(find_flags(text))
    if not flags:
        raise ValueError(f"{path} has no flags (--name value) of a training program; give a script or a list of flags")
    return resolve(str(path), flags)


def read_folder(path: Path) -> Arguments | None:
    """The arguments that a checkpoint records, of Megatron-LM, Bridge or Megatron-DeepSpeed; None if it records none."""
    from amfm.pretrain.foreign_states.megatron import COMMON, find_iteration
    from amfm.pretrain.foreign_states.torch_file import read_common
    from amfm.pretrain.foreign_states.universal import UniversalFolder, is_universal

    if is_universal(path):
        states = UniversalFolder(path).states()
        return of_record(read_common(states).get("args"), path) if states.is_file() else None
    folder = find_iteration(path)
    if (folder / RUN_CONFIG).is_file():
        return of_yaml(
            read_bounded(folder / RUN_CONFIG, MAX_BYTES).decode("utf-8", errors="replace"), folder / RUN_CONFIG
        )
    return of_record(read_common(folder / COMMON).get("args"), folder / COMMON)


def of_record(args: Any, where: Path) -> Arguments | None:
    """Arguments as a program saved them; values of types that are not read are left out."""
    if not isinstance(args, Namespace):
        return None
    values = {name: plain(value) for name, value in vars(args).items()}
    values["normalization"] = NORMS.get(str(values.get("normalization")), values.get("normalization", NOT_READ))
    if "position_embedding_type" not in values and "use_rotary_position_embeddings" in values:
        values |= of_deepspeed(values)
    return resolve(str(where), {name: value for name, value in values.items() if value is not NOT_READ}, is_record=True)


def of_deepspeed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron-DeepSpeed calls differently: positions are two flags, experts a list; its converter unpads vocabularies."""
    learned = "learned_absolute" if values.get("add_position_embedding") else "none"
    positions = "rope" if values["use_rotary_position_embeddings"] else learned
    experts = values.get("num_experts")
    dense = {"num_experts": None} if isinstance(experts, list) and set(experts) == {1} else {}
    return {"position_embedding_type": positions, "padded_vocab_size": NOT_READ, "vocab_size": NOT_READ, **dense}


NOT_READ = object()
NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}


def plain(value: Any) -> Any:
    """A value as YAML would have it; dtypes by their name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return DTYPES.get(str(value), NOT_READ)


def of_yaml(text: str, path: Path) -> Arguments:
    """Megatron-Bridge's run_config.yaml, or flags in a mapping. Raises ValueError for anything else."""
    try:
        with understood(path):
            tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML that is read: {str(error)[:200]}") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} is not a mapping of arguments")  # noqa: TRY004
    tree = tree.get("MODEL_ARGS", tree)
    if isinstance(tree, Mapping) and isinstance(tree.get("model"), Mapping):
        return resolve(str(path), of_bridge(tree), is_flags=False, is_record=True)
    if not isinstance(tree, Mapping) or not any(str(name).startswith("-") for name in tree):
        raise ValueError(f"{path} has neither flags (`--name: value`) nor the sections of {RUN_CONFIG}")
    return resolve(str(path), {str(name): of_entry(value) for name, value in tree.items() if value is not False})


def of_entry(value: Any) -> Any:
    """A value of a mapping of flags: lists may be texts in brackets, numbers texts."""
    if not isinstance(value, str):
        return value
    inner = value.strip()
    if inner.startswith("[") and inner.endswith("]") and not set(inner) <= set("[]()+*, 0123456789"):
        return [read_value(word) for word in inner[1:-1].split()]
    return read_value(inner)


def of_bridge(tree: Mapping[str, Any]) -> dict[str, Any]:
    """All sections as one mapping. A function is given by its name (`_target_`)."""
    found: dict[str, Any] = {}
    for section in SECTIONS:
        entries = tree.get(section)
        for name, value in entries.items() if isinstance(entries, Mapping) else ():
            if isinstance(value, Mapping):
                value = value.get("_target_")
            if name not in ("_target_", "params_dtype") and value is not None:
                found[str(name)] = value
    model = tree["model"]
    found["swiglu"] = bool(model.get("gated_linear_unit")) and "silu" in str(found.get("activation_func", ""))
    if "bf16" in str(tree.get("mixed_precision")):
        found.setdefault("bf16", True)
    return found


def pair_flags(words: list[str]) -> dict[str, Any]:
    """Flags with their values: one, several as a list, or true if none follows."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2 and not word[2].isdigit():
            name, has_value, value = word.partition("=")
            found[name] = read_value(value) if has_value else True
        elif name and not re.fullmatch(r"\||&&?|>>?.*|2>&1|\d?>.*|tee|;", word):
            before = found[name]
            value = read_value(word)
            found[name] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
        else:
            name = ""
    return found


def read_value(text: str) -> Any:
    """A number, a truth or a text."""
    if text in WORDS:
        return WORDS[text]
    if NUMBER.fullmatch(text):
        return float(text) if set(text) & set(".eE") else int(text)
    if text.startswith("[") and text.endswith("]") and "'" in text:
        return [read_value(part.strip().strip("'\"")) for part in text[1:-1].split(",")]
    return text
