"""llama.cpp continues prompts of `benchmarks.generation`: a script for an interpreter that has xllamacpp, arguments EXPORT and a folder.

It converts the export to GGUF in float32, loads it with one thread, and answers each line `[ids, number of new tokens]` with a
line of the new ids and the seconds that this process spent on its processors for them.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Convert, load, and answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print there, too
    import xllamacpp

    export, folder = Path(sys.argv[1]), Path(sys.argv[2])
    script = Path(__file__).parents[2] / "examples/clients/amfm_clients/convert_gguf.py"
    runpy.run_path(str(script))["convert"](export, folder / "model.gguf")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(folder / "model.gguf")
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 1024
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    for line in sys.stdin:
        ids, new = json.loads(line)
        began = time.process_time()
        tokens = complete(server, ids, new)
        answers.write(json.dumps([tokens, time.process_time() - began]) + "\n")
        answers.flush()


def complete(server: Any, ids: list[int], new: int) -> list[int]:
    """The likeliest tokens after a prompt, none of which ends the text."""
    question = {
        "prompt": ids,
        "n_predict": new,
        "temperature": 0.0,
        "cache_prompt": False,
        "ignore_eos": True,
        "n_probs": 1,
    }
    answer = server.handle_completions(question)
    if isinstance(answer, list):
        answer = answer[0]
    if "error" in answer:
        raise RuntimeError(str(answer["error"]))
    return [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]


if __name__ == "__main__":
    main()
