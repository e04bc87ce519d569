"""Fine-tuning an export with trl and a LoRA of peft, as docs/finetuning.md says: a script, see transformers_reference.py.

Adapters are put on the linear layers that peft can wrap and no others: it rejects `out_proj` and `conv1d` of Mamba2 by name. A
fresh adapter changes nothing, so its scores are those of the export; then it trains on the job's texts, is merged, saved
and loaded again. Result, besides the usual: `losses` of the steps, `modules` with adapters, `merged_difference` of the
log-probabilities of the merged folder and the adapter.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

# By the last part of their names; a class has some of them.
ADAPTABLE = (
    "in_proj",
    "in_proj_qkvz",
    "in_proj_ba",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "up_proj",
    "down_proj",
    "gate_proj",
)
STEPS = 4


def main() -> None:
    """Wrap, score, train, merge, save, load and score again."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    settings = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": job["remote_code"]}
    tokenizer = AutoTokenizer.from_pretrained(
        job["export"], local_files_only=True, trust_remote_code=job["remote_code"]
    )
    model = AutoModelForCausalLM.from_pretrained(job["export"], **settings)
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    # Our own modelling file takes an adapter on every linear layer.
    modules = ["all-linear"] if job["remote_code"] else sorted(linear & set(ADAPTABLE))
    targets = modules[0] if job["remote_code"] else modules
    adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    before = score(adapted, job["tokens"])
    continuation = generate(adapted, job["tokens"], job["num_new"])
    trainer = SFTTrainer(
        adapted,
        train_dataset=Dataset.from_list([{"text": text} for text in job["texts"][:1] * 8]),
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=str(folder / "trained"),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            max_length=128,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            # trl would ask granitemoehybrid for a field that its class lacks; with adapters routers stay anyway.
            router_aux_loss_coef=0.0,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    after = score(adapted, job["tokens"])
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    again = score(AutoModelForCausalLM.from_pretrained(folder / "merged", **settings), job["tokens"])
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the losses of {STEPS} steps on one text do not fall: {losses}")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("peft", "trl")]
    result = {
        "version": ", ".join(versions),
        "text_lengths": [len(tokenizer(text)["input_ids"]) for text in job["texts"]],
        "log_probabilities": before,
        "continuation": continuation,
        "losses": losses,
        "modules": modules,
        "merged_difference": max(abs(left - right) for left, right in zip(after, again, strict=True)),
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def score(model: Any, tokens: list[int]) -> list[float]:
    """Log-probability of each id but the first given those before it."""
    import torch

    with torch.no_grad():
        scores = model.eval()(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)
    return [float(scores[place, token]) for place, token in enumerate(tokens[1:])]


def generate(model: Any, tokens: list[int], num_new: int) -> list[int]:
    """Continue with the most likely id, without a cache."""
    import torch

    ids = list(tokens)
    with torch.no_grad():
        for _ in range(num_new):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(tokens) :]


if __name__ == "__main__":
    main()
