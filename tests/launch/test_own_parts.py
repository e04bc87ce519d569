"""Parts without a package: registered in a process or by a folder; hooks and optimizers of a process; errors of own code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import amfm
from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run as run_verb
from amfm.model.config.mixer_options import HeadOptions
from amfm.model.config.section import Section
from amfm.model.mixers.base import LinearMixer, no_decay, query_key_value
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.packing import PackMeta
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.report.plots import make_plots
from amfm.pretrain.run import Run
from tests.helpers.registered import nothing_stays_registered  # noqa: F401 a fixture
from tests.launch.test_modules import page_blocks
from tests.pretrain.tiny_run import MODEL, read_events, tiny_config, tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


def page_parts() -> dict[str, Any]:
    """What the first programs of docs/hooks.md define: a mixer that they register, and a hook."""
    found: dict[str, Any] = {"__name__": __name__}
    for heading in ("Folders", "Hooks"):
        section = page_blocks("docs/hooks.md", heading) if heading == "Hooks" else []
        for code in section:
            exec(compile(code, "docs/hooks.md", "exec"), found)
    return found


def mixer_program() -> str:
    """The program of docs/hooks.md that registers a mixer."""
    text = (Path(__file__).parents[2] / "docs/hooks.md").read_text()
    return text.partition("```python\n")[2].partition("```")[0]


def own_config(data: DataConfig, folder: Path, **changes: Any) -> Path:
    """A run of the page's mixer from a folder `my_parts`, next to which is a module that no one names."""
    parts = folder / "my_parts"
    parts.mkdir(exist_ok=True)
    (parts / "__init__.py").write_text("from my_parts import halving\n")
    (parts / "halving.py").write_text(mixer_program())
    (folder / "next_to_it.py").write_text("raise SystemExit('imported')\n")
    tree = tiny_config(data, folder / "run").model_dump(mode="json", exclude_unset=True)
    mixers = {"halving": {"num_heads": 4, "head_dim": 8}}
    tree |= {"plugins": ["my_parts"], "model": {**MODEL, "pattern": "{halving}-", "mixers": mixers}, **changes}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_mixer_of_a_notebook_is_in_patterns_sections_and_messages() -> None:
    before = amfm.build(MODEL)
    exec(compile(mixer_program(), "docs/hooks.md", "exec"), {"__name__": __name__})
    mixers = {"halving": {"num_heads": 4, "head_dim": 8, "share": 0.25}}
    model = amfm.build({**MODEL, "pattern": "({halving}-)x2", "mixers": mixers})
    assert model.config.mixers.packages_used() == {"halving": "this process"}
    assert before.config.mixers.halving is None and "halving" not in before.config.model_dump()["mixers"]
    with pytest.raises(amfm.ConfigError, match=r"did you mean mixers\.halving\.share"):
        amfm.layers.build("halving", 8, num_heads=2, head_dim=4, shar=0.5)

    class Options(HeadOptions):
        """Another form under the same name."""

        speed: float = 1.0

    class Mixer(LinearMixer):
        recurrence = DecayRecurrence()

        def parts(self):
            return query_key_value(self.options)

        def rows(self, parts, meta):
            q, k, v = (self.heads(parts[name]) for name in ("q", "k", "v"))
            return ScanRows(q, k, v, no_decay(q) - self.options.speed)

        def output(self, o_BTHV, parts):
            return o_BTHV.flatten(-2)

    amfm.register(amfm.Kind("halving", Mixer, Options))
    assert isinstance(amfm.layers.build("halving", 8, num_heads=2, head_dim=4, speed=2.0).mixer, Mixer)
    with pytest.raises(ValueError, match="'retnet' is registered by amfm"):
        amfm.register(amfm.Kind("retnet", Mixer, Options))
    with pytest.raises(ValueError, match="lower-case"):
        amfm.register(amfm.Kind("Retnet", Mixer, Options))


