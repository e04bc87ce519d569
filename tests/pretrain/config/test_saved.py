"""What is saved does not depend on what is installed, and what was saved with a package says which one it misses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from amfm.model.config.schema import ModelConfig, read_saved_model
from amfm.pretrain.checkpoint.compatibility import check_resumable
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_config, resolved_yaml
from amfm.pretrain.config.saved import read_saved_config
from tests.helpers.processes.zygote import BARE, run_program

ROOT = Path(__file__).parents[3]
PLUGIN = '''
from amfm.model.config.mixer_options import HeadOptions
from amfm.model.config.kinds import Kind
from amfm.pretrain.config.hook_registry import HookOptions, HookSpec


class HalvingOptions(HeadOptions):
    """Forgets half at each token."""


class WatchingOptions(HookOptions):
    """Looks on."""


MIXER = Kind("halving", "nowhere:Mixer", HalvingOptions)
HOOK = HookSpec("watching", "nowhere:Hook", WatchingOptions, interface=2)
'''
SAVE = """
import json, sys
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.saved import packages_used
from tests.helpers.processes.zygote import BARE, run_program
for overrides in ([], ["model.mixers.halving={num_heads: 2}"], ["hooks.watching={}"]):
    config = load_config(sys.argv[1], overrides)
    print(json.dumps({"config": config.model_dump(mode="json"), "packages": packages_used(config)}))
"""


@pytest.fixture
def manifests(tmp_path: Path, base: Path) -> list[dict[str, Any]]:
    """Saved where a package brings a mixer and a hook: with neither set, with the mixer, with the hook."""
    (tmp_path / "halves.py").write_text(PLUGIN)
    metadata = tmp_path / "halves-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text("[amfm.mixers]\nm = halves:MIXER\n[amfm.hooks]\nh = halves:HOOK\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "ignore", "-c", SAVE, str(base)]
    done = run_program(command, env=environment, zygote=BARE)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) | {"step": 3, "identities": {}} for line in done.stdout.splitlines()]


def test_a_checkpoint_saved_beside_an_unused_package_resumes_without_it_and_one_that_uses_it_names_it(
    manifests: list[dict[str, Any]], base: Path
) -> None:
    unused, with_mixer, with_hook = manifests
    config = load_config(base)
    assert unused == {"config": config.model_dump(mode="json"), "packages": {}, "step": 3, "identities": {}}
    assert check_resumable(unused, config, {}) == ()
    for manifest, key, group in (
        (with_mixer, "model.mixers.halving", "amfm.mixers"),
        (with_hook, "hooks.watching", "amfm.hooks"),
    ):
        with pytest.raises(ValueError, match=rf"{key} is of halves 1\.2, which is not installed here .* {group}\)"):
            check_resumable(manifest, config, {})
    with pytest.raises(ValueError, match=r"model\.mixers\.halving is of halves 1\.2"):
        read_saved_model(with_mixer["config"]["model"], with_mixer["packages"])


def test_null_sections_that_earlier_versions_wrote_are_left_out(base: Path) -> None:
    config = load_config(base)
    saved = config.model_dump(mode="json")
    saved["model"]["mixers"]["halving"] = saved["hooks"]["watching"] = None
    assert read_saved_config({"config": saved}) == config
    assert ModelConfig.model_validate(read_saved_model(saved["model"], {})) == config.model
    saved["hooks"]["watching"] = {}
    with pytest.raises(ValueError, match=r"hooks\.watching is of a package whose name was not saved with it"):
        check_resumable({"config": saved, "step": 3, "identities": {}}, config, {})


def test_our_own_sections_are_written_where_they_are_null(base: Path) -> None:
    assert "    deltanet: null\n" in resolved_yaml(load_config(base))


def test_a_file_with_a_section_that_nothing_registers_asks_for_its_package(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"hooks\.watching.* install the package that registers it .* amfm\.hooks"):
        load_config(base, ["hooks.watching={}"])


def test_balance_losses_of_a_run_that_goes_on_count_what_they_counted(base: Path) -> None:
    moe = "{num_experts: 4, top_k: 2, expert_hidden_size: 8, expert_bias: true, sequence_loss_weight: 0.1%s}"
    config = load_config(base, [f"model.moe={moe % ''}"])
    saved = config.model_dump(mode="json")
    del saved["model"]["moe"]["balance_counts"]
    manifest = {"config": saved, "step": 3, "identities": {}}
    with pytest.raises(ValueError, match=r"balance_counts: the checkpoint has 'routed', this run has 'scores'"):
        check_resumable(manifest, config, {})
    as_before = load_config(base, [f"model.moe={moe % ', balance_counts: routed'}"])
    assert check_resumable(manifest, as_before, {}) == ()
