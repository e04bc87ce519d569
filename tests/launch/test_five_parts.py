"""A mixer, a router, an optimizer, a loss and a hook of one's own: in a process, in a folder on two ranks, and in an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import amfm
from amfm.launch.cli import run as run_verb
from tests.helpers.registered import nothing_stays_registered  # noqa: F401 a fixture
from tests.launch.test_modules import page_blocks
from tests.launch.test_own_parts import mixer_program
from tests.pretrain.tiny_run import MODEL, tiny_config, tiny_data

FORMS = """
import math

import torch
from torch import nn

from amfm.pretrain.export.modeling_template.linear_mixers_amfm import LinearMixer, no_decay


class Halving(LinearMixer):
    has_norm = False

    def rows(self, parts, positions_BT):
        q, k, v = (self.by_head(parts[name]) for name in ("q", "k", "v"))
        return q, k, v, no_decay(k) + math.log(self.options["share"])

    def output(self, o_BTHV, parts):
        return o_BTHV.flatten(-2)


def relu(logits_RE, section):
    weights_RK, ids_RK = logits_RE.relu().topk(section["top_k"], dim=-1)
    return ids_RK.masked_fill(weights_RK == 0, section["num_experts"]), weights_RK


class Smooth(nn.Linear):
    def __init__(self, config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden_BTD):
        return super().forward(hidden_BTD).float().log_softmax(-1)
"""
HEAD = '''
import torch
from pydantic import Field
from torch import nn

import amfm
from amfm.kernels.linear_cross_entropy.op import CrossEntropy
from amfm.model.config.options import MixerOptions
from amfm.model.loss import Head, HeadOutput


class SmoothOptions(MixerOptions):
    """Cross-entropy with smoothed labels."""

    smoothing: float = Field(0.1, ge=0, lt=1, description="Of the labels.")


class SmoothHead(Head):
    def __init__(self, options, config):
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden_BTD, labels_BT=None):
        log_p = (hidden_BTD @ self.weight.T).float().log_softmax(-1)
        if labels_BT is None:
            return HeadOutput(log_p)
        is_label = labels_BT != -100
        picked = -log_p.gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
        smoothed = picked.lerp(-log_p.mean(-1), self.options.smoothing)
        smoothed, picked = (torch.where(is_label, values, 0.0) for values in (smoothed, picked))
        nll = picked.detach().float()
        return HeadOutput(None, CrossEntropy(smoothed.sum(), nll.sum(), nll.flatten()))


amfm.register(amfm.Kind("smooth", SmoothHead, SmoothOptions, mixes="logits", modeling="my_parts.forms_my_parts:Smooth"))
'''
OPTIMIZER = '''
import amfm
from amfm.model.config.section import Section


class DescentOptions(Section):
    """None."""


def descend(weight, gradient, moments, step, group, options):
    moments["momentum"].mul_(0.9).add_(gradient)
    weight.sub_(moments["momentum"], alpha=group["lr"])


amfm.register(amfm.OptimizerSpec("descent", descend, DescentOptions, 1))
'''
HOOK = '''

class NoOptions(HookOptions):
    """None."""


amfm.register(amfm.HookSpec("stream_norms", lambda options, run: StreamNorms(run), NoOptions, interface=2))
'''


def parts() -> dict[str, str]:
    """The five parts by module; mixer, router and hook are those of docs/hooks.md, with the forms that an export carries."""
    mixer, (router,), (hook, *_) = (
        mixer_program(),
        page_blocks("docs/hooks.md", "Routers"),
        page_blocks("docs/hooks.md", "Hooks"),
    )
    form = ', modeling="my_parts.forms_my_parts:'
    return {
        "mixer": mixer.replace("HalvingMixer, HalvingOptions)", f'HalvingMixer, HalvingOptions{form}Halving")'),
        "router": router.replace('losses=("relu_l1",)', f'losses=("relu_l1",){form}relu"'),
        "optimizer": OPTIMIZER,
        "head": HEAD,
        "hook": "from amfm.pretrain.config.hook_registry import HookOptions\n" + hook + HOOK,
    }


@pytest.mark.slow
def test_five_parts_train_alike_in_a_process_and_on_two_ranks_and_leave_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    monkeypatch.chdir(tmp_path)
    tree = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "process", train__steps=5).model_dump(
        mode="json", exclude_unset=True
    )
    tree["model"] = {
        **{name: MODEL[name] for name in ("vocab_size", "hidden_size")},
        "pattern": "{halving}E{halving}E",
        "mixers": {"halving": {"num_heads": 4, "head_dim": 8}, "smooth": {"smoothing": 0.05}},
        "head": "smooth",
        "moe": {"num_experts": 4, "top_k": 3, "expert_hidden_size": 24, "router": "relu"},
    }
    tree["optimizer"] = {"kind": "descent", "learning_rate": 0.3}
    tree["hooks"] = {"stream_norms": {}}
    folder = tmp_path / "my_parts"
    folder.mkdir()
    (folder / "forms_my_parts.py").write_text(FORMS)
    for name, program in parts().items():
        (folder / f"{name}.py").write_text(program)
    (folder / "__init__.py").write_text("".join(f"from my_parts import {name}\n" for name in parts()))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree | {"plugins": ["my_parts"]}))
    two = ["train", "run.yaml", "run.dir=folder", "--nproc", "2", "parallel.expert=2"]
    assert run_verb(two) == 0, capfd.readouterr().err
    assert run_verb(["--plugins", "my_parts", "export", "folder", "exported"]) == 0, capfd.readouterr().err
    for program in parts().values():
        exec(compile(program, "a cell", "exec"), {"__name__": __name__})
    record = amfm.train(amfm.load(tree))
    lines = [json.loads(line) for line in (tmp_path / "folder" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(record.series("loss")[1], rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"] and "relu_l1" in lines[0]["auxiliary"] and "block_rms" in lines[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True).eval()
    ours = amfm.load_model(tmp_path / "folder").model.eval()
    tokens = torch.randint(MODEL["vocab_size"], (1, 24))
    found = theirs(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(found, ours(tokens).logits_BTV.log_softmax(-1), rtol=1e-4, atol=1e-4)
