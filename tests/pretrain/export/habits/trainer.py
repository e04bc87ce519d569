"""Steps of transformers' Trainer and trl's on an export, and of two data-parallel ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.export.habits.exported import Exported, tokens

TEXT = "Once upon a time a man said what a word is worth, and nobody knew."
QUIET: dict[str, Any] = {
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "bf16": False,
}


@dataclass(frozen=True)
class Trained:
    """The loss that Trainer logged, and the weights after its step."""

    loss: float
    weights: dict[str, Tensor]


def train_with_pieces(
    export: Exported, *, pieces: int, rows: list[dict[str, list[int]]] | None = None, collate: Any = None
) -> Trained:
    """One step of plain gradient descent on 8 rows in this many pieces, by Trainer."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    ids = tokens(8, 10).tolist()
    rows = rows or [
        {"input_ids": row, "labels": [-100] * (number % 4) + row[number % 4 :]} for number, row in enumerate(ids)
    ]
    settings = TrainingArguments(
        output_dir=str(export.place("trainer")),
        max_steps=1,
        per_device_train_batch_size=len(rows) // pieces,
        gradient_accumulation_steps=pieces,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **QUIET,
    )
    model = export.fresh()
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=collate or default_data_collator)
    trainer.train()
    (loss,) = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Trained(loss, {name: weight.detach() for name, weight in model.named_parameters()})


RANK = """
import os, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=sys.argv[2] == "True")
wrapped = torch.nn.parallel.DistributedDataParallel(model.train())
ids = torch.load(sys.argv[3])[rank : rank + 1]
for _ in range(2):
    # A parameter that took no part would stop the second pass.
    model.zero_grad()
    wrapped(input_ids=ids, labels=ids).loss.backward()
if rank == 0:
    save_file({name: p.grad.contiguous() for name, p in model.named_parameters()}, sys.argv[4])
torch.distributed.destroy_process_group()
"""


def gradients_of_two_ranks(export: Exported) -> dict[str, Tensor]:
    """Gradients of a row on each of two ranks of DistributedDataParallel."""
    rows, found = export.place("rows.pt"), export.place("gradients.safetensors")
    torch.save(tokens(2), rows)
    arguments = [sys.executable, "-c", RANK, str(export.folder), str(bool(export.arguments)), str(rows), str(found)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29717", "WORLD_SIZE": "2"}
    ranks = [subprocess.Popen(arguments, env=os.environ | shared | {"RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait(timeout=PATIENCE_SECONDS) for rank in ranks] == [0, 0]
    return load_file(found)


def losses_of_sft(export: Exported, **settings: Any) -> list[float]:
    """Losses of four steps of trl's SFTTrainer on one text, with its defaults and these settings."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    usual = {"max_length": 64, "router_aux_loss_coef": 0.0}
    args = SFTConfig(
        output_dir=str(export.place("sft")),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        **(QUIET | usual | settings),
    )
    data = Dataset.from_list([{"text": TEXT}] * 8)
    trainer = SFTTrainer(export.fresh(), args=args, train_dataset=data, processing_class=tokenizer(export))
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def losses_of_dpo(export: Exported) -> list[float]:
    """Losses of four steps of trl's DPOTrainer on one preference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(export.place("dpo")),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=64,
        **QUIET,
    )
    data = Dataset.from_list([{"prompt": "Once upon", "chosen": " a time", "rejected": " nothing"}] * 8)
    trainer = DPOTrainer(
        export.fresh(), ref_model=export.fresh(), args=args, train_dataset=data, processing_class=tokenizer(export)
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def steps_of_grpo(export: Exported) -> int:
    """Two steps of trl's GRPOTrainer, which generates, scores by length and trains; the number that it counted."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(export.place("grpo")),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        learning_rate=1e-3,
        **QUIET,
    )
    data = Dataset.from_list([{"prompt": "Once upon a time"}, {"prompt": "A word"}] * 4)
    trainer = GRPOTrainer(
        export.fresh(),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=args,
        train_dataset=data,
        processing_class=tokenizer(export),
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = [name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])]
    assert moved, "no weight moved"
    return int(trainer.state.global_step)


def tokenizer(export: Exported) -> Any:
    """The export's tokenizer, which pads with the end of a text where it has no padding."""
    found = export.tokenizer()
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found
