"""Verbs that use a trained model: evaluate, generate, export, import."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.cli_config import JsonOption
from launch.cli_probe import ProbeChoice, evaluate_on_probe
from launch.console import print_json, print_pairs, show_progress

CheckpointArgument = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A run directory (its newest checkpoint), a checkpoint, or an import."),
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist or be empty.")]

DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto: cuda if there is one, else cpu.")
]
BackendOption = Annotated[
    Literal["auto", "triton", "torch", "reference"], typer.Option(help="Kernels, as kernels.backend of a run.")
]


def evaluate(
    checkpoint: CheckpointArgument,
    *,
    data: Annotated[Path | None, typer.Option(metavar="STORE", help="The token store; default: the run's own.")] = None,
    split: Annotated[
        Literal["validation", "train"] | None, typer.Option(help="Which part of the store; default: validation.")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", "--length", min=1, help="Tokens a row; default: as in training."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after about so many; default: all.")] = None,
    probe: Annotated[ProbeChoice | None, typer.Option(help="Ask this probe task instead (docs/probes.md).")] = None,
    probe_settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the probe (data.probe), repeatable."),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the probe; default: 256.")] = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure loss and perplexity on a part of a store, every token predicted once, or the right answers of a probe.

    Computes in float32.
    """
    of_text = {"--data": data, "--split": split, "--max-tokens": max_tokens}
    of_probe = {"--set": probe_settings, "--rows": rows}
    unread = [name for name, value in (of_text if probe else of_probe).items() if value is not None]
    if unread:
        raise ValueError(f"{unread[0]} has no effect {'with' if probe else 'without'} --probe; leave it out")
    if probe is not None:
        evaluate_on_probe(
            checkpoint,
            probe,
            probe_settings or [],
            sequence_length=sequence_length,
            num_rows=rows,
            device=choose_device(device),
            backend=backend,
            as_json=as_json,
        )
        return
    from pretrain.evaluate_checkpoint import evaluate_checkpoint

    with show_progress("evaluate", every_seconds=5.0) as show:
        found = evaluate_checkpoint(
            checkpoint,
            store=data,
            split=split or "validation",
            sequence_length=sequence_length,
            max_tokens=max_tokens,
            device=choose_device(device),
            backend=backend,
            progress=lambda done, total: show(done, total, "tokens"),
        )
    if as_json:
        print_json(
            {
                "loss": found.loss,
                "perplexity": found.perplexity,
                "tokens": found.tokens,
                "by_source": {name: {"loss": loss, "tokens": n} for name, (loss, n) in found.by_source.items()},
                "split": found.split,
                "store": found.store,
                "sequence_length": found.sequence_length,
            }
        )
        return
    pairs = [("loss", f"{found.loss:.4f} nats a token"), ("perplexity", f"{found.perplexity:,.2f}")]
    if len(found.by_source) > 1:
        pairs += [(f"loss of {name}", f"{loss:.4f}, {n:,} tokens") for name, (loss, n) in found.by_source.items()]
    pairs.append(("measured on", f"{found.tokens:,} tokens of the {found.split} part of {found.store}"))
    print_pairs(f"Evaluation of {checkpoint}", pairs)


def generate(
    checkpoint: CheckpointArgument,
    *,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among the k most likely only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose within this probability only.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random choices.")] = 0,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a text, carrying the recurrent state: a token costs the same however long the text is."""
    from pretrain.generate import Sampling
    from pretrain.generate import generate as generate_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    pieces = generate_text(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        device=choose_device(device),
        backend=backend,
    )
    if as_json:
        print_json({"prompt": prompt, "text": "".join(pieces)})
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def choose_device(name: str) -> str:
    """The device to compute on; ValueError for a CUDA that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; use --device cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def export(
    checkpoint: CheckpointArgument,
    out: OutArgument,
    *,
    file_format: Annotated[
        Literal["huggingface", "deepspeed-universal", "megatron"],
        typer.Option(
            "--format",
            help="A model for transformers, a whole training state for DeepSpeed's loader, or the tokens of a store as "
            ".bin and .idx.",
        ),
    ] = "huggingface",
    target: Annotated[
        Literal["nemotron_h", "granitemoehybrid", "qwen3_next", "own", "auto"] | None,
        typer.Option(help="The transformers class; default: export.target of the run."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load it back with transformers and compare logits.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Write a transformers checkpoint, then prove in a fresh process that it gives the same logits."""
    from pretrain.export import export_checkpoint

    if file_format != "huggingface" and (target is not None or not verify):
        raise ValueError(f"--target and --no-verify are about transformers; leave them out with {file_format}")
    if file_format == "megatron":
        export_tokens(checkpoint, out, as_json=as_json)
        return
    if file_format == "deepspeed-universal":
        export_for_deepspeed(checkpoint, out, as_json=as_json)
        return
    report = export_checkpoint(checkpoint, out, target=target, verify=verify)
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "target": report.target,
                "class": report.class_name,
                "max_logit_difference": report.max_logit_difference,
                "same_argmax": report.same_argmax,
                "tokens_compared": report.tokens_compared,
                "compared": report.compared,
                "files": list(report.files),
                "reasons": list(report.reasons),
            }
        )
        return
    proof = "not verified"
    if report.max_logit_difference is not None:
        same = "same most likely token everywhere" if report.same_argmax else "another most likely token somewhere"
        proof = (
            f"largest logit difference {report.max_logit_difference:.1e} over {report.tokens_compared:,} tokens, {same}"
        )
    pairs = [("folder", report.path), ("class", report.class_name), ("proof", proof), ("compared on", report.compared)]
    pairs += [("why no native class", reason) for reason in report.reasons]
    print_pairs("Export", pairs)


