"""Without Triton, as on macOS, a run on GPUs is planned as with it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amfm.launch.plan.activations import Storage
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.launch.plan.stand_ins import Cut
from amfm.model.config.kinds import registered_kinds
from tests.launch.plan.presets import plan_of, preset
from tests.model.mixers.samples import mixer_config

GPU = Storage(2, "triton")


# The finder of installed modules finds no Triton.
WITHOUT_TRITON = """
import json
import sys
from importlib.machinery import PathFinder


class WithoutTriton(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] == "triton" else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton
from tests.launch.plan.test_stand_ins import plan_blocks

found = plan_blocks()
assert "triton" not in sys.modules, "Triton was imported, or its stand-in is left behind"
print(json.dumps(found, default=repr))
"""


def plan_blocks() -> dict[str, Any]:
    """What blocks of all kinds keep and launch, whole and cut, and the step of a preset."""
    model = preset("nemotron3_nano_30b").model
    cuts = {"M": Cut(tensor=2, context=2), "*": Cut(is_split=True), "E": Cut(expert=8, sent=4.5, in_halves=True)}
    found: dict[str, Any] = {letter: block_bytes(model, letter, GPU, cut) for letter, cut in cuts.items()}
    for name, kind in registered_kinds().items():
        config = mixer_config(name, blocks=1)
        options = getattr(config.mixers, name)
        chunks = {"chunk_size": 64} if hasattr(options, "chunk_size") else {}
        mixers = config.mixers.model_copy(update={name: options.model_copy(update=chunks)})
        found[name] = block_bytes(config.model_copy(update={"mixers": mixers}), kind.symbol, GPU)
    own = plan_of("ladder_150m", ranks=8).own
    return {name: vars(block) for name, block in found.items()} | {"step": own.step.total(), "mfu": own.mfu}


@pytest.mark.skipif(
    tuple(map(int, importlib.metadata.version("megatron-core").split(".")[:2])) >= (0, 17),
    reason="NOT TESTED: this megatron-core imports Triton itself; where Triton is missing pip installs an older one",
)
@pytest.mark.slow
def test_a_plan_for_gpus_is_the_same_where_triton_is_not_installed() -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON]
    apart = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert apart.returncode == 0, apart.stderr
    assert json.loads(apart.stdout.splitlines()[-1]) == json.loads(json.dumps(plan_blocks(), default=repr))
