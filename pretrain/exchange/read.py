"""`amfm import` of a training state: what a folder is, and what it becomes.

A state with AdamW's moments becomes a run directory whose checkpoint a run goes on from; one without becomes a weights
folder, as the import of a transformers model does (`run.initial_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from amfm.data_pipeline.progress import Report, silent
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.model.on_demand import OnDemand, Source
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.moments import FROZEN
from amfm.pretrain.exchange.adopt import Expected, adopt, check_adoptable
from amfm.pretrain.exchange.dcp import RECORD, fit_dcp, read_dcp, read_step
from amfm.pretrain.exchange.dcp_folder import DcpFolder
from amfm.pretrain.exchange.fit import BUFFER, fit_tensors
from amfm.pretrain.exchange.megatron import MegatronFolder, is_megatron
from amfm.pretrain.exchange.state import TrainingState, WrittenRun, write_run
from amfm.pretrain.exchange.universal import UniversalFolder, is_universal
from amfm.pretrain.export.export import check_free
from amfm.pretrain.export.import_huggingface import write_model
from amfm.pretrain.inference.weights import Weights


def import_state(
    source: Path, out: Path, config: RunConfig | None = None, *, step: int | None = None, report: Report = silent
) -> WrittenRun | Weights:
    """Read a training state and write OUT: a run directory, or a weights folder where there are no moments.

    `config`: of the run that goes on, for a state without our record; `step`: what it counts the state as. Raises
    ValueError where the state is not whole, does not fit, or needs a configuration: then nothing is written.
    """
    check_free(out)
    report(f"reading {source}")
    reader = _read_megatron if is_megatron(source) else _read_universal if is_universal(source) else _read_dcp
    read = reader(source, config, step)
    if isinstance(read, Weights):
        write_model(out, read)
        return read
    return write_run(out, read, report)


def _read_dcp(source: Path, config: RunConfig | None, step: int | None) -> TrainingState | Weights:
    """Read a folder of torch Distributed Checkpoint: with our record alone, without it by a configuration."""
    folder = DcpFolder(source)
    if RECORD in folder.values:
        refuse_config(source, config, step)
        return read_dcp(folder)
    config = require_config(source, config)
    expected = Expected(config)
    has_moments = any(name.startswith("optimizer.") for name in folder.tensors)
    labels = expected.labels if has_moments else dict.fromkeys(expected.labels, FROZEN)
    tensors, buffers = fit_dcp(folder, expected.shapes, labels, expected.buffers)
    if not has_moments:
        return weights_of(config, source, tensors["weight"], buffers)
    check_adoptable(config)
    return adopt(config, str(source), tensors, buffers, read_step(folder, expected.shapes), step=step)


def _read_universal(source: Path, config: RunConfig | None, step: int | None) -> TrainingState:
    """Read DeepSpeed's universal checkpoint: with our record alone, without it by a configuration."""
    folder = UniversalFolder(source)
    if folder.has_record():
        refuse_config(source, config, step)
        return folder.read()
    config = require_config(source, config)
    check_adoptable(config)
    expected = Expected(config)
    tensors, buffers = folder.fit(expected.shapes, expected.labels, expected.buffers)
    return adopt(config, str(source), tensors, buffers, folder.step(expected.shapes), step=step)


def _read_megatron(source: Path, config: RunConfig | None, step: int | None) -> TrainingState | Weights:
    """Read a distributed checkpoint of Megatron-Core by a configuration."""
    config = require_config(source, config)
    folder, expected = MegatronFolder(source, config.model), Expected(config)
    labels = expected.labels if folder.has_moments() else dict.fromkeys(expected.labels, FROZEN)
    kinds = ("weight", "exp_avg", "exp_avg_sq") if folder.has_moments() else ("weight",)
    tensors, buffers = fit_tensors(
        folder.found(kinds),
        lambda kind, name: f"{'weight' if kind == BUFFER else kind}/{name}",
        str(folder.path),
        shapes=expected.shapes,
        labels=labels,
        buffers=expected.buffers,
    )
    if not folder.has_moments():
        return weights_of(config, source, tensors["weight"], buffers)
    check_adoptable(config)
    return adopt(config, str(folder.path), tensors, buffers, folder.step(), step=step)


def weights_of(
    config: RunConfig, source: Path, weights: Mapping[str, Source], buffers: Mapping[str, Source]
) -> Weights:
    """Weights without an optimizer, with the tokenizer of the run's store."""
    tokenizer = load_tokenizer(config.data.text_store())
    return Weights(config.model, OnDemand({**weights, **buffers}), tokenizer, f"imported from {source}")


def require_config(source: Path, config: RunConfig | None) -> RunConfig:
    """Return the configuration. Raises ValueError where none was given."""
    if config is None:
        raise ValueError(
            f"{source} has no record of an amfm run; name the configuration of the run that goes on with --config: its "
            "model section describes these weights, and its data must be prepared"
        )
    return config


def refuse_config(source: Path, config: RunConfig | None, step: int | None) -> None:
    """Raise ValueError for a configuration or step that would have no effect."""
    if config is not None or step is not None:
        raise ValueError(
            f"{source} has the record of an amfm run, whose configuration and step it goes on with; leave out --config and "
            "--step"
        )
