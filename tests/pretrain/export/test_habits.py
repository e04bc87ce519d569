"""Habits of transformers' users hold on our exports; what a native class does not do is said in the export's README.

The table is `HABITS`, entered by the modules of habits/. Those that need peft, trl or accelerate run where these are installed
(`make clients`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.inference.weights import write_weights
from tests.model.mixers.samples import sample_options
from tests.pretrain.export.exported_models import MODELS, random_weights
from tests.pretrain.export.habits import calling, generating, loading, training  # noqa: F401  (they enter the habits)
from tests.pretrain.export.habits.exported import HABITS, Exported, Habit
from tests.pretrain.export.test_import_huggingface import LATENT_MODELS
from tests.pretrain.tiny_run import MODEL

MIXERS = {name: sample_options(name) for name in ("gated_deltanet", "window", "kda", "mla", "retnet")}
OWN: dict[str, Any] = {
    **MODEL,
    "pattern": "M*EG-WK{mom}+",
    "multipliers": {"embedding": 2.0, "residual": 0.5, "logits": 0.3},
    "mixers": MIXERS | {"mom": sample_options("mom") | {"mixer": "retnet"}},
}
TARGETS: dict[str, dict[str, Any]] = {
    "own": OWN,
    **{name: MODELS[name] for name in MODELS if name != "own"},
    **LATENT_MODELS,
}
# Habits that the class of transformers does not have, and the words of the export's README on them.
_NATIVE = {
    "documents of a packed sequence are named by positions alone": "Documents packed into one sequence run into each other",
    "a misspelt argument is an error": "check their spelling",
}
_CONVOLVED = {"documents of a packed sequence are named by positions alone": "leave packing off"}
_UNCLASSIFIED = {"a classifier reads the last token of padded rows": "no class for sequence classification"}
MISSING: dict[str, dict[str, str]] = {
    "own": {},
    "nemotron_h": {
        **_NATIVE,
        **_UNCLASSIFIED,
        "generation begins with embeddings": "does not begin with `inputs_embeds`",
        "adapters on every linear layer learn and merge": "peft rejects adapters on `out_proj`",
    },
    "granitemoehybrid": _NATIVE | _UNCLASSIFIED,
    "qwen3_next": _NATIVE,
    "kimi_linear": _NATIVE | _UNCLASSIFIED,
    "lfm2": _UNCLASSIFIED | _NATIVE | _CONVOLVED,
    "lfm2_moe": _UNCLASSIFIED | _NATIVE | _CONVOLVED,
    "falcon_h1": _NATIVE | _UNCLASSIFIED,
    "gpt_oss": {"a misspelt argument is an error": "check their spelling"},
    "deepseek_v3": {"a misspelt argument is an error": "check their spelling"},
    "deepseek_v32": {"a misspelt argument is an error": "check their spelling"} | _UNCLASSIFIED,
}
# All habits are tried on these; of the others what their README names.
TRIED = ("own", "nemotron_h")


@pytest.fixture(scope="module")
def export(request: pytest.FixtureRequest, data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "weights").mkdir()
    write_weights(folder / "weights", random_weights(data, TARGETS[request.param]))
    report = export_checkpoint(folder / "weights", folder / "export", verify=False)
    assert report.target == request.param
    return Exported(report.target, report.path, folder, {"trust_remote_code": True} if report.target == "own" else {})


@pytest.mark.parametrize(
    ("export", "habit"),
    [
        pytest.param(target, h, id=f"{target}: {h.claim}", marks=[pytest.mark.slow] * (h.is_slow or target != "own"))
        for target in TARGETS
        for h in HABITS.values()
        if target in TRIED or h.claim in MISSING[target]
    ],
    indirect=["export"],
)
def test_habit(export: Exported, habit: Habit) -> None:
    lacking = [name for name in habit.needs if find_spec(name) is None]
    if lacking:
        pytest.skip(f"{lacking[0]} is not installed")
    words = MISSING[export.target].get(habit.claim)
    if words is None:
        habit.run(export)
        return
    assert words in (export.folder / "README.md").read_text()
    # What the class does then is its own affair.
    with pytest.raises((Exception, pytest.fail.Exception)):
        habit.run(export)


def test_at_least_forty_habits_are_tried_and_our_own_file_has_all() -> None:
    assert len(HABITS) >= 40 and not MISSING["own"]
