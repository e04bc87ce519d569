"""lm-eval's transformers backend on an export: a script, see transformers_reference.py."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Load, score each id as a continuation of those before it, and generate."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lm_eval.models.huggingface import HFLM

    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    model = HFLM(
        pretrained=job["export"], dtype="float32", device="cpu", batch_size=1, trust_remote_code=job["remote_code"]
    )
    tokens = job["tokens"]
    requests = [(None, tokens[: place + 1], [token]) for place, token in enumerate(tokens[1:])]
    scores = model._loglikelihood_tokens(requests, disable_tqdm=True)
    import torch

    ids = torch.tensor([tokens])
    length = len(tokens) + job["num_new"]
    end = model._model_generate(
        ids, max_length=length, stop=["\0never"], attention_mask=torch.ones_like(ids), do_sample=False
    )
    result = {
        "version": f"lm-eval {importlib.metadata.version('lm-eval')}",
        "text_lengths": [len(model.tok_encode(text)) for text in job["texts"]],
        "log_probabilities": [score for score, _ in scores],
        "continuation": end[0, len(tokens) :].tolist(),
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