@pytest.mark.parametrize("nproc", [[], pytest.param(["--nproc", "2"], marks=pytest.mark.slow)], ids=["here", "2"])
def test_a_folder_trains_on_any_ranks_and_its_checkpoint_is_read_where_it_is_named(
    data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    nproc: list[str],
) -> None:
    path = own_config(data, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_verb(["train", str(path), *nproc]) == 0
    assert run_verb(["--plugins", "my_parts", "generate", "run", "--prompt", "some", "--max-new-tokens", "3"]) == 0
    assert "next_to_it" not in sys.modules and str(tmp_path) not in sys.path
    capfd.readouterr()


def test_verbs_that_only_read_import_no_folder_that_the_user_does_not_name(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_config(data, tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in (
        ["config", str(path)],
        ["plan", str(path), "--gpus", "1"],
        ["launch", str(path), "--on", "slurm", "--nodes", "1", "--dry-run"],
    ):
        assert run_verb(words) == 2
        assert "amfm --plugins my_parts" in capsys.readouterr().err
        assert "my_parts" not in sys.modules
    assert run_verb(["--plugins", "my_parts", "config", str(path)]) == 0
    assert "halving" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "message"), [("absent", "must be a folder with an __init__"), ("json", "which is another module")]
)
def test_a_folder_that_cannot_be_imported_is_refused(
    folder: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(amfm.ConfigError, match=message):
        amfm.load({"plugins": [folder]})


def test_a_router_of_a_process_leaves_out_experts_and_its_loss_is_logged(data: DataConfig, tmp_path: Path) -> None:
    (program,) = page_blocks("docs/hooks.md", "Routers")
    exec(compile(program, "docs/hooks.md", "exec"), {"__name__": __name__})
    moe = {"num_experts": 4, "top_k": 3, "expert_hidden_size": 24, "router": "relu"}
    config = tiny_config(
        data, tmp_path / "run", train__steps=3, model__moe=moe | {"router_options": {"relu": {"l1_weight": 0.5}}}
    )
    line = amfm.train(config).metrics[-1]
    assert line["auxiliary"]["relu_l1"] > 0
    mixer = amfm.build({**MODEL, "pattern": "E", "moe": moe}).blocks[0].mixer
    x = torch.randn(1, 8, 32)
    output = mixer(x, PackMeta.one_document_a_row(1, 8))
    scores = mixer._logits(x)[0].relu()
    weights, ids = scores.topk(3, dim=-1)
    inner = torch.einsum("td,efd->tef", x[0], mixer.experts.up).relu().square()
    each = torch.einsum("tef,edf->ted", inner, mixer.experts.down)
    dense = (each.gather(1, ids[..., None].expand(-1, -1, 32)) * weights[..., None]).sum(1)
    torch.testing.assert_close(output.y_BTD[0], dense)
    assert int(output.expert_counts_E.sum()) == int((weights > 0).sum()) < 24


class NoOptions(Section):
    """None."""


def descend(
    weight: torch.Tensor, gradient: torch.Tensor, moments: Any, step: int, group: dict[str, Any], options: Any
) -> None:
    weight.sub_(gradient, alpha=group["lr"])
    moments["momentum"].copy_(gradient)


def test_hooks_and_an_optimizer_of_a_process_train_and_what_a_hook_logs_is_drawn(
    data: DataConfig, tmp_path: Path
) -> None:
    hook = page_parts()["StreamNorms"]
    plain = amfm.train(tiny_config(data, tmp_path / "plain"))
    optimizer = amfm.OptimizerSpec("descent", descend, NoOptions, 1)
    record = amfm.train(tiny_config(data, tmp_path / "run"), hooks=[hook], optimizer=optimizer)
    assert record.config.optimizer.kind == "descent" and plain.config.optimizer.kind == "adamw"
    assert record.metrics[-1]["block_rms"].keys() == {f"block {index}" for index in range(4)}
    drawn, of_plain = ({plot.name for plot in make_plots(each)} for each in (record, plain))
    assert drawn - of_plain == {"other-block_rms"}
    assert record.series("loss")[1][-1] != plain.series("loss")[1][-1]


BROKEN = """
import torch
from my_parts.halving import HalvingMixer, HalvingOptions
import amfm

class Broken(HalvingMixer):
    def rows(self, parts, meta):
        CHANGE
        return super().rows(parts, meta)

amfm.register(amfm.Kind("broken", Broken, HalvingOptions))
"""


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("parts['q'] = parts['q'][:, :7] + parts['k']", 2, "The size of tensor a (7) must match"),
        ("parts['q'] = parts['q'][..., :28]", 2, "k must have shape"),
        ("torch.empty(1 << 60)", 3, "lower train.micro_batch_size"),
    ],
)
def test_an_error_of_own_code_keeps_its_traceback_and_place(
    change: str,
    code: int,
    words: str,
    data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = own_config(data, tmp_path)
    (tmp_path / "my_parts" / "__init__.py").write_text(BROKEN.replace("CHANGE", change))
    monkeypatch.chdir(tmp_path)
    options = "model.mixers.broken={num_heads: 4, head_dim: 8}"
    assert run_verb(["train", str(path), "model.pattern=-{broken}", options]) == code
    said = capsys.readouterr().err
    assert words in said and "in block 1 ({broken}), forward" in said
    assert ("Traceback" in said) == (code == 2) and ("resume" in said) == (code == 3)
    assert "in block 1 ({broken}), forward" in read_events(tmp_path / "run")[-1]["error"]


class Poison(amfm.Hook):
    """Makes a weight of block 1 bad before the second step."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def before_passes(self, micro_batches: Any, share: Any) -> None:
        if self.run.progress.step == 1:
            with torch.no_grad():
                next(self.run.model.blocks[1].mixer.parameters()).fill_(torch.nan)


def test_a_skipped_step_names_the_first_block_whose_output_is_not_finite(data: DataConfig, tmp_path: Path) -> None:
    amfm.train(tiny_config(data, tmp_path, train__steps=2, schedule__warmup_steps=1), hooks=[Poison])
    (skip,) = [event for event in read_events(tmp_path) if event["event"] == "skipped_step"]
    assert skip["first_nonfinite"] == "the output of block 1 (E)"


def test_a_loss_that_stays_above_that_of_a_guess_is_a_warning(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(
        data, tmp_path, train__steps=24, optimizer__learning_rate=3.0, schedule__warmup_steps=0, model__pattern="-"
    )
    amfm.train(config)
    assert len([event for event in read_events(tmp_path) if event["event"] == "diverged"]) == 1


def test_the_settings_of_a_run_with_a_folder_are_written_with_it(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = amfm.load(own_config(data, tmp_path))
    written = yaml.safe_load(resolved_yaml(config))
    assert written["plugins"] == ["my_parts"] and written["model"]["mixers"]["halving"]["num_heads"] == 4
