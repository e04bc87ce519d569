"""amfm from Python: load a configuration, plan it, prepare its data, train it, read its run, and generate with its model.

For notebooks, tests and scripts on one machine; docs/python.md shows each function. They are thin: what they do is what the
verb of the same name does, with objects instead of printed tables, and they raise ValueError for settings and files that
are wrong, RuntimeError for the machine's state. A run on several ranks or hosts is started by `amfm train --nproc` and
`amfm launch`, from a notebook through `subprocess`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amfm.launch.console import UNUSED_LIBRARIES
from amfm.launch.existing import choose_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.packages import require_extra

if TYPE_CHECKING:
    from amfm.data_pipeline.prepare.report import PrepareReport
    from amfm.launch.plan.plan import Plan
    from amfm.pretrain.config.optimizers import PackageOptimizerSpec
    from amfm.pretrain.hook import Hook
    from amfm.pretrain.inference.generate import TextModel
    from amfm.pretrain.report.data import RunRecord
    from amfm.pretrain.run import Run

warnings.filterwarnings("ignore", message=UNUSED_LIBRARIES)  # as the verbs do


def load(path: str | Path | Mapping[str, Any] | None = None, *overrides: str, preset: str | None = None) -> RunConfig:
    """Load and check a configuration: a file, a dict of its sections, or a preset, with overrides like `"train.steps=20"`.

    Raises ConfigError (a ValueError) with every problem, FileNotFoundError for a file that is not there.
    """
    from amfm.pretrain.checks.load import load_checked

    if isinstance(path, Mapping):
        return load_checked(path, overrides)
    given = None if path is None else Path(path)
    return load_checked(*choose_config(given, overrides, preset))


def plan(config: RunConfig, gpus: int, gpu: str = "h100", *, search: bool = False) -> Plan:
    """Estimate parameters, memory and time of a run on this many GPUs, and the layouts that fit.

    gpu: a name of the table (a100, h100, h200, b200) or a hardware file. search: rank layouts of all axes. Raises ValueError for
    a GPU or a layout that cannot be.
    """
    from amfm.launch.plan.estimate import Assumptions
    from amfm.launch.plan.hardware import load_hardware
    from amfm.launch.plan.plan import make_plan
    from amfm.pretrain.checks.check_run import check_run

    hardware = load_hardware(gpu, "gpu")
    check_run(config, None if search else range(gpus, 0, -hardware.gpus_per_node))
    return make_plan(config, hardware, gpus, Assumptions(), search=search)


def prepare(config: RunConfig) -> PrepareReport:
    """Make or complete the token store of a configuration on this machine. Raises ValueError for settings and input."""
    require_extra("data", "prepare")
    from amfm.data_pipeline.prepare.prepare import prepare as prepare_store

    return prepare_store(config.data, vocab_size=config.model.vocab_size)


def train(
    config: RunConfig,
    *,
    hooks: Sequence[Callable[[Run], Hook]] = (),
    optimizer: PackageOptimizerSpec | None = None,
) -> RunRecord:
    """Train in this process, on one rank, resuming from `run.dir`; returns the run's record. Call it from the main thread.

    hooks: subclasses of `amfm.Hook` that are built from the run. optimizer: one that is registered here and used. Ends where
    the steps are done, or after Ctrl-C has saved. Raises ValueError for settings and data that do not fit and for runs whose
    stages change their layout, RuntimeError if the run failed; its newest checkpoint stands.
    """
    from amfm.model.config.registering import register
    from amfm.pretrain.launcher_protocol import DONE, INTERRUPTED
    from amfm.pretrain.stages import fresh_starts
    from amfm.pretrain.train import train as train_run

    if anew := fresh_starts(config):
        raise ValueError(f"ranks restart after step {anew[0]}, which needs separate processes; run `amfm train`")
    if optimizer is not None:
        register(optimizer)
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"kind": optimizer.name})})
    code = train_run(config, hooks)
    if code not in (DONE, INTERRUPTED):
        raise RuntimeError(f"the run in {config.run.dir} failed: the end of its events.jsonl states why")
    return read_run(config.run.dir)


def read_run(run_dir: str | Path) -> RunRecord:
    """Read the record of a run: `metrics` by step, `events`, `series("loss")`, `last("validation_loss")`.

    Raises FileNotFoundError if it is not a run directory, ValueError if no step was logged yet.
    """
    from amfm.pretrain.report.data import read_run as read_record

    return read_record(run_dir)


def load_model(path: str | Path, *, device: str = "cpu", backend: str = "auto") -> TextModel:
    """Load the model of a run's newest checkpoint, a checkpoint, an import or an export; `generate(prompt)` continues a text.

    `model` of what it returns is the torch module, `tokenizer` the run's. Raises ValueError when the path is none of these, RuntimeError for damaged files.
    """
    from amfm.launch.modules import read_model
    from amfm.pretrain.inference.generate import TextModel

    return TextModel(read_model(Path(path)), device=device, backend=backend)
