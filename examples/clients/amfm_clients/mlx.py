"""mlx-lm on an export: a script, see transformers_reference.py."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path


def main() -> None:
    """Load, score and continue."""
    import mlx.core as mx
    from mlx import nn
    from mlx_lm import load

    # Compiling needs a C++ compiler, which a user's machine may not have.
    mx.disable_compile()
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    model, tokenizer = load(job["export"])
    tokens = job["tokens"]
    scores = nn.log_softmax(model(mx.array([tokens]))[0].astype(mx.float32), axis=-1)
    continuation: list[int] = []
    for _ in range(job["num_new"]):
        logits = model(mx.array([tokens + continuation]))[0, -1]
        continuation.append(int(mx.argmax(logits).item()))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx")]
    result = {
        "version": ", ".join(versions),
        "text_lengths": [len(tokenizer.encode(text)) for text in job["texts"]],
        "log_probabilities": [float(scores[place, token].item()) for place, token in enumerate(tokens[1:])],
        "continuation": continuation,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
