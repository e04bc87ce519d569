"""Other programs on our exports: every class that we write has a model, and a row measured again leaves the others."""

from dataclasses import replace
from pathlib import Path

import pytest
from amfm_clients.check import CLIENTS, ClientReport

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import explain_unfit
from benchmarks.clients.bench import ClientBench, choose_models, to_page
from benchmarks.clients.models import MODELS
from benchmarks.clients.page import merge, read_page, to_markdown
from benchmarks.command import run

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "clients.md"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_fits_its_class(name):
    config = ModelConfig.model_validate({"vocab_size": 512, "hidden_size": 64, **MODELS[name]})
    assert explain_unfit(config, name.split()[0]) == []


def test_the_documented_page_has_every_model_and_comes_back_as_it_was():
    text = PAGE.read_text(encoding="utf-8")
    page = read_page(text)
    assert to_markdown(page) == text
    assert {name: row.pattern for name, row in page.rows.items()} == {
        name: model["pattern"] for name, model in MODELS.items()
    }


def test_a_row_that_is_measured_again_leaves_the_others():
    old = read_page(PAGE.read_text(encoding="utf-8"))
    reports = {client: ClientReport(client, "equal", f"{client} 1", 2e-4) for client in CLIENTS}
    reports["mlx-lm"] = ClientReport("mlx-lm", "refused", expected="it has no windows", error="ValueError: no")
    bench = ClientBench({"gpt_oss": reports}, {}, 120.0, 60.0)
    assert bench.is_as_expected()
    new = to_page(bench, "2 cores of a machine", "make clients ONLY='gpt_oss'")
    page = merge(old, new, list(MODELS))
    assert [*page.rows] == [*MODELS] and page.tasks == old.tasks
    assert page.rows["gpt_oss"].words["llama.cpp"] == "equal, 2.0e-04"
    assert page.rows["gpt_oss"].notes == {"mlx-lm": "it has no windows. Its words: `ValueError: no`"}
    assert {name: row for name, row in page.rows.items() if name != "gpt_oss"} == {
        name: row for name, row in old.rows.items() if name != "gpt_oss"
    }
    assert page.runs[-1] == (
        "`make clients ONLY='gpt_oss'` on 2 cores of a machine: 2.0 minutes, 1.0 of a processor; rows of gpt_oss."
    )
    # Notes are numbered in the order of rows; the same command's paragraph is replaced.
    assert read_page(to_markdown(page)) == page
    assert merge(page, replace(new, runs=new.runs), list(MODELS)).runs == page.runs


def test_a_class_without_a_model_is_refused(capsys):
    from benchmarks.clients.__main__ import clients

    assert choose_models(["falcon_h1"]) == ["falcon_h1", "falcon_h1 with groups and a scale"]
    assert choose_models([]) == list(MODELS)
    assert run(clients, ["--readers", "x", "--vllm", "x", "--only", "bert"]) == 2
    assert "'bert' is not a class of the page; use one of nemotron_h" in capsys.readouterr().err


def test_a_page_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="does not begin with"):
        read_page("# Something else\n\ntext\n")
