"""A new kind of block is its options, its mixer and one row: of a package, and as a core kind in four files of a copy."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.processes.zygote import BARE, run_program

ROOT = Path(__file__).parents[3]
OPTIONS = '''
from pydantic import Field

from amfm.model.config.options import MixerOptions, Prunable, channel_dims


class SqueezeConfig(MixerOptions):
    """A bottleneck of squared ReLUs."""

    width: int = Field(gt=0, description="Channels inside.")

    def broken_rules(self):
        if self.width == 13:
            yield "width", "brings bad luck; use 12"

    def cut_evenly(self):
        return {"tensor": {"width": self.width}}

    def prunable(self, groups):
        return Prunable({"width": 1}, self.width, channel_dims(self.width)) if groups == "channels" else None
'''
MIXER = """
from torch.nn import functional

from amfm.model.mixers.interface import Mixer, MixerOutput
from amfm.model.parallel.layers import ColumnLinear, RowLinear
from amfm.model.parallel.regions import leave_tensor_region, project_stream


class SqueezeMixer(Mixer):
    def __init__(self, options, build):
        super().__init__()
        self.groups = build.groups
        self.up_proj = ColumnLinear(build.hidden_size, (options.width,), build.groups, name="width")
        self.down_proj = RowLinear(options.width, build.hidden_size, build.groups, name="width")

    def forward(self, x_BTD, meta, state=None):
        (inner_BTI,) = project_stream(x_BTD, [self.up_proj.weight], self.groups)
        y_BTD = self.down_proj(functional.relu(inner_BTI).square())
        return MixerOutput(leave_tensor_region(y_BTD, self.groups))
"""
PACKAGE_ROW = """
from amfm.model.config.kinds import Kind
from squeeze_options import SqueezeConfig
from tests.helpers.processes.zygote import BARE, run_program

KIND = Kind("squeeze", "squeeze_mixer:SqueezeMixer", SqueezeConfig, mixes="channels")
"""
CORE_ROW = '    Kind("squeeze", "amfm.model.squeeze:SqueezeMixer", SqueezeConfig, mixes="channels", letter="Q", is_core=True),\n'
USE = """
import sys
from pathlib import Path

import torch

import amfm.model
from amfm.launch.plan.estimate import Assumptions, estimate
from amfm.launch.plan.hardware import HARDWARE
from amfm.launch.plan.layout import Layout
from amfm.model.config.checks import check_model
from amfm.model.flops import block_flops, count_parameters
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.blocks import kinds_in_use
from amfm.pretrain.checks.parallel import layout_problems
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.fields import describe_fields
from amfm.pretrain.hooks.prune import plan_groups

root, symbol, key = sys.argv[1:]
pattern = f"M{symbol}*{symbol}"


def read(*changes):
    return load_config(Path(root) / "configs/tiny_cpu.yaml", [f"model.pattern={pattern}", *changes])


run = read(f"{key}.width=12")
assert f"{key}.width" in [row.key for row in describe_fields()]
config = run.model
assert {kind.name for kind, _ in kinds_in_use(run.model)} == {"mamba", "attention", "squeeze"}
model = HybridModel(config, single_rank_groups(), seed=3)
assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total
assert block_flops(config, symbol, 256) == 3 * 2 * 2 * 192 * 12
tokens_BT = torch.randint(2048, (2, 33), generator=torch.Generator().manual_seed(0))
meta = PackMeta.one_document_a_row(2, 32)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
losses = []
for _ in range(2):
    loss = model(tokens_BT[:, :-1], meta, tokens_BT[:, 1:]).loss.total
    loss.backward()
    assert model.blocks[1].mixer.up_proj.weight.grad.abs().sum() > 0
    optimizer.step()
    losses.append(float(loss))
assert losses[1] < losses[0]
planned = [estimate(run, Layout(ranks, 1, 2, tensor=ranks), HARDWARE["h100"], Assumptions()) for ranks in (1, 2)]
whole, half = (item.step.compute["squeeze"] for item in planned)
assert 0 < half < whole and planned[1].step.communication["tensor"] > 0
plan = plan_groups(config, "channels")
assert [(unit.place, unit.count) for unit in plan.units] == [("blocks.1.mixer.", 12), ("blocks.3.mixer.", 12)]
(problem,) = layout_problems(read(f"{key}.width=15", "parallel.tensor=2"))
assert f"must divide {key}.width=15" in str(problem), problem
for width, message in ((13, f"{key}.width=13 brings bad luck"), (None, f"{key} is missing")):
    try:
        check_model(read(*([] if width is None else [f"{key}.width={width}"])).model)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
print("trained", symbol, "of", Path(amfm.model.__file__).parent)
"""


def use(symbol: str, key: str, path: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", USE, str(ROOT), symbol, key]
    found = run_program(command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, zygote=BARE)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_package_brings_a_kind_that_mixes_channels(tmp_path: Path) -> None:
    for name, text in (("options", OPTIONS), ("mixer", MIXER), ("row", PACKAGE_ROW)):
        (tmp_path / f"squeeze_{name}.py").write_text(text)
    metadata = tmp_path / "squeeze-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: squeeze\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[amfm.mixers]\nsqueeze = squeeze_row:KIND\n")
    assert "trained {squeeze}" in use("{squeeze}", "model.mixers.squeeze", f"{tmp_path}{os.pathsep}{ROOT / 'src'}")


@pytest.mark.slow
def test_a_core_kind_is_added_in_four_files(tmp_path: Path) -> None:
    package, model = tmp_path / "amfm", tmp_path / "amfm" / "model"
    shutil.copytree(ROOT / "src" / "amfm", package, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.read_text() for path in package.rglob("*.py")}
    (model / "config" / "squeeze.py").write_text(OPTIONS)
    (model / "squeeze.py").write_text(MIXER)
    imports = "from amfm.model.config.squeeze import SqueezeConfig\n"
    for path, place, line in (
        (model / "config" / "kinds.py", "CORE = (\n", CORE_ROW),
        (
            model / "config" / "schema.py",
            "    mixers: RegisteredMixers",
            '    squeeze: SqueezeConfig | None = Field(None, description="Needed by Q.")\n',
        ),
    ):
        text = path.read_text()
        assert text.count(place) == 1
        text = text.replace(place, place + line if place.startswith("CORE") else line + place)
        first_import = text.index("from amfm.model.config")
        path.write_text(text[:first_import] + imports + text[first_import:])
    changed = [path for path in package.rglob("*.py") if before.get(path) != path.read_text()]
    assert len(changed) == 4
    assert use("Q", "model.squeeze", str(tmp_path)).strip() == f"trained Q of {model}"


BRANCH = re.compile(
    r"""(letter|symbol|mixer|pattern|kind)s?[\w.()\[\]]* *(==|!=|in|not in) *[({\[]?["'][ME*-]["']"""
    r"""|["'][ME*-]["'] (not )?in |\.(count|index)\(["'][ME*-]["']\)"""
)
# Classes of other programs name their own kinds; a modelling file that leaves amfm stands on its own.
FOREIGN = ("model/huggingface/", "pretrain/export/modeling_template/")


def test_no_code_of_model_pretrain_and_the_plan_branches_on_the_letter_of_a_block() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("model", "pretrain", "launch/plan")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if not str(path.relative_to(ROOT)).startswith(FOREIGN) and BRANCH.search(line)
    ]
    assert BRANCH.search('if letter == "M" and config.mamba is not None:')
    assert not found, "\n".join(found)
