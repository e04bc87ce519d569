"""The verification of an export, run as a script in a fresh process: load the folder as a user would and compare.

It imports nothing of ours. Argument: a folder with `job.json` (export: path; remote_code: bool; texts: list of
[text, ids, whether ids give back the text]) and `reference.safetensors` (tokens_BT, logits_BTV). It writes `result.json` there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Load model and tokenizer, compare logits and ids, write the result."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    # Nothing may be fetched, and code next to the weights is imported from its own place.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    result = compare_logits(job, folder) | compare_tokens(job)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def compare_logits(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compare the logits [B, T, V] of the loaded model with the reference, in float32.

    Result: name of the class, weight keys that did not match it, largest absolute difference, and whether the most likely
    token is the same wherever it is clear.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    reference = load_file(folder / "reference.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(
        job["export"],
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=job["remote_code"],
        local_files_only=True,
    )
    with torch.no_grad():
        logits_BTV = model(reference["tokens_BT"], use_cache=False).logits
    expected_BTV = reference["logits_BTV"]
    best_BT2 = expected_BTV.topk(2, dim=-1).values
    # Where the two best logits are closer than the tolerance allows to move them, either may win.
    is_clear_BT = best_BT2[..., 0] - best_BT2[..., 1] > 2 * job["tolerance"]
    is_same_BT = logits_BTV.argmax(dim=-1) == expected_BTV.argmax(dim=-1)
    return {
        "class_name": type(model).__name__,
        "keys": {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys},
        "max_logit_difference": float((logits_BTV - expected_BTV).abs().max()),
        "same_argmax": bool((is_same_BT | ~is_clear_BT).all()),
        "tokens": reference["tokens_BT"].numel(),
    }


def compare_tokens(job: dict[str, Any]) -> dict[str, Any]:
    """Compare token ids with those of training.

    Result: texts whose ids differ, wrong ids and ids in all, and texts that do not come back from their ids though they
    did with the tokenizer of the training.
    """
    if not job["texts"]:  # of a model of ids, whose export has no tokenizer
        return {"differing_texts": [], "wrong_ids": 0, "num_ids": 0, "undecoded_texts": []}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        job["export"], trust_remote_code=job["remote_code"], local_files_only=True
    )
    differing, wrong_ids, num_ids, undecoded = [], 0, 0, []
    for text, ids, comes_back in job["texts"]:
        # A control token written out in a text was text in training.
        found = tokenizer(text, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
        num_ids += len(ids)
        if found != ids:
            differing.append(text[:80])
            wrong_ids += sum(left != right for left, right in zip(found, ids)) + abs(len(found) - len(ids))
        if comes_back and tokenizer.decode(ids, skip_special_tokens=True) != text:
            undecoded.append(text[:80])
    return {"differing_texts": differing, "wrong_ids": wrong_ids, "num_ids": num_ids, "undecoded_texts": undecoded}


if __name__ == "__main__":
    main()
