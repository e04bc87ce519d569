"""A researcher's way: a model from a dict, a single layer, an own loop, and a run that was copied elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import amfm
from amfm.kernels import delta_rule, gated_linear_attention
from amfm.launch import modules
from amfm.model.block import Block
from amfm.model.config.kinds import BUILT_IN
from amfm.model.mixers.interface import PlainMixer
from amfm.model.packing import PackMeta
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.inference.generate import Sampling
from tests.helpers.patience import PATIENCE_SECONDS
from tests.model.mixers.samples import sample_options
from tests.pretrain.tiny_run import MODEL, tiny_config, tiny_data
from tests.test_page_blocks import FENCE, ROOT


def page_blocks(page: str, heading: str) -> list[str]:
    """The Python programs of one section of a page."""
    section = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = [match["code"] for match in FENCE.finditer(section) if match["language"] == "python"]
    assert found, f"{page} has no program in {heading!r}"
    return found


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("docs/python.md", "Models as torch modules"),
        ("docs/python.md", "A layer alone"),
        ("docs/kernels.md", "From Python"),
    ],
)
def test_programs_of_the_pages_run(page: str, heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    for code in page_blocks(page, heading):
        exec(compile(code, page, "exec"), {})
    if "modules" in heading:
        assert "RMSNorm(weight=[64])" in (shown := capsys.readouterr().out) and "parameters" in shown


def test_the_loop_of_the_page_trains_and_its_model_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    (code,) = page_blocks("docs/python.md", "Your own loop")
    assert len([line for line in code.splitlines() if line.strip()]) <= 18, "fifteen lines and three of imports"
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("configs/tiny_cpu.yaml", "run.yaml"), "the loop", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.1
    with pytest.raises(ValueError, match="own_loop"):
        amfm.save_model(amfm.build(config.model), "runs/own_loop", config.data.text_store())


def test_a_model_is_built_from_a_dict_a_file_or_a_config_alike(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    one = amfm.build(MODEL, seed=3)
    others = [amfm.build(tmp_path / "model.yaml", 3), amfm.build(one.config, 3), amfm.build({"model": MODEL}, 3)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.head_weight(), amfm.build(MODEL, 4).head_weight())
    with pytest.raises(amfm.ConfigError, match="did you mean hidden_size"):
        amfm.build({**MODEL, "hidden_siz": 32})


def test_without_a_layout_each_row_is_one_document() -> None:
    model = amfm.build(MODEL)
    tokens = torch.randint(448, (2, 9))
    meta = PackMeta.one_document_a_row(2, 9)
    assert torch.equal(model(tokens).logits_BTV, model(tokens, meta).logits_BTV)
    given = model(tokens, labels=tokens).loss
    assert torch.equal(given.total, model(tokens, meta, tokens).loss.total)
    state = model(tokens[:, :5], state=model.eval().empty_state(2)).state
    torch.testing.assert_close(model(tokens[:, 5:], state=state).logits_BTV, model(tokens).logits_BTV[:, 5:])


@pytest.mark.parametrize("kind", [kind.name for kind in BUILT_IN])
def test_a_layer_of_each_kind_has_the_values_of_a_first_block(kind: str) -> None:
    sections = {"mamba": MODEL["mamba"], "attention": MODEL["attention"], "moe": MODEL["moe"]}
    options = {**sections, "feed_forward": MODEL["feed_forward"]}.get(kind) or sample_options(kind)
    others = {"gated_deltanet": sample_options("gated_deltanet")} if kind == "mom" else None
    layer = amfm.layers.build(kind, 32, seed=2, mixers=others, **options)
    y = layer(torch.randn(2, 7, 32))
    assert y.shape == (2, 7, 32) and y.isfinite().all() and y.abs().max() < 100
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    if kind in sections:
        symbol = {"mamba": "M", "attention": "*", "moe": "E"}[kind]
        block = amfm.build({**MODEL, "pattern": symbol}, seed=2).blocks[0]
        assert all(torch.equal(a, b) for a, b in zip(layer.mixer.parameters(), block.mixer.parameters(), strict=True))


def test_a_layer_of_an_unknown_kind_or_option_is_refused() -> None:
    with pytest.raises(amfm.ConfigError, match=r"there is no kind 'gated_delta'.*gated_deltanet"):
        amfm.layers.build("gated_delta", 32)
    with pytest.raises(amfm.ConfigError, match=r"did you mean mixers\.gated_deltanet\.num_heads"):
        amfm.layers.build("gated_deltanet", 32, num_head=2, head_dim=16)


class Causal(nn.Module):
    """The mean of all tokens so far, which is causal and reads other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


