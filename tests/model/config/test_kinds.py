"""Kinds of block: what the configuration says of them, and a package that brings its own."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest

from amfm.model.config.checks import check_model
from amfm.model.config.kinds import registered_kinds
from amfm.model.config.pattern import parse_pattern
from tests.helpers.processes.zygote import BARE, run_program
from tests.model.mixers.samples import sample_options
from tests.model.small_models import small_config

PLUGIN = '''
from pydantic import Field

from amfm.model.config.mixer_options import HeadOptions
from amfm.model.config.kinds import Kind


class HalvingOptions(HeadOptions):
    """Forgets half at each token."""

    share: float = Field(0.5, gt=0, lt=1, description="What stays.")


SPEC = Kind("halving", "halving_mixer:HalvingMixer", HalvingOptions)
'''
MIXER = """
import math

from amfm.model.mixers.base import LinearMixer, no_decay, query_key_value
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows


class HalvingMixer(LinearMixer):
    recurrence = DecayRecurrence()

    def parts(self):
        return query_key_value(self.options)

    def rows(self, parts, meta):
        q, k, v = (self.heads(parts[name]) for name in ("q", "k", "v"))
        return ScanRows(q, k, v, no_decay(q) + math.log(self.options.share))

    def output(self, o_BTHV, parts):
        return o_BTHV.flatten(-2)
"""
USE = """
import torch
from amfm.model.config.schema import ModelConfig
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from tests.helpers.processes.zygote import BARE, run_program

tree = {"pattern": "{halving}", "vocab_size": 8, "hidden_size": 8, "mixers": {"halving": {"num_heads": 2, "head_dim": 4}}}
model = HybridModel(ModelConfig.model_validate(tree), single_rank_groups())
print(model(torch.arange(8)[None], PackMeta.one_document_a_row(1, 8)).logits_BTV.shape)

from amfm.pretrain.config.fields import describe_fields

print([row.key for row in describe_fields()])
"""


def install(folder: Path, entry_points: str) -> dict[str, str]:
    """A package on the path with these entry points; the environment that finds it."""
    (folder / "halving_plugin.py").write_text(PLUGIN)
    (folder / "halving_mixer.py").write_text(MIXER)
    (folder / "older_plugin.py").write_text("from amfm.model.config.mixer_registry import MixerSpec\n")
    metadata = folder / "halving-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[amfm.mixers]\n{entry_points}\n")
    root = Path(__file__).parents[3]
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{root}"}


def python(code: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", code]


def test_a_package_registers_its_mixer_by_entry_point(tmp_path):
    environment = install(tmp_path, "halving = halving_plugin:SPEC")
    found = run_program(python(USE), env=environment, zygote=BARE)
    assert found.returncode == 0, found.stderr
    assert "torch.Size([1, 8, 8])" in found.stdout
    assert "'model.mixers.halving.share'" in found.stdout


@pytest.mark.parametrize(
    ("entry_points", "message"),
    [
        ("halving = no_such_module:SPEC", "cannot be loaded"),
        ("halving = older_plugin:SPEC", "mixer_registry'; a MixerSpec is a Kind of amfm.model.config.kinds now"),
        ("halving = halving_plugin:HalvingOptions", "must be a Kind"),
        ("one = halving_plugin:SPEC\ntwo = halving_plugin:SPEC", "registers a mixer 'halving', which there is already"),
    ],
)
def test_a_broken_package_is_named(entry_points, message, tmp_path):
    environment = install(tmp_path, entry_points)
    found = run_program(python("import amfm.model.config.schema"), env=environment, zygote=BARE)
    assert found.returncode != 0
    assert message in found.stderr and "of halving (group amfm.mixers)" in found.stderr


def test_a_mixer_has_one_spelling_in_a_pattern():
    assert parse_pattern("({gated_deltanet}-)x2 { retnet }").letters == ("G", "-", "G", "-", "{retnet}")
    assert parse_pattern("G{retnet}").canonical() == "G{retnet}"


@pytest.mark.parametrize(
    ("pattern", "mixers", "message"),
    [
        ("{nothing}", {}, "no mixer is called 'nothing'; there are M Mamba2, * or A attention,"),
        ("G", {}, "model.pattern has 'G' (gated deltanet) but model.mixers.gated_deltanet is missing"),
        (
            "{mom}",
            {"mom": {}},
            "model.mixers.mom.mixer=gated_deltanet reads model.mixers.gated_deltanet, which is missing",
        ),
        (
            "{mom}",
            {"mom": {"mixer": "window"}},
            "model.mixers.mom.mixer=window must be a linear mixer; use one of deltanet",
        ),
    ],
)
def test_missing_options_are_named(pattern, mixers, message):
    with pytest.raises(ValueError) as caught:
        check_model(small_config(pattern, mixers=mixers))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gated_deltanet", {"num_key_heads": 3}, "num_key_heads=3 must divide num_heads=4; use"),
        ("window", {"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4; use"),
        ("window", {"head_dim": 5}, "head_dim=5 must be even with positions: rope; add"),
        (
            "window",
            {"positions": "none", "yarn": {"factor": 4.0, "original_length": 8}},
            r"yarn\.factor=4\.0 is only read with positions: rope; remove yarn",
        ),
        (
            "mla",
            {"positions": "none", "yarn": {"factor": 4.0, "original_length": 8}},
            r"yarn\.factor=4\.0 is only read with positions: rope; remove yarn",
        ),
        (
            "window",
            {"yarn": {"factor": 4.0, "original_length": 8, "beta_slow": 40.0}},
            r"yarn\.beta_slow=40\.0 must be under beta_fast=32\.0; use 1 and 32",
        ),
        ("retnet", {"head_dim": 5}, "head_dim=5 must be even, because"),
        (
            "hedgehog",
            {"head_dim": 5, "positions": "rope_before"},
            "head_dim=5 must be even with positions: rope_before",
        ),
        (
            "hedgehog",
            {"positions": "rope_after"},
            "positions=rope_after makes weights negative, and this mixer divides",
        ),
        ("transnormer", {"rope_theta": 100.0}, "rope_theta=100.0 is only read with rotary positions"),
        ("gla", {"chunk_size": 48}, "chunk_size=48 must be a power of two"),
        ("hgrn2", {"chunk_size": 48}, "chunk_size=48 must be a power of two"),
        ("lightnet", {"chunk_size": 48}, "chunk_size=48 must be a power of two"),
        ("mom", {"top_k": 5}, "top_k=5 must be at most num_memories=4; lower it"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, change, message):
    with pytest.raises(ValueError, match=rf"model\.mixers\.{name}\.{message}"):
        check_model(small_config("M", mixers={name: sample_options(name) | change}))


def test_the_page_of_mixers_names_every_one_of_ours():
    root = Path(__file__).parents[3]
    page = (root / "docs/mixers.md").read_text() + (root / "examples/mixers/README.md").read_text()
    for spec in registered_kinds().values():
        assert f"| `{spec.symbol}` | `{spec.name}` |" in page, spec.name


def test_options_of_mixers_survive_pickling_and_hashing():
    config = small_config("G", mixers={"gated_deltanet": sample_options("gated_deltanet")})
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(config.model_copy())
