"""Experts choose tokens as in the paper, and what a block computes with that is the same on expert ranks and in an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from amfm_expert_choice import SPEC, Options, choose
from amfm_expert_choice.forms_expert_choice import choose as form

import amfm
from amfm.model.config.routers import RouterInput
from amfm.model.packing import PackMeta
from amfm.pretrain.checks.check_run import check_run
from tests.helpers.examples import amfm as run_amfm
from tests.helpers.examples import install_example
from tests.helpers.registered import nothing_stays_registered  # noqa: F401 a fixture
from tests.pretrain.tiny_run import MODEL, tiny_config, tiny_data

MOE = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 24, "router": "expert_choice"}


def moe_model() -> torch.nn.Module:
    amfm.register(SPEC)
    return amfm.build({**MODEL, "pattern": "E", "moe": MOE}, seed=3)


def test_an_expert_takes_the_tokens_that_score_it_highest_and_padding_is_none() -> None:
    logits = torch.randn(12, 4)
    is_padding = torch.arange(12) >= 10
    moe = moe_model().config.moe
    given = RouterInput(logits, moe, None, 10, is_padding, torch.tensor(0), is_training=True)
    found = choose(given, Options())
    for expert in range(4):
        best = logits.softmax(-1)[:10, expert].topk(5).indices
        assert set((found.expert_ids_RK[:, expert] == expert).nonzero().flatten().tolist()) == set(best.tolist())
    assert found.most == 20


def test_a_block_adds_up_the_chosen_experts_and_gradients_reach_the_router() -> None:
    mixer = moe_model().blocks[0].mixer
    x = torch.randn(2, 6, 32)
    output = mixer(x, PackMeta.one_document_a_row(2, 6))
    scores = mixer._logits(x).flatten(0, 1).softmax(-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(0, scores.topk(6, dim=0).indices, True)
    rows = x.flatten(0, 1)
    dense = torch.zeros_like(rows)
    for expert in range(4):
        inner = (rows @ mixer.experts.up[expert].T).relu().square()
        dense += (scores * chosen)[:, expert, None] * (inner @ mixer.experts.down[expert].T)
    torch.testing.assert_close(output.y_BTD.flatten(0, 1), dense)
    assert output.expert_counts_E.tolist() == [6, 6, 6, 6]
    output.y_BTD.square().sum().backward()
    assert mixer.router.weight.grad.abs().sum() > 0


def test_context_ranks_and_settings_that_it_does_not_read_are_rejected(tmp_path: Path) -> None:
    amfm.register(SPEC)
    config = tiny_config(tiny_data(tmp_path), tmp_path / "run", model__moe=MOE, parallel__context=2)
    with pytest.raises(amfm.ConfigError, match="compares the tokens of whole rows"):
        check_run(config, 2)
    with pytest.raises(ValueError, match="expert_bias=true is not read by the router expert_choice"):
        amfm.build({**MODEL, "moe": {**MOE, "expert_bias": True}})


def test_outside_of_training_a_token_takes_its_best_experts_and_the_form_of_exports_does_the_same() -> None:
    logits = torch.randn(12, 4)
    given = RouterInput(logits, moe_model().config.moe, None, 12, None, torch.tensor(0), is_training=False)
    found = choose(given, Options())
    ids, weights = form(logits, MOE)
    assert torch.equal(ids, found.expert_ids_RK) and torch.equal(weights, found.weights_RK)
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, ids))
    assert torch.equal(ids, logits.argsort(descending=True)[:, :2])


@pytest.mark.slow
def test_expert_ranks_train_as_one_rank_does_and_the_package_is_named_where_it_is_not(tmp_path: Path) -> None:
    packages = install_example("expert_choice", tmp_path / "packages")
    tree = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "one", train__steps=5).model_dump(
        mode="json", exclude_unset=True
    )
    tree["model"]["moe"] = MOE
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))

    def run(*words: str) -> None:
        done = run_amfm(*words, packages=packages, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    def losses(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    run("train", "run.yaml")
    run("train", "run.yaml", "run.dir=two", "--nproc", "2", "parallel.expert=2")
    assert losses("two") == pytest.approx(losses("one"), rel=1e-6) and losses("one")[-1] < losses("one")[0]
    (manifest,) = (tmp_path / "one" / "checkpoints").glob("*5/manifest.json")
    assert json.loads(manifest.read_text())["packages"] == {"model.moe.router": "amfm-expert-choice 1.0"}
    missing = run_amfm("evaluate", "one", packages=[], cwd=tmp_path)
    assert (
        missing.returncode == 2 and "the saved moe.router expert_choice is of amfm-expert-choice 1.0" in missing.stderr
    )
