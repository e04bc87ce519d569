"""Hooks of packages: an error names hook, moment and package, and another interface is rejected with what changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.config.hook_registry import BUILT_IN, INTERFACE, HookOptions, HookSpec, hook_specs
from amfm.pretrain.hook import Hook
from amfm.pretrain.hooks.build import OfPackage
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.run import Run
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step_sums import StepResult
from amfm.pretrain.train import run_steps
from tests.pretrain.tiny_run import read_metrics, tiny_config


class Failing(Hook):
    """Fails after the second step."""

    def __init__(self, options: HookOptions, run: Run) -> None:
        self.run = run

    def after_step(self, result: StepResult) -> None:
        if self.run.progress.step == 2:
            raise KeyError("loss")


def test_a_hook_that_raises_names_itself_its_package_and_the_moment(data: DataConfig, tmp_path: Path) -> None:
    spec = HookSpec("failing", f"{__name__}:Failing", HookOptions, INTERFACE)
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path), signals)
        run.hooks = (*run.hooks, OfPackage(spec, "amfm-failing 1.0", HookOptions(), run))
        with pytest.raises(
            RuntimeError, match=r"the hook failing of amfm-failing 1\.0 failed in after_step: KeyError: 'loss'"
        ):
            run_steps(run)
        absent = HookSpec("absent", "nowhere.at_all:Hook", HookOptions, INTERFACE)
        with pytest.raises(
            RuntimeError, match=r"the hook absent of b 2 cannot be built: ModuleNotFoundError: .*nowhere"
        ):
            OfPackage(absent, "b 2", HookOptions(), run)
        close_run(run)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        (
            "",
            r"the hook 'looking' of older 1\.2 is written for interface 1 of hooks, and this amfm has 2: .*Class\(options, run\)",
        ),
        (", interface=3", r"is written for interface 3 of hooks, and this amfm has 2; install a newer amfm"),
    ],
)
def test_a_package_of_another_interface_is_refused_with_what_changed(
    interface: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"older{len(interface)}"
    (tmp_path / f"{name}.py").write_text(
        "from amfm.pretrain.config.hook_registry import HookOptions, HookSpec\n"
        f"HOOK = HookSpec('looking', 'nowhere:Hook', HookOptions{interface})\n"
    )
    metadata = tmp_path / "older-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: older\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(f"[amfm.hooks]\nlooking = {name}:HOOK\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=message):
        hook_specs.__wrapped__()


def test_pruning_and_forgetting_are_entries_of_the_table_with_sections_of_their_own() -> None:
    assert [spec.name for spec in BUILT_IN] == ["prune", "forget", "qk_clip", "distill", "trace_choices", "ema"]
    assert all(issubclass(spec.load(), Hook) and spec.explain_unfit() is None for spec in BUILT_IN)
