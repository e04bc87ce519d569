"""What transformers makes of an export, for comparison: run as a script, argument a folder with `job.json`.

It imports nothing of ours, like every script here. `job.json`: export (path), remote_code, texts, num_scored, num_new. It
writes `result.json`: version; ids of each text; `tokens`, the ids to score; `log_probabilities` of each of them but the
first given those before it; `continuation`, the most likely ids after them; `leads`, how far each led in log-probability.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Tokenize, score and continue."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    settings = {"trust_remote_code": job["remote_code"], "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(job["export"], **settings)
    model = AutoModelForCausalLM.from_pretrained(job["export"], dtype=torch.float32, **settings).eval()
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in job["texts"]]
    tokens = (ids[0] * (1 + job["num_scored"]))[: job["num_scored"] + 1]
    continuation: list[int] = []
    leads = []
    with torch.no_grad():
        scores = model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)
        for _ in range(job["num_new"]):
            logits = model(torch.tensor([tokens + continuation]), use_cache=False).logits[0, -1].float()
            best, second = logits.topk(2).values.tolist()
            leads.append(best - second)
            continuation.append(int(logits.argmax()))
    result = {
        "version": f"transformers {transformers.__version__}",
        "text_ids": ids,
        "tokens": tokens,
        "log_probabilities": [float(scores[place, token]) for place, token in enumerate(tokens[1:])],
        "continuation": continuation,
        "leads": leads,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
