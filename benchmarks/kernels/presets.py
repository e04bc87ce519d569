"""The forms of kernels that blocks of the presets launch, recorded from one block of each kind on each preset's own layout.

How: a block passes forward and backward on the meta device, as the plan measures it; bodies of operations run, so that every
launch happens with its real types, constants and tiles, is noted and does nothing. Launches are one form where the kernel, its
constexprs, types of pointers, warps and stages are the same; whether an integer is 1, or 16 divides it, is taken from the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from amfm.kernels.proof.recorded import KernelLaunch, note_launch
from amfm.launch.plan.blocks.cut import cut_of
from amfm.launch.plan.blocks.measured import pass_block, takes_kernels
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.stand_ins import Cut
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import resolve_stages

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "tiny_cpu")  # which trains on a CPU


def record_preset(path: Path) -> dict[str, KernelLaunch]:
    """Every form that the blocks of a preset launch, by name: in all its stages, and by its recipe of low precision."""
    config, found = load_checked(path, ()), dict[str, KernelLaunch]()
    passed: list[tuple[ModelConfig, str, Cut]] = []
    for stage in resolve_stages(config):
        run = stage.config
        for letter, is_narrow in kinds_of(run):
            block = run.model, letter, cut_of(run, smallest_layout(run), letter, 1.0, is_narrow=is_narrow)
            if block not in passed:
                pass_block(*block, partial(note_launch, found))
                passed.append(block)
    return found


def kinds_of(run: RunConfig) -> Iterator[tuple[str, bool]]:
    """Symbols of the pattern whose kernels are Triton's, each with whether its products are by a recipe."""
    narrow = {run.model.built_letters[index] for index in run.low_precision.narrow_blocks(run.model.letters)}
    for letter in dict.fromkeys(run.model.letters):
        if takes_kernels(run.model, letter):
            yield letter, False
            if letter in narrow:
                yield letter, True


def smallest_layout(run: RunConfig) -> Layout:
    """The layout that a run declares, on as few ranks as hold it once."""
    axes = run.parallel
    return Layout.of(run, axes.tensor * axes.context * axes.pipeline * axes.expert)
