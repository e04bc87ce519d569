"""`amfm import` of a training state: what a folder is, and what it becomes.

A state with AdamW's moments becomes a run directory whose checkpoint a run continues from; one without becomes a
weights folder, as the import of a transformers model does (`run.initial_weights`).
"""

from __future__ import annotations

from pathlib import Path

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.progress import Report, silent
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.model.on_demand import OnDemand
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.moments import FROZEN
from amfm.pretrain.exchange.adopt import Expected, adopt, check_adoptable
from amfm.pretrain.exchange.dcp import DcpStates
from amfm.pretrain.exchange.megatron import MegatronFolder, is_megatron
from amfm.pretrain.exchange.state import TrainingState, WrittenRun, write_run
from amfm.pretrain.exchange.universal import UniversalFolder, is_universal
from amfm.pretrain.export.import_huggingface import only_sound, write_model
from amfm.pretrain.inference.weights import Weights


def import_state(
    source: Path, out: Path, config: RunConfig | None = None, *, step: int | None = None, report: Report = silent
) -> WrittenRun | Weights:
    """Read a training state and write OUT: a run directory, or a weights folder where there are no moments.

    `config`: of the run that continues, for a state without our record; `step`: what it counts the state as. Raises
    ValueError where the state is not whole, does not fit, or needs a configuration: then nothing is written.
    """
    check_free(out)
    report(f"reading {source}")
    read = _read(source, config, step)
    if isinstance(read, Weights):
        write_model(out, read)
        return read
    return write_run(out, read, report)


def _read(source: Path, config: RunConfig | None, step: int | None) -> TrainingState | Weights:
    """Read a folder: with our record alone, without it by a configuration."""
    if is_megatron(source):
        config = require_config(source, config)
        return _adopt(MegatronFolder(source, config.model), source, config, step)
    folder = UniversalFolder(source) if is_universal(source) else DcpStates(source)
    if not folder.has_record():
        config = require_config(source, config)
        if isinstance(folder, UniversalFolder):
            folder.name_parameters(config.model)
        return _adopt(folder, source, config, step)
    refuse_config(source, config, step)
    return folder.read()


def _adopt(
    folder: MegatronFolder | UniversalFolder | DcpStates, source: Path, config: RunConfig, step: int | None
) -> TrainingState | Weights:
    """Make a run's state of what a folder has, or weights where it has no moments."""
    has_moments = folder.has_moments()
    if has_moments:
        check_adoptable(config)
    expected = Expected(config)
    labels = expected.labels if has_moments else dict.fromkeys(expected.labels, FROZEN)
    tensors, buffers = folder.fit(expected.shapes, labels, expected.buffers)
    if not has_moments:
        # With the tokenizer of the run's store.
        tokenizer = load_tokenizer(config.data.text_store())
        sound = only_sound(OnDemand({**tensors["weight"], **buffers}), source)
        return Weights(config.model, sound, tokenizer, f"imported from {source}")
    return adopt(config, str(folder.path), tensors, buffers, folder.step(expected.shapes), step=step)


def require_config(source: Path, config: RunConfig | None) -> RunConfig:
    """Return the configuration. Raises ValueError where none was given."""
    if config is None:
        raise ValueError(
            f"{source} has no record of an amfm run; name the configuration of the run that continues with --config: its "
            "model section describes these weights, and its data must be prepared"
        )
    return config


def refuse_config(source: Path, config: RunConfig | None, step: int | None) -> None:
    """Raise ValueError for a configuration or step that would have no effect."""
    if config is not None or step is not None:
        raise ValueError(
            f"{source} has the record of an amfm run, whose configuration and step it continues with; leave out --config and "
            "--step"
        )
