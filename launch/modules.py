"""Models and layers as torch modules, built from a dict, a file or options: `amfm.build` and `amfm.layers.build`.

They have the initial values of training: a parameter's is a function of the seed and its name, and a layer's are those of the
first block of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.kernels.runtime.backend import resolve_backend
from amfm.model.build import build_mixer
from amfm.model.config.checks import check_model
from amfm.model.config.kinds import kind_of, list_kinds
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.init import initialize_parameters, named_seed
from amfm.model.mixers.interface import Mixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.file import read_schema
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.weights import DESCRIPTION, Weights, read_weights
from amfm.pretrain.micro_batch import MicroBatch


def read_model_config(given: Mapping[str, Any] | str | Path | ModelConfig) -> ModelConfig:
    """Read the settings of a model: its section `model`, as a dict, or a dict or YAML file that has that section.

    Raises ConfigError with every problem, FileNotFoundError for a file that is not there.
    """
    if isinstance(given, ModelConfig):
        check_model(given)
        return given
    config = read_schema(given, (), ModelConfig, section="model")[0]
    check_model(config)
    return config


def is_transformers_folder(path: Path) -> bool:
    """Whether a folder is an export, or another model of transformers."""
    return (path / "config.json").is_file() and not (path / DESCRIPTION).is_file()


def read_model(path: Path) -> Weights:
    """Read the weights of a run, a checkpoint, an import, or a transformers folder of a class that we export to."""
    if not is_transformers_folder(path):
        return read_weights(path)
    from amfm.pretrain.export.import_huggingface import read_huggingface

    return read_huggingface(path)[0]


def build(
    config: Mapping[str, Any] | str | Path | ModelConfig,
    seed: int = 0,
    *,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> HybridModel:
    """Build a model with initial values, on one rank, in float32: `model(tokens_BT, labels=labels_BT)`.

    config: the section `model` of a configuration as a dict, a dict or YAML file that has it, or a ModelConfig. backend: of
    the kernels. Raises ConfigError for settings that break a rule, with every problem; ValueError for a backend that the
    device does not have.
    """
    return HybridModel(read_model_config(config), single_rank_groups(), backend=backend, seed=seed, device=device)


def batches(config: RunConfig, device: torch.device | str = "cpu") -> Iterator[MicroBatch]:
    """Yield the micro-batches of a run on one rank, in its order and without end: `tokens_BT`, `labels_BT` and `meta`.

    As `amfm train` would read them in its first stage. Raises ValueError for a store that is not there, or does not fit.
    """
    train = config.train
    with closing(
        PretrainLoader(
            config.data,
            sequence_length=train.sequence_length,
            micro_batch_size=train.micro_batch_size,
            seed=train.seed,
        )
    ) as loader:
        while True:
            for batch in loader.take(train.global_batch_size):
                yield MicroBatch.from_batch(batch, 0, 1, config.model.num_depths).to(torch.device(device))


def save_model(model: HybridModel, path: str | Path, tokenizer: str | Path) -> None:
    """Write a model into a new folder that `load_model`, `run.initial_weights` and all verbs read, whole or not at all.

    tokenizer: a token store, a SentencePiece .model or a tokenizer.json. Raises ValueError for a folder that is in use, or
    what is not a tokenizer.
    """
    from amfm.pretrain.export.import_huggingface import write_model

    out = Path(path)
    check_free(out)
    state = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    write_model(out, Weights(model.config, state, load_tokenizer(tokenizer), "a model trained from Python"))


class Layer(nn.Module):
    """A mixer on its own, without a norm or a residual: x [B, T, D] -> y [B, T, D]. `mixer` has all that a block's has."""

    mixer: Mixer

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTD: Tensor, meta: PackMeta | None = None) -> Tensor:
        """Mix rows of one document, or of those that `meta` lays out (`PackMeta.from_document_ids`)."""
        if meta is None:
            meta = PackMeta.one_document_a_row(*x_BTD.shape[:2], device=x_BTD.device)
        y_BTD: Tensor = self.mixer(x_BTD, meta, None).y_BTD
        return y_BTD


def build_layer(
    kind: str,
    hidden_size: int,
    /,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    backend: str = "auto",
    mixers: Mapping[str, Any] | None = None,
    **options: Any,
) -> Layer:
    """Build the mixer of one block with initial values: `build("gated_deltanet", 256, num_heads=4, head_dim=64)`.

    kind: a name of docs/mixers.md, a letter of the pattern, or what a package registers. options: the settings of its section. mixers: the section
    `model.mixers` for one that wraps another.
    Raises ConfigError for options that it does not have, ValueError for a kind that there is not.
    """
    try:
        found = kind_of(kind)
    except ValueError as error:
        raise ConfigError([Problem("kind", f"there is no kind {kind!r}", f"use one of {list_kinds()}")]) from error
    own, others = {found.name: options}, dict(mixers or {})
    sections = own | {"mixers": others} if found.is_core else {"mixers": others | own}
    config = read_model_config({"pattern": found.symbol, "vocab_size": 1, "hidden_size": hidden_size, **sections})
    target = torch.device(device if device is not None else "cpu")
    groups = single_rank_groups()
    holder = nn.Module()  # names the layer as the first block of a model, which its initial values follow from
    with target:
        layer = Layer(build_mixer(0, config, groups, resolve_backend(backend, target)))
        holder.add_module("blocks", nn.ModuleDict({"0": layer}))
        layer.mixer.set_draw_seed(named_seed(seed, "blocks.0.mixer.draws"))
        layer.mixer.reset_buffers()
        initialize_parameters(holder, config, groups, seed)
    return layer
