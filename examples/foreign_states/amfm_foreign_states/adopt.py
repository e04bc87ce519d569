"""Takes a training state in that another program made: no record of ours is there, so a configuration says what it is of.

The configuration gives the model, the data and the optimizer's settings, and the run continues at its own step
schedule: by default the optimizer's counter, so that bias corrections, rate and position in the text agree. Rows of the
steps before count as read, because another program's order of the text cannot be continued.

`amfm import` of a training state: what a folder is, and what it becomes.

A state with AdamW's moments becomes a run directory whose checkpoint a run continues from; one without becomes a
weights folder, as the import of a transformers model does (`run.initial_weights`).
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.loader.loader import PretrainLoader, SourceUse
from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.model.hybrid import HybridModel
from amfm.model.on_demand import OnDemand, Shape, Source
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checkpoint.compatibility import digest_config
from amfm.pretrain.config.file import without_secrets
from amfm.pretrain.config.saved import packages_used
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.adamw import FROZEN
from amfm.pretrain.engine.optimizer import group_parameters
from amfm.pretrain.export.import_huggingface import only_sound, write_model
from amfm.pretrain.inference.weights import Weights
from amfm.pretrain.packages import collect_versions
from amfm.pretrain.parallel import set_determinism
from amfm.pretrain.run import Progress, identities_of
from amfm.pretrain.stages import data_of_stages, last_stage, resolve_stages
from amfm_foreign_states.dcp import DcpStates
from amfm_foreign_states.megatron.read import MegatronFolder, is_megatron
from amfm_foreign_states.megatron_arguments.compare import check_recorded
from amfm_foreign_states.state import TrainingState, WrittenRun, write_run
from amfm_foreign_states.universal import UniversalFolder, is_universal


def check_adoptable(config: RunConfig) -> None:
    """Raise ValueError for a run whose state no one else has: that of another optimizer than AdamW, muP's groups,
    guides, a conversion's stage.
    """
    refused = {
        f"optimizer.kind={config.optimizer.kind}": config.optimizer.kind != "adamw",
        "optimizer.state_dtype=bf16": config.optimizer.state_dtype == "bf16",
        "model.mup": config.model.mup is not None,
        "model.self_guided_training": config.model.self_guided_training is not None,
        "convert": config.convert is not None,
    }
    found = [name for name, is_set in refused.items() if is_set]
    if found:
        raise ValueError(
            f"{', '.join(found)}: a state of another program holds AdamW's float32 master weights and moments of a plain model; leave it out, "
            "or begin with only the weights (import a checkpoint without an optimizer)"
        )


class Expected:
    """What a state of a configuration's model has: shapes and group labels of parameters, and shapes of buffers."""

    def __init__(self, config: RunConfig) -> None:
        model = HybridModel(config.model, single_rank_groups(), device="meta", draws=False)
        named: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.shapes: dict[str, Shape] = {name: tuple(parameter.shape) for name, parameter in named.items()}
        self.buffers: dict[str, Shape] = {
            name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in named
        }
        self.settings: dict[str, float] = {}
        self.labels: dict[str, str] = {}
        for group in group_parameters(model, config.optimizer.weight_decay):
            self.settings[group["label"]] = group["weight_decay"]
            self.labels |= dict.fromkeys(group["parameter_names"], group["label"])


def adopt(
    config: RunConfig,
    origin: str,
    tensors: Mapping[str, Mapping[str, Source]],
    buffers: Mapping[str, Source],
    optimizer_step: int,
    *,
    step: int | None = None,
) -> TrainingState:
    """Make the state of a run at `step` (None: the optimizer's counter) out of another program's tensors.

    The data must be prepared. Raises ValueError if the run ends before that step.
    """
    config = without_secrets(config)
    steps_done = optimizer_step if step is None else step
    stages = resolve_stages(config)
    if steps_done > stages[-1].last_step:
        raise ValueError(
            f"{origin} has done {optimizer_step} steps, and the run counts it as step {steps_done}, but ends at step "
            f"{stages[-1].last_step}; raise train.steps, or give --step"
        )
    stage = last_stage(stages, steps_done)
    loader = PretrainLoader(
        data_of_stages(config, stages),
        sequence_length=stages[0].train.sequence_length,
        micro_batch_size=stages[0].train.micro_batch_size,
        seed=config.train.seed,
    )
    loader.seek(stage.first_sample + stage.samples_before(steps_done + 1))
    tokens = sum(use.tokens for use in loader.ledger())
    state = {"progress": asdict(Progress(step=steps_done, tokens=tokens)), "loader": loader.state_dict()}
    identities = identities_of(loader)
    warnings = describe_position(loader.ledger(), steps_done, optimizer_step)
    loader.close()
    set_determinism(config.train.seed, config.train.deterministic)
    record = make_record(config, Expected(config), steps_done, optimizer_step)
    whole = {**record, "state": state, "identities": identities}
    return TrainingState(origin, tensors, buffers, {}, whole, tuple(warnings))