def test_a_plain_module_in_the_place_of_a_mixer_trains_and_decodes() -> None:
    model = amfm.build(MODEL)
    block = model.blocks[1]
    assert isinstance(block, Block)
    block.mixer = Causal()
    assert isinstance(block.mixer, PlainMixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, losses = torch.randint(448, (2, 12)), []
    for _ in range(6):
        output = model(tokens, labels=tokens)
        optimizer.zero_grad()
        output.loss.total.backward()
        optimizer.step()
        model.update_expert_bias(output.expert_counts)
        losses.append(float(output.loss.total.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    whole, state, pieces = model(tokens).logits_BTV, model.empty_state(2), []
    for piece in tokens.split(5, dim=1):
        output = model(piece, state=state)
        state = output.state
        pieces.append(output.logits_BTV)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained, exported and copied, whose store is gone."""
    folder = tmp_path_factory.mktemp("copied")
    config = tiny_config(tiny_data(folder / "data"), folder / "run", model__pattern="M*-")
    amfm.train(config)
    shutil.copytree(folder / "run", folder / "laptop")
    export_checkpoint(folder / "run", folder / "export", target="own", verify=False)
    shutil.rmtree(folder / "data")
    return folder


@pytest.mark.parametrize("place", ["laptop", "laptop/checkpoints/step-00000004", "export"])
def test_a_copied_run_a_checkpoint_and_an_export_load_without_the_store(
    copied: Path, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    model = amfm.load_model(os.path.relpath(copied / place))
    texts = model.generate(["some", "other"], 5, Sampling(seed=1))
    assert texts == [model.generate(prompt, 5, Sampling(seed=1)) for prompt in ("some", "other")]


def test_a_run_whose_tokenizer_is_another_is_refused(copied: Path, tmp_path: Path) -> None:
    shutil.copytree(copied / "laptop", tmp_path / "run")
    other = tiny_data(tmp_path / "other").text_store()
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    with pytest.raises(ValueError, match="has no tokenizer in its run directory"):
        amfm.load_model(tmp_path / "run")
    (tmp_path / "run" / "tokenizer").mkdir()
    content = bytearray(next(Path(other).glob("tokenizer.model")).read_bytes())
    (tmp_path / "run" / "tokenizer" / "tokenizer.model").write_bytes(content + b"\x00")
    with pytest.raises((RuntimeError, ValueError)):
        amfm.load_model(tmp_path / "run")


OUTSIDE = """
import torch
from torch import Tensor
import amfm
import amfm.layers
from amfm.kernels import delta_rule, rms_norm

model = amfm.build({"pattern": "-"}, seed=1)
layer: torch.nn.Module = amfm.layers.build("mamba", 64, num_heads=2)
logits: Tensor | None = model(torch.zeros(1, 2, dtype=torch.int64)).logits_BTV
texts: list[str] = amfm.load_model("run").generate(["a"])
text: str = amfm.load_model("run").generate("a")
config = amfm.load("run.yaml")
loss: float | None = amfm.train(config).last("loss")
y: Tensor = rms_norm(torch.zeros(2), torch.ones(2), 1e-5)
o: Tensor = delta_rule(y, y, y, y).o_BTHV
"""


@pytest.mark.slow
def test_a_program_outside_is_typed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OUTSIDE)
    command = [sys.executable, "-m", "mypy", "--strict", "own.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout


def test_names_that_are_not_there_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match=r"amfm.*no attribute 'bild'"):
        _ = amfm.bild  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from amfm.kernels import no_such_operation  # type: ignore[attr-defined]  # noqa: F401
    assert modules.build is amfm.build


def test_a_wrong_shape_names_the_tensor_that_differs_and_of_two_both() -> None:
    q, k, v, g, beta = (torch.randn(2, 100, 4, 8) for _ in range(5))
    g, beta = -g[..., 0].abs(), beta[..., 0]
    with pytest.raises(ValueError, match=r"^v must have shape \[2, 100, 4, any\]; got \[2, 50, 4, 8\]"):
        gated_linear_attention(q, k, v[:, :50], g)
    with pytest.raises(ValueError, match=r"^v_BTNHV must have shape \[2, 100.*; got \[2, 50, 1, 4, 8\]"):
        delta_rule(q, k, v[:, :50], beta, g)
    for wrong in (lambda: gated_linear_attention(q[..., :7], k, v, g), lambda: delta_rule(q[..., :7], k, v, beta, g)):
        with pytest.raises(ValueError, match=r"^k\w* must have shape .*, which does not fit q"):
            wrong()


def test_the_delta_rule_takes_one_step_per_token_without_its_dim() -> None:
    q, k, v = (torch.randn(2, 9, 4, 8) for _ in range(3))
    beta, g = torch.rand(2, 9, 4), -torch.rand(2, 9, 4)
    one = delta_rule(q, k, v, beta, g)
    other = delta_rule(q, k[:, :, None], v[:, :, None], beta[:, :, None], g)
    assert torch.equal(one.o_BTHV, other.o_BTHV) and torch.equal(one.final_state_BHKV, other.final_state_BHKV)
