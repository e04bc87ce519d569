"""Whole models as tensors by name: read from a checkpoint, a run or an import; kept without optimizer state.

A weights folder is what `amfm import` writes: `weights.safetensors` (our names, float32), `weights.json` (the model's
configuration, where it came from, digests) and the tokenizer's file. `run.initial_weights` starts a run from one.

Weights from any source become one `Weights` object, so generation, evaluation, export and a run's start need no second
path for imports. All are float32 on the CPU: bf16 copies would lose what the optimizer's master weights know. Tensors are read
when they are asked for (model/on_demand.py): whoever needs a part of a model, or one tensor after the other, never holds
the whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from amfm.data_pipeline.durable.json_files import inside, read_object, take
from amfm.data_pipeline.samples.samples import NO_TOKENIZER
from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.id_vocabulary import require_text
from amfm.data_pipeline.tokenizer.tokenizer import (
    KEPT_FOLDER,
    Tokenizer,
    load_tokenizer,
    read_kept_tokenizer,
    read_tokenizer_file,
)
from amfm.kernels.runtime.backend import resolve_backend, resolve_for_run
from amfm.model.config.checks import check_model
from amfm.model.config.schema import ModelConfig, read_saved_model
from amfm.model.hybrid import HybridModel
from amfm.model.lora import merge_lora
from amfm.model.on_demand import OnDemand, on_demand
from amfm.model.parallel.groups import ProcessGroupCollection, single_rank_groups
from amfm.model.shapes import weight_shapes
from amfm.pretrain.checkpoint.inspect import find_checkpoint, read_full_state
from amfm.pretrain.checkpoint.manifest_file import CHECKPOINT_NAME, MANIFEST_NAME, list_checkpoints, read_manifest
from amfm.pretrain.checks.blocks import refuse_native_model
from amfm.pretrain.config.convert import ConvertConfig
from amfm.pretrain.config.saved import read_saved_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.merge import multiply_out
from amfm.pretrain.inference.own_part import DEPTH_PREFIX, take_own_part
from amfm.pretrain.inference.released import FILE as RELEASED
from amfm.pretrain.inference.released import Released, find_released
from amfm.pretrain.stages import last_stage, resolve_stages
from amfm.pretrain.tensor_files import TensorFile, TensorWriter

WEIGHTS_FORMAT = "amfm-weights"
WEIGHTS_VERSION = 1
DESCRIPTION = "weights.json"
TENSORS = "weights.safetensors"


@dataclass(frozen=True)
class Weights:
    """A model outside of training: its configuration, every weight and buffer in float32 on the CPU, its tokenizer.

    `state` reads from files where it came from files: those must stay as they are while it is used.
    `given_tokenizer` is None for a model that was trained on a synthetic task, and has no text for one that was trained on ids.
    `run` is the configuration of the run that made it, after this many steps and tokens, None for an import, with its newest
    validation loss; `origin` says where it came from. `released`: of the released model that it is, or continues.
    """

    model: ModelConfig
    state: Mapping[str, Tensor]
    given_tokenizer: Tokenizer | None
    origin: str
    run: RunConfig | None = None
    step: int | None = None
    tokens: int | None = None
    validation_loss: float | None = None
    released: Released | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the text; raises ValueError for a model that was trained on a synthetic task, or on ids without one."""
        found: Tokenizer = require_text(self.vocabulary, self.origin)
        return found

    @property
    def vocabulary(self) -> Tokenizer:
        """Its tokenizer, or only the vocabulary of a model of ids; raises ValueError for one of a synthetic task."""
        if self.given_tokenizer is None:
            raise ValueError(
                f"{self.origin} was trained on a synthetic task and knows no text; give a model of text, or measure this one "
                "with `amfm evaluate --synthetic`"
            )
        return self.given_tokenizer

    def tokenizer_identity(self) -> str:
        """Digest of its tokenizer; the identity of synthetic tasks if there is none."""
        return NO_TOKENIZER if self.given_tokenizer is None else self.given_tokenizer.identity()

    def trained_length(self) -> int | None:
        """Tokens per sequence in the last step of the training; None for an import."""
        if self.run is None or self.step is None:
            return None
        return last_stage(resolve_stages(self.run), self.step).train.sequence_length

    def without_depths(self) -> Weights:
        """The same model without its MTP layers."""
        state = on_demand(self.state).without(lambda name: name.startswith(DEPTH_PREFIX))
        return replace(self, model=self.model.without_depths(), state=state)

    def num_parameters(self) -> int:
        """Count the numbers of all tensors; reads none."""
        state = on_demand(self.state)
        return sum(math.prod(state.shape(name)) for name in state)

    def build(
        self,
        *,
        backend: str = "torch",
        device: torch.device | str = "cpu",
        groups: ProcessGroupCollection | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> HybridModel:
        """Build what a rank of `groups` holds of the model, without them all of it, in eval mode, with a copy of the weights.

        No more of the weights is read. They are rounded to `dtype`; buffers, such as routers' balancing bias, stay float32.
        """
        if torch.device(device).type == "cpu":
            backend = resolve_for_run(backend, torch.device(device), dtype, unfit=refuse_native_model(self.model))
        chosen = resolve_backend(backend, torch.device(device))
        model = HybridModel(self.model, groups or single_rank_groups(), backend=chosen, device="meta")
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.to_empty(device=device)
        model.reset_buffers()
        own, state = model.state_dict().keys(), on_demand(self.state)
        if own != state.keys():
            raise RuntimeError(f"{self.origin}: weights differ from the model's: {sorted(own ^ state.keys())[:6]}")
        take_own_part(model, state)
        return model.eval()


def read_weights(path: str | Path, report: Report = silent, *, averaged: bool = False) -> Weights:
    """Read the weights of a checkpoint folder, of the newest sound checkpoint of a run, or of a weights folder.

    averaged: the moving averages that the run keeps (section `ema`). Every byte is verified. Raises ValueError when the path is none of these, or has no averages, RuntimeError for damaged files or a
    tokenizer that is not the one of the training.
    """
    folder = Path(path)
    if (folder / DESCRIPTION).is_file():
        if averaged:
            raise ValueError(f"{folder} is a weights folder, which has no averages next to its weights; give the run")
        report(f"reading {folder}")
        return _read_weights_folder(folder)
    is_store = (folder / "parts").is_dir()  # its manifest has the same name
    is_checkpoint = ((folder / MANIFEST_NAME).is_file() and not is_store) or CHECKPOINT_NAME.fullmatch(folder.name)
    if is_checkpoint or list_checkpoints(folder) or list_checkpoints(folder / "checkpoints"):
        return _read_checkpoint(find_checkpoint(folder, report), report, averaged=averaged)
    if (folder / "config.json").is_file():
        raise ValueError(f"{folder} is a transformers model; run `amfm import {folder} OUT` and give OUT")
    raise ValueError(
        f"{folder} is not a checkpoint, run directory or imported model; give RUN_DIR, RUN_DIR/checkpoints/step-N or the "
        "folder that `amfm import` wrote"
    )


def _read_checkpoint(folder: Path, report: Report, *, averaged: bool = False) -> Weights:
    """Read the weights of a checkpoint, with the tokenizer of its run's store and the positions of its last stage."""
    manifest = read_manifest(folder)
    run = read_saved_config(manifest)
    state = read_full_state(folder, report, averaged=averaged)
    if run.convert is not None:
        state = merge_stage(state, run.convert, folder)
    tokenizer = _read_tokenizer(folder, run, manifest["identities"].get("tokenizer"))
    step = int(manifest["step"])
    stages = resolve_stages(run)
    model = last_stage(stages, step).config.model
    if model.self_guided_training is not None:
        alpha = model.self_guided_training.alpha(step, stages[-1].last_step)
        model, state = merge_guides(model, state, alpha)
    progress = manifest["state"]["progress"]
    origin, loss = f"{folder} (step {step}{', averaged' if averaged else ''})", progress.get("validation_loss")
    released = find_released(folder) if run.run.initial_weights is not None or run.convert is not None else None
    return Weights(model, state, tokenizer, origin, run, step, int(progress["tokens"]), loss, released)


def _read_tokenizer(checkpoint: Path, run: RunConfig, expected: str | None) -> Tokenizer | None:
    """The tokenizer that a run keeps, or that of its store for a run of before; None for a synthetic task."""
    if run.data.synthetic is not None:
        return None
    place: Path | str = checkpoint.absolute().parent.parent / KEPT_FOLDER
    tokenizer = read_kept_tokenizer(Path(place))
    if tokenizer is None:
        place = run.data.text_store()
        try:
            tokenizer = load_tokenizer(place)
        except ValueError as error:
            raise ValueError(f"{checkpoint} has no tokenizer in its run directory, and {error}") from error
    if expected is not None and tokenizer.identity() != expected:
        raise RuntimeError(
            f"{place} holds tokenizer {tokenizer.identity()}, but {checkpoint} was trained with {expected}; restore it"
        )
    return tokenizer


def merge_guides(model: ModelConfig, state: OnDemand, alpha: float) -> tuple[ModelConfig, OnDemand]:
    """The same function without guides: dense matrices while their weight `alpha` is above 0, then only the factors."""
    model = model.model_copy(update={"self_guided_training": None})
    if alpha == 0:
        return model, state.without(lambda name: name.endswith(".guide_weight"))
    return multiply_out(model, state, alpha)


def merge_stage(state: OnDemand, convert: ConvertConfig, folder: Path) -> OnDemand:
    """Merge the low-rank updates of a conversion's stage into its weights.

    Raises ValueError for the control without a linear branch, which no configuration of a model describes.
    """
    if convert.stage == "tune-window":
        raise ValueError(
            f"{folder} is a control of a conversion, trained with the linear branch left out; only the conversion's own "
            "report measures it: give convert-tune or result instead"
        )
    # Updates that a router chooses among are not matrix: they stay, and the model has a section for them.
    tune = convert.tuning()
    return state if tune.routing else merge_lora(state, tune.alpha / tune.rank)


def write_weights(folder: Path, weights: Weights) -> None:
    """Write a weights folder into an existing empty folder; durability is the caller's."""
    state = on_demand(weights.state)
    writer = TensorWriter(
        folder / TENSORS, {name: (state.sources[name].dtype, state.shape(name)) for name in sorted(state)}
    )
    for name in state:
        for start, rows in state.blocks(name):
            writer.put(name, start, rows)
    writer.finish()
    tokenizer_file = weights.vocabulary.file_name
    (folder / tokenizer_file).write_bytes(weights.vocabulary.to_bytes())
    names = [TENSORS, tokenizer_file]
    if weights.released is not None:
        (folder / RELEASED).write_bytes(weights.released.to_bytes())
        names.append(RELEASED)
    description = {
        "format": WEIGHTS_FORMAT,
        "version": WEIGHTS_VERSION,
        "origin": weights.origin,
        "model": weights.model.model_dump(mode="json"),
        "packages": weights.model.packages_used(),
        "tokenizer": {"file": tokenizer_file, "eos_id": weights.vocabulary.eos_id},
        "sha256": {name: _digest(folder / name) for name in names},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _read_weights_folder(folder: Path) -> Weights:
    """Read a weights folder, verifying the digest of every listed file before it is parsed."""
    file = folder / DESCRIPTION
    description = read_object(file)
    if description.get("format") != WEIGHTS_FORMAT or description.get("version") != WEIGHTS_VERSION:
        raise ValueError(
            f"{file} is format {description.get('format')} {description.get('version')}, this program reads "
            f"{WEIGHTS_FORMAT} {WEIGHTS_VERSION}; import the model again"
        )
    digests = take(description, "sha256", dict, file)
    tokenizer_record = take(description, "tokenizer", dict, file)
    tokenizer_file = inside(folder, tokenizer_record.get("file"))
    for name, expected in digests.items():
        found = _digest(inside(folder, name))
        if found != expected:
            raise RuntimeError(f"{folder / name} has SHA-256 {found}, written was {expected}; import the model again")
    if not {TENSORS, tokenizer_record["file"]} <= digests.keys():
        raise RuntimeError(f"{file} does not list its files with their SHA-256; import the model again")
    try:
        saved = read_saved_model(description.get("model"), description.get("packages", {}))
        model = ModelConfig.model_validate(saved)
    except ValidationError as error:
        raise ValueError(f"{file} holds a model that this version does not know: {error}") from error
    try:
        check_model(model)
    except ValueError as error:
        raise ValueError(f"{file} holds a model that cannot be built: {error}; import the model again") from error
    state = TensorFile(folder / TENSORS).on_demand()
    check_shapes(model, state, str(folder))
    tokenizer = read_tokenizer_file(tokenizer_file, take(tokenizer_record, "eos_id", int, file))
    released = find_released(folder) if RELEASED in digests else None
    return Weights(model, state, tokenizer, take(description, "origin", str, file), released=released)


def check_shapes(model: ModelConfig, state: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError naming tensors that are missing, surplus or of another shape than the configuration says.

    The message lists at most eight of them.
    """
    expected, shapes = weight_shapes(model), on_demand(state)
    faults = [f"{name} is missing" for name in expected.keys() - state.keys()]
    faults += [f"{name} does not belong" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        if shapes.shape(name) != expected[name]:
            faults.append(f"{name} is {shapes.shape(name)}, the configuration states {expected[name]}")
    if faults:
        raise ValueError(f"weights in {where} do not fit their configuration: " + "; ".join(sorted(faults)[:8]))


def load_initial_weights(model: HybridModel, path: str | Path, tokenizer_identity: str) -> list[str]:
    """Put weights into a freshly built model, before the engine takes it; returns what someone should know of it.

    MTP layers may be other ones, or be in only one of the two: the model's then begin at random. The function that the weights compute must be the run's, and so must the tokenizer: ValueError names what differs.
    Every rank must call this: each reads the folder and keeps its part; nothing is communicated.
    """
    weights, wanted = read_weights(path), model.config
    remarks, state = [], on_demand(weights.state)
    if wanted.lora_mixer is not None and weights.model.lora_mixer is None:
        remarks.append(f"{weights.origin} has no routed updates: they begin as nothing")
        wanted = wanted.model_copy(update={"lora_mixer": None})
    if wanted.stream is not None and weights.model.stream is None:
        remarks.append(f"{weights.origin} has the sum of all outputs as its residual stream: ours begins as that sum")
        wanted = wanted.plain_stream()
    require_same_function(weights, wanted, tokenizer_identity, f"run.initial_weights={path}")
    mine, theirs = depth_shapes(model.config), depth_shapes(weights.model)
    if mine != theirs:
        depths = [f"/{''.join(config.parsed_pattern.depth_letters)}" for config in (weights.model, model.config)]
        if theirs:
            remarks.append(f"{weights.origin}: its MTP layers {depths[0]} are ignored")
        if mine:
            remarks.append(f"{weights.origin} has no MTP layers {depths[1]} as here: they begin at random")
        state = state.without(lambda name: name.startswith(DEPTH_PREFIX))
    take_own_part(model, state)
    return remarks


def require_same_function(weights: Weights, model: ModelConfig, tokenizer_identity: str, what: str) -> None:
    """Reject weights of another model or tokenizer: ValueError begins with `what` they are and names what differs."""
    given_identity = weights.tokenizer_identity()
    if given_identity != tokenizer_identity and NO_TOKENIZER in (given_identity, tokenizer_identity):
        raise ValueError(
            f"{what} was trained on {'a synthetic task' if given_identity == NO_TOKENIZER else 'text'}, and "
            f"this run is on {'a synthetic task' if tokenizer_identity == NO_TOKENIZER else 'text'}; tokens mean other things there"
        )
    if given_identity != tokenizer_identity:
        # A run leaves its tokenizer in its store.
        folder = what.partition("=")[2] if weights.run is None else weights.run.data.text_store()
        raise ValueError(
            f"{what} was trained with tokenizer {given_identity}, data.store was "
            f"prepared with {tokenizer_identity}; prepare the data with data.tokenizer.model={folder}/"
            f"{weights.vocabulary.file_name}"
        )
    ours, given = function_settings(model), function_settings(weights.model)
    differing = [
        f"{name}: {given.get(name)} there, {ours.get(name)} here"
        for name in ours | given
        if ours.get(name) != given.get(name)
    ]
    if differing:
        raise ValueError(f"{what} holds another model: " + "; ".join(differing))


def depth_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List names and shapes of the weights of multi-token prediction."""
    return {name: shape for name, shape in weight_shapes(config).items() if name.startswith(DEPTH_PREFIX)}


def function_settings(config: ModelConfig) -> dict[str, object]:
    """Collect the dotted settings that change what a model computes, of the sections that its blocks read.

    That includes mixers wrapped by a mixture of memories. Initial values, loss weights and chunk sizes are left out: two
    models that differ only in those compute the same function; so do those that differ in MTP layers.
    """
    config = config.without_depths()
    letters = config.letters
    settings: dict[str, object] = {"pattern": "".join(letters)}
    for name in ("vocab_size", "hidden_size", "norm", "norm_epsilon", "norm_placement", "tie_embeddings"):
        settings[name] = getattr(config, name)
    if config.stream is not None:
        settings[f"{config.stream_name}"] = config.stream.model_dump()
    settings |= {f"multipliers.{name}": value for name, value in config.multipliers}
    for kind, options in config.kinds_in_use():
        written = options.model_dump(exclude=set(options.training_only))
        settings |= {f"{kind.section}.{name}": value for name, value in written.items()}
    if config.lora_mixer is not None:
        routed = config.lora_mixer.model_dump(exclude={"balance_weight", "hard_from_step"})
        settings |= {f"lora_mixer.{name}": value for name, value in routed.items()}
    return settings


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