def describe_position(ledger: Sequence[SourceUse], step: int, optimizer_step: int) -> Iterator[str]:
    """Say what a run sees twice and what never, because another program read the same data in another order.

    Of an epoch of N tokens whose share f was read there, f of what is left here was read, and f of what is left there is
    not: f (1 - f) N each, for two orders that have nothing to do with each other.
    """
    if step < optimizer_step:
        yield (
            f"the other program made {optimizer_step} steps and the run counts it as step {step}: what it read in the "
            f"{optimizer_step - step} steps between comes again"
        )
    drawn = Counter[str]()
    for use in ledger:
        drawn[use.source] += use.tokens
    for source, epochs in {use.source: use.epochs for use in ledger}.items():
        share, size = epochs % 1, drawn[source] / epochs if epochs else 0.0
        if share and size:
            twice = round(share * (1 - share) * size)
            yield (
                f"source {source!r}: {epochs:.2f} epochs ({drawn[source]:,} tokens) count as read, in another order than ours. "
                f"Of the {round((1 - share) * size):,} tokens that are left of this epoch about {twice:,} were read before; as many "
                "were not read and do not come in this epoch"
            )


def make_record(config: RunConfig, expected: Expected, step: int, optimizer_step: int) -> dict[str, Any]:
    """Describe a state of a run as a checkpoint's manifest does, without its data state and identities."""
    optimizer = config.optimizer
    settings = {"lr": 0.0, "betas": [optimizer.beta1, optimizer.beta2], "eps": optimizer.epsilon}
    dtype = "bfloat16" if config.train.precision == "bf16" else "float32"
    return {
        "step": step,
        "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config_sha256": digest_config(config),
        "config": config.model_dump(mode="json"),
        "packages": packages_used(config),
        "engine": {"global_steps": step, "global_samples": step, "micro_steps": step, "skipped_steps": 0},
        "versions": collect_versions(),
        "groups": {label: {**settings, "weight_decay": decay} for label, decay in expected.settings.items()},
        "parameters": {
            name: {"shape": list(shape), "dtype": dtype, "group": label, "optimizer_step": optimizer_step}
            for (name, shape), label in zip(expected.shapes.items(), map(expected.labels.get, expected.shapes))
        },
        "buffers": {name: {"shape": list(shape), "dtype": "float32"} for name, shape in expected.buffers.items()},
    }


def import_state(
    source: Path,
    out: Path,
    config: RunConfig | None = None,
    *,
    step: int | None = None,
    changed: Collection[str] = (),
    report: Report = silent,
) -> WrittenRun | Weights:
    """Read a training state and write OUT: a run directory, or a weights folder where there are no moments.

    `config`: of the run that continues, for a state without our record; `step`: what it counts the state as; `changed`:
    arguments that the state records and the run changes on purpose. Raises ValueError if the state is not whole, does
    not fit, contradicts the configuration or needs one: then nothing is written.
    """
    check_free(out)
    report(f"reading {source}")
    read = _read(source, config, step, changed)
    if isinstance(read, Weights):
        write_model(out, read)
        return read
    return write_run(out, read, report)


def _read(
    source: Path, config: RunConfig | None, step: int | None, changed: Collection[str]
) -> TrainingState | Weights:
    """Read a folder: with only our record, without it by a configuration, which what is recorded must not contradict."""
    folder: MegatronFolder | UniversalFolder | DcpStates
    if is_megatron(source):
        config = require_config(source, config)
        folder = MegatronFolder(source, config.model)
    else:
        folder = UniversalFolder(source) if is_universal(source) else DcpStates(source)
        if folder.has_record():
            refuse_config(source, config, step, changed)
            return folder.read()
        config = require_config(source, config)
        if isinstance(folder, UniversalFolder):
            folder.name_parameters(config.model)
    check_recorded(source, config, has_moments=folder.has_moments(), changed=changed)
    return _adopt(folder, source, config, step)


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
    """Return the configuration. Raises ValueError if none was given."""
    if config is None:
        raise ValueError(
            f"{source} has no record of an amfm run; name the configuration of the run that continues with --config: its "
            "model section describes these weights, and its data must be prepared"
        )
    return config


def refuse_config(source: Path, config: RunConfig | None, step: int | None, changed: Collection[str]) -> None:
    """Raise ValueError for a configuration, step or change that would have no effect."""
    if config is not None or step is not None or changed:
        raise ValueError(
            f"{source} has the record of an amfm run, whose configuration and step it continues with; leave out --config, "
            "--step and --changed"
        )
