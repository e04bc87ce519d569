"""Our modelling file passes the tests that transformers holds its own models to, but for those that are named here with a reason.

`AMFM_TRANSFORMERS_CHECKOUT` names a checkout of transformers, of the version that is installed; without it the test is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import TokenIds, huggingface_config
from tests.model.mixers.samples import sample_options
from tests.pretrain.tiny_run import MODEL

CHECKOUT = os.environ.get("AMFM_TRANSFORMERS_CHECKOUT")
SUITE = Path(__file__).with_name("suite_of_transformers.py")
MIXERS = ("gated_deltanet", "window", "kda", "mla", "gla", "mamba1")
# Tests that our file does not pass, and why.
REASONS: dict[str, str] = {
    "test_num_layers_is_small": "the pattern has one block of each kind, and their limit is two layers",
}


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="AMFM_TRANSFORMERS_CHECKOUT names no checkout of transformers")
def test_no_test_of_transformers_fails_without_a_reason(tmp_path: Path) -> None:
    assert CHECKOUT is not None
    mixers = {name: sample_options(name) for name in MIXERS}
    fields = MODEL | {"pattern": "M*EG-WK{gla}{mamba1}+", "vocab_size": 99, "mixers": mixers}
    config = huggingface_config(
        ModelConfig.model_validate(fields), "own", TokenIds(1, 2, 3), max_position_embeddings=64
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "test_suite.py").write_text(SUITE.read_text())
    source = Path(__file__).parents[3] / "src"
    found = tmp_path / "found.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={found}", str(tmp_path)],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": f"{source}:{CHECKOUT}", "AMFM_SUITE_CONFIG": str(tmp_path)},
        check=False,
    )
    cases = list(ElementTree.parse(found).iter("testcase"))
    bad = {case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None}
    passed = [case for case in cases if not len(case)]
    assert len(passed) >= 80, f"{len(passed)} of {len(cases)} tests ran and passed"
    assert bad == set(REASONS), f"failed without a reason {bad - set(REASONS)}, passed {set(REASONS) - bad}"