def export_for_deepspeed(checkpoint: Path, out: Path, *, as_json: bool) -> None:
    """Write what `load_checkpoint` of DeepSpeed reads with `load_universal`, and say what it is."""
    from pretrain.export_universal import export_universal

    report = export_universal(checkpoint, out)
    if as_json:
        print_json({**asdict(report), "path": str(report.path)})
        return
    pairs = [
        ("folder", str(report.path)),
        ("tag", report.tag),
        ("tensors", f"{report.num_tensors:,}, with two moments each"),
        ("bytes", f"{report.num_bytes:,}"),
    ]
    print_pairs("Export for DeepSpeed's universal loading", pairs)


def export_tokens(store_path: Path, out: Path, *, as_json: bool) -> None:
    """Write OUT/SOURCE-SPLIT.bin and .idx for each source and split of a token store."""
    from data_pipeline.manifest import SPLITS
    from data_pipeline.megatron_files import export_megatron
    from data_pipeline.store import TokenStore

    store = TokenStore.open(store_path)
    documents = {
        f"{source}-{split}": export_megatron(store, source, split, out / f"{source}-{split}")
        for source in store.source_names
        for split in SPLITS
        if store.parts(source, split)
    }
    if as_json:
        print_json({"path": str(out), "documents": documents})
    else:
        print_pairs(f"Megatron files in {out}", [(name, f"{count:,} documents") for name, count in documents.items()])


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder that transformers wrote, an export, or a .tiktoken file.")
    ],
    out: OutArgument,
    *,
    pattern: Annotated[
        str | None, typer.Option(help="Of a .tiktoken file: regular expression of the pieces it cuts a text into.")
    ] = None,
    special: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN=ID", help="Of a .tiktoken file: a special token, repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a transformers checkpoint of a class that we export to, for continued pretraining, export or use.

    A .tiktoken file becomes OUT/tokenizer.json.
    """
    if source.suffix == ".tiktoken":
        import_tokenizer(source, out, pattern, special or [], as_json=as_json)
        return
    if pattern is not None or special:
        raise ValueError(f"--pattern and --special are for a .tiktoken file, and {source} is none; leave them out")
    from pretrain.import_huggingface import import_huggingface

    report = import_huggingface(source, out)
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "target": report.target,
                "tensors": report.num_tensors,
                "parameters": report.num_parameters,
                "skipped": list(report.skipped),
                "model": report.model.model_dump(mode="json"),
            }
        )
        return
    pairs = [
        ("folder", str(report.path)),
        ("read as", report.target),
        ("pattern", report.model.pattern),
        ("tensors", f"{report.num_tensors:,}"),
        ("parameters", f"{report.num_parameters:,}"),
    ]
    pairs += [("left out", name) for name in report.skipped]
    print_pairs("Import", pairs)


def import_tokenizer(source: Path, out: Path, pattern: str | None, special: list[str], *, as_json: bool) -> None:
    """Convert a .tiktoken file."""
    from data_pipeline.tiktoken_file import convert_tiktoken

    if pattern is None:
        raise ValueError(f"{source} doesn't hold the pattern that cuts texts into pieces; give it with --pattern")
    pairs = [text.rpartition("=") for text in special]
    wrong = [text for text, (name, _, index) in zip(special, pairs) if not name or not index.isdecimal()]
    if wrong:
        raise ValueError(f"--special {wrong[0]} must be TOKEN=ID, such as '<|endoftext|>=100257'")
    content = convert_tiktoken(source, pattern=pattern, special_tokens={name: int(index) for name, _, index in pairs})
    out.mkdir(parents=True, exist_ok=True)
    target = out / "tokenizer.json"
    target.write_bytes(content)
    if as_json:
        print_json({"path": str(target)})
    else:
        print_pairs("Tokenizer", [("file", target), ("use", f"data.tokenizer.model={target} and its eos_token")])


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm evaluate runs/tiny_cpu --data data/shakespeare --json")(evaluate)
    app.command(epilog='Example: amfm generate runs/tiny_cpu --prompt "To be, or not to be" --top-p 0.9')(generate)
    app.command(epilog="Example: amfm export runs/tiny_cpu exports/tiny_cpu --format huggingface")(export)
    app.command("import", epilog="Example: amfm import exports/tiny_cpu imports/tiny_cpu")(import_)
