"""How users load, save, place and change a model."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import torch
from torch import nn

from tests.pretrain.export.habits.exported import Exported, assert_near, habit, tokens


@habit(slow=True)
def the_lines_of_the_readme_run(export: Exported) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (export.folder / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=export.folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "[y/N]" not in done.stdout + done.stderr and done.stdout.startswith("Once upon a time")


@habit()
def the_tokenizer_asks_nothing(export: Exported) -> None:
    assert export.tokenizer()("Once upon a time")["input_ids"]


@habit()
def saved_and_loaded_logits_are_equal(export: Exported) -> None:
    export.model().save_pretrained(export.place("saved"))
    again = Exported(export.target, export.place("saved"), export.scratch, export.arguments).model()
    assert torch.equal(again(tokens()).logits, export.model()(tokens()).logits)


@habit(slow=True)
def saved_in_shards_the_model_loads(export: Exported) -> None:
    export.model().save_pretrained(export.place("shards"), max_shard_size="20KB")
    assert len(list(export.place("shards").glob("model-*.safetensors"))) > 2
    again = Exported(export.target, export.place("shards"), export.scratch, export.arguments).model()
    assert torch.equal(again(tokens()).logits, export.model()(tokens()).logits)


@habit(slow=True)
def the_base_model_gives_the_stream_that_the_head_reads(export: Exported) -> None:
    base = export.load("AutoModel").eval()
    hidden = base(tokens()).last_hidden_state
    model = export.model()
    assert_near(model.get_output_embeddings()(hidden), model(tokens()).logits)
    assert torch.equal(model.base_model(tokens()).last_hidden_state, hidden)


@habit()
def a_classifier_reads_the_last_token_of_padded_rows(export: Exported) -> None:
    model = export.load("AutoModelForSequenceClassification", num_labels=3).eval()
    ids = tokens(2, 9)
    padded = torch.cat([ids[:, :6], torch.full((2, 3), model.config.pad_token_id)], dim=1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 3)], dim=1).long()
    assert model(ids).logits.shape == (2, 3)
    assert_near(model(padded, attention_mask=mask).logits, model(ids[:, :6]).logits)
    assert model(ids, labels=torch.tensor([0, 2])).loss.isfinite()


@habit(slow=True)
def bf16_keeps_what_rounding_would_change_and_stays_near(export: Exported) -> None:
    model = export.load(dtype=torch.bfloat16).eval()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if re.search(r"(router|gate)\.weight$", name))
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    whole, rounded = (m(tokens()).logits.float().log_softmax(-1) for m in (export.model(), model))
    assert float((whole - rounded).abs().mean()) < 2e-2


@habit("accelerate")
def device_map_auto_places_the_model(export: Exported) -> None:
    assert torch.equal(export.load(device_map="auto").eval()(tokens()).logits, export.model()(tokens()).logits)


@habit("accelerate")
def weights_on_the_disk_are_read_when_their_block_runs(export: Exported) -> None:
    from accelerate import disk_offload

    model = disk_offload(export.fresh(), export.place("offload"), execution_device=torch.device("cpu"))
    assert_near(model(tokens()).logits, export.model()(tokens()).logits)
    assert_near(model.generate(tokens(1, 5), max_new_tokens=3, do_sample=False), generate(export))


@habit("accelerate")
def weights_in_the_memory_of_the_host_are_read_when_their_block_runs(export: Exported) -> None:
    from accelerate import cpu_offload

    model = cpu_offload(export.fresh(), execution_device=torch.device("cpu"))
    assert_near(model(tokens()).logits, export.model()(tokens()).logits)


def generate(export: Exported) -> Any:
    return export.model().generate(tokens(1, 5), max_new_tokens=3, do_sample=False)


@habit("accelerate")
def a_model_made_without_memory_takes_its_weights(export: Exported) -> None:
    loaded = export.model()
    with torch.device("meta"):
        model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    assert torch.equal(model.eval()(tokens()).logits, loaded(tokens()).logits)


@habit(slow=True)
def a_fresh_model_begins_near_a_uniform_guess(export: Exported) -> None:
    torch.manual_seed(0)
    model = type(export.model())(export.model().config)
    loss = model(tokens(4, 20), labels=tokens(4, 20)).loss
    assert abs(float(loss.detach()) - torch.tensor(float(model.config.vocab_size)).log()) < 0.5
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@habit(slow=True)
def more_tokens_leave_the_logits_of_the_others(export: Exported) -> None:
    model = export.fresh()
    before = model(tokens()).logits
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 8)
    after = model(tokens()).logits
    assert after.shape[-1] == size + 8 and model.config.vocab_size == size + 8
    assert_near(after[..., :size], before)
    assert model(torch.full((1, 3), size + 7), labels=torch.full((1, 3), size + 7)).loss.isfinite()


@habit(slow=True)
def weights_of_another_shape_are_made_anew_where_allowed(export: Exported) -> None:
    size = export.model().config.vocab_size + 16
    model = export.load(vocab_size=size, ignore_mismatched_sizes=True).eval()
    assert model(tokens()).logits.shape[-1] == size and model(tokens()).logits.isfinite().all()


@habit(slow=True)
def a_pipeline_continues_a_text(export: Exported) -> None:
    from transformers import pipeline

    made = pipeline("text-generation", model=export.fresh(), tokenizer=export.tokenizer(), device="cpu")
    (found,) = made("Once upon a time", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("Once upon a time")


@habit(slow=True)
def compile_gives_one_graph(export: Exported) -> None:
    # Inductor's code is not the point, and would take minutes on a processor.
    compiled = torch.compile(export.fresh(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_near(compiled(tokens(2, 6), use_cache=False).logits, export.model()(tokens(2, 6)).logits)


@habit(slow=True)
def torch_export_takes_the_model_with_a_mask(export: Exported) -> None:
    class Logits(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(ids, attention_mask=mask, use_cache=False).logits
            return found

    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        program = torch.export.export(Logits(export.fresh()), (ids, mask))
        assert_near(program.module()(ids, mask), export.model()(ids).logits)


@habit()
def eager_and_sdpa_attention_are_equal(export: Exported) -> None:
    eager = export.load(attn_implementation="eager").eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    for given in (None, mask):
        found, expected = (m(tokens(), attention_mask=given).logits for m in (eager, export.model()))
        assert_near(found[:, 4:], expected[:, 4:])
