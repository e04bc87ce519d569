"""Generation by native code, by PyTorch, and by transformers with the same weights, in turns: tokens a CPU second, one text.

How it works: the model of a configuration with random weights is built here twice and, through its export's files, in
transformers. A round continues a short prompt by each way, and reads a long one, greedily and with one thread; all ways must
choose the same tokens, but where two logits are nearly equal. Seconds are the process's own on its processors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.inference.generate import Sampling, generate_tokens
from benchmarks import ROOT
from benchmarks.command import main
from benchmarks.in_transformers import build_in_transformers

SHORT = 16  # tokens of the prompt that is continued
Way = Callable[[list[int], int], list[int]]


def generation(
    config: Annotated[Path, typer.Argument(help="Of the model.")] = ROOT / "configs/tiny_cpu.yaml",
    *,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of a text.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the long prompt.")] = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    as_json: JsonOption = False,
) -> None:
    """Measure tokens of a text and of a prompt, a CPU second."""
    torch.set_num_threads(1)
    settings = load_checked(config, [], world_size=1)
    ways = build_ways(settings.model, settings.export.target, prompt + tokens)
    ids = torch.randint(settings.model.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    paces: dict[str, dict[str, list[float]]] = {way: {"token": [], "prompt": []} for way in ways}
    chosen: dict[str, list[int]] = {}
    for number in range(rounds + 1):
        for way, run in ways.items():
            for kind, begin, new in (("token", SHORT, tokens), ("prompt", prompt, 1)):
                began = time.process_time()
                found = run(ids[:begin], new)
                if kind == "token":
                    chosen[way] = found
                if number:  # the first one warms up
                    paces[way][kind].append((new if kind == "token" else prompt) / (time.process_time() - began))
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


def continue_here(model: HybridModel, ids: list[int], new: int) -> list[int]:
    """The most likely next tokens after these."""
    return [*generate_tokens(model, ids, new, Sampling(temperature=0))]


def build_ways(model: Any, target: str, most_tokens: int) -> dict[str, Way]:
    """What continues a prompt by so many tokens, by name."""
    ways: dict[str, Way] = {}
    for backend in ("native", "torch"):
        own = HybridModel(model, single_rank_groups(), backend=backend, seed=0).eval()
        ways[backend] = partial(continue_here, own)
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

    ways["transformers"] = continue_there
    return ways


if __name__ == "__main__":
    main(generation)
