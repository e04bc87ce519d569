"""From a transformers folder to weights that training, generation, evaluation and export accept.

config.json becomes our model configuration, tensors are renamed and reshaped by the same weight map that exports them
(model/huggingface/classes.py), read backwards, some rows at a time. transformers fills in the defaults of config.json, because they belong to
its class and may be left out of the file; no model code of the folder is run, and nothing is fetched. Every name and
number in the folder is someone else's: paths stay inside the folder, and shapes are compared before anything is
written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from amfm.data_pipeline.durable.files import check_free, named
from amfm.data_pipeline.durable.json_files import inside, read_object, take, understood
from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.id_vocabulary import IdVocabulary
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer, read_tokenizer_file
from amfm.model.config.checks import check_model
from amfm.model.config.schema import ModelConfig, read_saved_model
from amfm.model.huggingface.classes import (
    BY_NAME,
    BY_TYPE,
    TokenIds,
    explain_unfit,
    huggingface_config,
    model_config_from_huggingface,
)
from amfm.model.huggingface.hf_class import HfTarget, Source, Target
from amfm.model.huggingface.own import OWN_MODEL_TYPE
from amfm.model.on_demand import OnDemand
from amfm.model.on_demand import Source as OnDemandSource
from amfm.pretrain.export.files import begin_export, put_in_place, sync_files
from amfm.pretrain.export.quantized import read_quantized
from amfm.pretrain.export.tokenizer import MODEL_FILE, ORIGINAL_JSON, OUR_DESCRIPTION
from amfm.pretrain.inference.own_part import DEPTH_PREFIX
from amfm.pretrain.inference.released import read_released
from amfm.pretrain.inference.weights import Weights, check_shapes, write_weights
from amfm.pretrain.tensor_files import TensorFile

READ_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODEL_SECTION = "model.yaml"
INDEX = "model.safetensors.index.json"
# Multi-token prediction: left out where config.json does not name it, as transformers does always.
SKIPPED_PREFIXES = (DEPTH_PREFIX,)
# Rotary frequencies that older Llama checkpoints hold: they follow from config.json.
SKIPPED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class ImportReport:
    """What was read: the class it was written for, our configuration, tensors read, and names left out with why.

    kept, dropped: of what the model had next to its weights, in words.
    """

    path: Path
    target: Source
    model: ModelConfig
    num_tensors: int
    num_parameters: int
    skipped: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]


def import_huggingface(hf_dir: str | Path, out_dir: str | Path, report: Report = silent) -> ImportReport:
    """Read a folder of a class that we read and write a weights folder; the import of an export is bitwise equal.

    A run starts from it with `run.initial_weights: OUT` and `extends: OUT/model.yaml`. Raises ValueError for another class, a choice that our model
    does not have, tensors that do not fit, a missing tokenizer or an OUT that is in use.
    """
    source, out = Path(hf_dir), Path(out_dir)
    check_free(out)
    weights, target, num_tensors, skipped = read_huggingface(source, report)
    report("writing tensors")
    write_model(out, weights)
    released = weights.released
    assert released is not None, "read_huggingface reads it"
    kept, dropped = tuple(released.describe()), released.dropped
    return ImportReport(out, target, weights.model, num_tensors, weights.num_parameters(), skipped, kept, dropped)


def write_model(out: Path, weights: Weights) -> None:
    """Write a weights folder with the model section for runs that continue from it, durable and whole or not at all."""
    with begin_export(out) as temporary:
        write_weights(temporary, weights)
        with named(temporary / MODEL_SECTION):
            (temporary / MODEL_SECTION).write_text(describe_model(weights.model), encoding="utf-8")
        sync_files(temporary)
        put_in_place(temporary, out)


def read_huggingface(source: Path, report: Report = silent) -> tuple[Weights, Source, int, tuple[str, ...]]:
    """Read a folder of a class that we read: weights, the class, how many tensors it had, and the names left out.

    Raises ValueError for another class, a choice that our model does not have, tensors that do not fit, and a missing
    tokenizer.
    """
    fields = read_config_json(source)
    found = BY_TYPE.get(str(fields.get("model_type")))
    if found is None:
        known = ", ".join(BY_TYPE)
        raise ValueError(f"{source}/config.json has model_type={fields.get('model_type')}; known are {known}")
    config = choose_config(source, fields)
    tokenizer = read_tokenizer(source, fields)
    report(f"reading {source}")
    tensors = read_quantized(read_tensors(source), fields.get("quantization_config"), source)
    config, skipped = choose_depths(config, tensors, found.name)
    skipped += tuple(name for name in tensors if name.endswith(SKIPPED_SUFFIXES))
    sound = only_sound(tensors.without(set(skipped).__contains__), source)
    state = found.weights(config).to_ours(sound)
    check_shapes(config, state, str(source))
    num_tensors = len(tensors.keys() - set(skipped))
    released = read_released(source, fields)
    released = replace(released, dropped=released.dropped + describe_balance(fields, config))
    weights = Weights(config, state, tokenizer, f"imported from {source}", released=released)
    return weights, found.name, num_tensors, skipped


def describe_balance(fields: Mapping[str, Any], model: ModelConfig) -> tuple[str, ...]:
    """The loss by which transformers would balance the experts, in words, if the model has none: it is not taken over.

    transformers counts the tokens of all blocks together, k E sum over experts of (mean share of choices) x (mean share of
    scores), so that blocks may be uneven in opposite ways. Here each block has E times that sum. Only with one block the
    two are one; with even loads they are k and the number of blocks.
    """
    coefficient, blocks = fields.get("router_aux_loss_coef"), len(model.routed_experts())
    sections = model.expert_sections()
    if not blocks or not sections or not isinstance(coefficient, int | float) or not coefficient:
        return ()
    key, moe = sections[0]
    if moe.auxiliary_loss_weight:  # of an export of ours, whose description names it
        return ()
    weight = coefficient * moe.top_k / blocks
    return (
        f"router_aux_loss_coef={coefficient:g} of config.json: transformers balances all blocks together, amfm each one; "
        f"{key}.auxiliary_loss_weight={weight:.4g} is as large where loads are even",
    )


def choose_depths(config: ModelConfig, tensors: Collection[str], target: Source) -> tuple[ModelConfig, tuple[str, ...]]:
    """Take MTP layers that both config.json and the tensors' names have; returns the model and what is left out.

    transformers neither loads nor saves such tensors, so a folder that it wrote may name depths without any.
    """
    found = tuple(
        name for name in tensors if name.startswith(SKIPPED_PREFIXES) or BY_NAME[target].is_skipped(name, config)
    )
    if config.num_depths and not found:
        return config.without_depths(), ("mtp.*, which config.json names and no file has",)
    return config, () if config.num_depths else found


def only_sound(tensors: OnDemand, source: Path) -> OnDemand:
    """Wrap the tensors so that reading one with NaN or infinity raises ValueError.

    Raises ValueError for a dtype that is not read: integers and numbers of 8 bits need scales that no rule here knows.
    """
    for name, found in tensors.sources.items():
        if found.dtype not in READ_DTYPES:
            raise ValueError(
                f"{source}: {name} is {str(found.dtype).removeprefix('torch.')}; weights are read in float32, bfloat16, float16 or "
                "float64: use the release in bf16"
            )

    def checked(name: str, found: OnDemandSource) -> OnDemandSource:
        def read(start: int, stop: int) -> Tensor:
            rows = found.read(start, stop)
            # In float32, which they become: float64 holds numbers beyond it.
            if not torch.isfinite(rows.float()).all():
                raise ValueError(f"{source}: {name} holds NaN or infinity in float32; download the file again")
            return rows

        return replace(found, read=read)

    return OnDemand({name: checked(name, found) for name, found in tensors.sources.items()})


def describe_model(config: ModelConfig) -> str:
    """The `model` section of a run that continues these weights, for its `extends`."""
    head = "# The model of these weights. A run that continues them has `extends: model.yaml` with the path to this file.\n"
    return head + yaml.safe_dump({"model": config.model_dump(mode="json")}, sort_keys=False, width=120)


def read_config_json(source: Path) -> dict[str, Any]:
    """Read config.json with the defaults of its transformers class filled in; as it is for our own class and unknown ones.

    Raises ValueError when the file is missing, or has a field that its class rejects.
    """
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a folder that transformers wrote")
    raw = read_object(path)
    if str(raw.get("model_type")) not in set(BY_TYPE) - {OWN_MODEL_TYPE}:
        return raw
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        with understood(path):
            complete: dict[str, Any] = AutoConfig.from_pretrained(source, local_files_only=True).to_dict()
    except StrictDataclassError as error:
        raise ValueError(f"{path} has a field that its class does not accept: {error}") from error
    return complete


def read_tokenizer(source: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """Read the tokenizer that training used where an export kept it, else tokenizer.json; the end id is config.json's.

    Of several end ids the first counts. Raises ValueError when the folder has no tokenizer.
    """
    for name in (MODEL_FILE, ORIGINAL_JSON, "tokenizer.json", IdVocabulary.file_name):
        if (source / name).is_file():
            eos_id = fields.get("eos_token_id")
            return read_tokenizer_file(source / name, next(iter(eos_id), None) if isinstance(eos_id, list) else eos_id)
    raise ValueError(f"{source} has no tokenizer; put tokenizer.model or tokenizer.json of this checkpoint there")


def choose_config(source: Path, fields: Mapping[str, Any]) -> ModelConfig:
    """Choose the model's configuration: our own description where it still agrees with config.json, else only config.json.

    The description also knows what config.json has no field for, such as tied embeddings in nemotron_h.
    """
    try:
        with understood(source / "config.json"):
            config = model_config_from_huggingface(fields)
        path = source / OUR_DESCRIPTION
        written = BY_TYPE.get(str(fields.get("model_type")))
        if path.is_file() and isinstance(written, HfTarget):
            described = ModelConfig.model_validate(read_saved_model(read_object(path).get("model"), {}))
            if _same_config_json(described, config, written.name):
                config = described
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"{source}: {name}={first.get('input')} cannot be imported: {first['msg']}") from error
    check_model(config)
    return config


def _same_config_json(described: ModelConfig, read: ModelConfig, target: Target) -> bool:
    """Whether two configurations of ours give the same config.json, special ids and sequence length aside."""
    if any(explain_unfit(config, target) for config in (described, read)):
        return False
    # Equal when both would write the same config.json: what it has no field for is then the description's to say.
    none = TokenIds(None, None, None)
    left, right = (huggingface_config(c, target, none, max_position_embeddings=1) for c in (described, read))
    return left == right


def read_tensors(source: Path) -> OnDemand:
    """Open the safetensors files: all tensors by name, each read when it is asked for.

    Raises ValueError when a file of the index is missing, damaged or is outside of the folder.
    """
    index = source / INDEX
    if index.is_file():
        files = sorted({str(name) for name in take(read_object(index), "weight_map", dict, index).values()})
    else:
        files = ["model.safetensors"]
    tensors = OnDemand({})
    for name in files:
        path = inside(source, name)
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy the whole folder")
        tensors.sources |= TensorFile(path).on_demand().sources
    return tensors
