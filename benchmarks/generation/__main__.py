"""Generation by native code, by PyTorch, by transformers and llama.cpp with the same weights, in turns: tokens a CPU second.

How it works: the model of a configuration with random weights is built here twice and, through its export's files, in
transformers; with `--llama-python` in llama.cpp too, where the class is one that it reads. A round continues a short prompt by each way, and reads a long one, greedily and with one thread; all ways must
choose the same tokens, but where two logits are nearly equal. Seconds are the process's own on its processors.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from amfm.data_pipeline.config import TokenizerConfig
from amfm.data_pipeline.tokenizer.sentencepiece_model import train_tokenizer
from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.generate import Sampling, generate_tokens
from benchmarks import ROOT
from benchmarks.command import main
from benchmarks.in_transformers import build_in_transformers, write_files

SHORT = 16  # tokens of the prompt that is continued
Way = Callable[[list[int], int], tuple[list[int], float]]  # new tokens after these, and seconds on processors


def generation(
    config: Annotated[Path, typer.Argument(help="Of the model.")] = ROOT / "configs/tiny_cpu.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE of the configuration.")] = None,
    *,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of a text.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the long prompt.")] = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    llama_python: Annotated[Path | None, typer.Option(help="An interpreter with recipes/clients/readers.txt.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure tokens of a text and of a prompt, a CPU second."""
    torch.set_num_threads(1)
    settings = load_checked(config, overrides or [], world_size=1)
    with ExitStack() as stack:
        ways = build_ways(settings.model, settings.export.target, prompt + tokens)
        if llama_python is not None:
            own = HybridModel(settings.model, single_rank_groups(), seed=0)
            ways["llama.cpp"] = stack.enter_context(LlamaCpp(llama_python, own, settings))
        paces, chosen = measure(ways, settings.model.vocab_size, tokens, prompt, rounds)
    medians = {way: {kind: statistics.median(each) for kind, each in found.items()} for way, found in paces.items()}
    alike = {way: sum(one == other for one, other in zip(found, chosen["native"])) for way, found in chosen.items()}
    if as_json:
        print_json({"paces": medians, "equal_tokens": alike})
        return
    peer = medians["transformers"]
    rows = [
        [way, *(f"{pace[kind]:,.0f} ({min(paces[way][kind]):,.0f} to {max(paces[way][kind]):,.0f})" for kind in pace)]
        + [f"{pace[kind] / peer[kind]:.2f}" for kind in pace] + [f"{alike[way]} of {tokens}"]
        for way, pace in medians.items()
    ]  # fmt: skip
    columns = ("way", "tokens a CPU second", f"of a prompt of {prompt}", "x transformers", "x, prompt", "as native")
    print_rows(f"Generation, {config.stem}, one text, one thread", columns, rows)


def measure(
    ways: dict[str, Way], vocab_size: int, tokens: int, prompt: int, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[int]]]:
    """Tokens per second on processors, of a text and of a prompt, in each round by each way; and what each way chose."""
    ids = torch.randint(vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    paces: dict[str, dict[str, list[float]]] = {way: {"token": [], "prompt": []} for way in ways}
    chosen: dict[str, list[int]] = {}
    for number in range(rounds + 1):
        for way, run in ways.items():
            for kind, begin, new in (("token", SHORT, tokens), ("prompt", prompt, 1)):
                found, seconds = run(ids[:begin], new)
                if kind == "token":
                    chosen[way] = found
                if number:  # the first one warms up
                    paces[way][kind].append((new if kind == "token" else prompt) / seconds)
    return paces, chosen


class LlamaCpp:
    """llama.cpp with a model's weights in another interpreter, which counts its own seconds. Ends with its `with` block."""

    def __init__(self, python: Path, model: HybridModel, settings: RunConfig) -> None:
        self.folder = tempfile.TemporaryDirectory()
        export = Path(self.folder.name)
        write_files(export, model, settings.model, settings.export.target, 1024)
        lines = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "model").glob("*.py"))]
        tokenizer = train_tokenizer(lines, TokenizerConfig(vocab_size=settings.model.vocab_size))
        (export / "tokenizer.model").write_bytes(tokenizer.to_bytes())
        command = [str(python), "-P", str(ROOT / "benchmarks/generation/llama_cpp.py"), str(export), str(export)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def __call__(self, ids: list[int], new: int) -> tuple[list[int], float]:
        """The most likely next tokens after these. Raises RuntimeError if the process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None, "the pipes were asked for"
        self.process.stdin.write(json.dumps([ids, new]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp ended early; its message is above")
        found, seconds = json.loads(line)
        return found, seconds


def timed(run: Callable[[list[int], int], list[int]]) -> Way:
    """A way of this process with its seconds."""

    def run_timed(ids: list[int], new: int) -> tuple[list[int], float]:
        began = time.process_time()
        found = run(ids, new)
        return found, time.process_time() - began

    return run_timed


def continue_here(model: HybridModel, ids: list[int], new: int) -> list[int]:
    """The most likely next tokens after these."""
    return [*generate_tokens(model, ids, new, Sampling(temperature=0))]


def build_ways(model: Any, target: str, most_tokens: int) -> dict[str, Way]:
    """What continues a prompt by so many tokens, by name."""
    ways: dict[str, Way] = {}
    for backend in ("native", "torch"):
        own = HybridModel(model, single_rank_groups(), backend=backend, seed=0).eval()
        ways[backend] = timed(partial(continue_here, own))
    theirs = build_in_transformers(own, model, target, most_tokens).eval()

    def continue_there(ids: list[int], new: int) -> list[int]:
        given = torch.tensor([ids])
        with torch.inference_mode():
            found = theirs.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        tokens: list[int] = found[0, len(ids) :].tolist()
        return tokens

    ways["transformers"] = timed(continue_there)
    return ways


if __name__ == "__main__":
    main(generation)
