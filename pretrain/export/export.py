"""Exports a checkpoint to a folder that transformers loads, and shows it before the folder gets its name.

The folder is written under a temporary name; a fresh process without any of our code on its path loads it as a user
would, and its logits and token ids are compared with ours. Only a folder that passed is renamed to the name that was asked
for, so an export that exists is one that was right.

The fresh process matters: inside this one our packages, patched libraries or a warm module cache could hide that the
folder on its own does not load. Logits are compared on real text where the run has a store. Token ids are compared on odd
texts too: runs of spaces, control tokens written out, rare characters.

Tensors go from the checkpoint to the folder some rows at a time, so that a model of any size takes the same memory. The
verification takes a block of the model here, and the whole of it in float32 in the fresh process, as transformers loads
it.

A model that holds the weights of one block at a time, for passes over models that are larger than memory.

It is built on the meta device. When a pass comes to a part (`HybridModel.before_use`), the part gets memory and its weights
are read, and those of the blocks before it are let go. A pass so costs a read of the whole model: right for a
verification over some rows, wrong for anything that is repeated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import amfm.pretrain.export.verify
from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.id_vocabulary import IdVocabulary
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.model.huggingface.classes import choose_target, explain_unfit, find_target, left_out_depths, unfit_tokenizer
from amfm.model.huggingface.hf_class import Target
from amfm.model.hybrid import HybridModel
from amfm.model.mixers.interface import Mixer
from amfm.model.on_demand import OnDemand, on_demand
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.export.files import MAX_SHARD_BYTES, ExportPlan, begin_export, put_in_place, sync_files, write_export
from amfm.pretrain.export.tokenizer import tokenizer_json
from amfm.pretrain.inference.merge import multiply_out
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.tensor_files import write_tensors

# Two float32 implementations that add in another order; real text, logits of order 10.
LOGIT_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5  # of models of ours, from the same code in float32
PROOF_ROWS = 2
PROOF_TOKENS = 320
# A SentencePiece model with unrounded scores decides near ties by rounding noise (data_pipeline/tokenizer/sentencepiece_model.py).
MAX_WRONG_IDS = 1e-3
SAMPLE_TEXT = (
    "The quick brown fox jumps over the lazy dog. In the beginning there were 7 heavens, and a man said:\n\n"
    '  "What is a word worth?"\tNobody knew; it cost 12.50 that year.\n'
)
ODD_TEXTS = (
    "",
    " ",
    "  two  spaces and trailing   ",
    "\n\n\n leading newlines\n",
    "tab\there\t\tand\r\ncarriage return",
    "<s> </s> <pad> <unk> <0x0A> written out",
    "\u00a0no-break, caf\u00e9, \u03a9mega, \u6f22\u5b57, \U0001f600, e\u0301, \u200b\ufeff",
    "1234567890 3.14159 -- ### *** ____ a_b-c/d",
)
DEFAULT_MAX_POSITIONS = 4096


@dataclass(frozen=True)
class ExportReport:
    """What was written and what the verification found; the differences are None without a verification.

    class_name: of transformers, or AmfmForCausalLM. reasons: why no native class holds the model, a line per class, where one was
    looked for. compared: on what text the logits were compared. rejections: other programs that are known to reject the folder,
    with rule and fix. left_out: why it has no MTP layers, where the model has some. kept: what the released model brought along.
    """

    path: Path
    target: Target
    class_name: str
    max_logit_difference: float | None
    same_argmax: bool | None
    tokens_compared: int
    compared: str
    files: tuple[str, ...]
    reasons: tuple[str, ...]
    refusals: tuple[str, ...]
    left_out: str | None = None
    kept: tuple[str, ...] = ()


def export_checkpoint(
    checkpoint_dir: str | Path | Weights,
    out_dir: str | Path,
    *,
    target: str | None = None,
    verify: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Report = silent,
) -> ExportReport:
    """Write a checkpoint (a run's newest, or an imported model) as a transformers folder and verify it.

    `target`: one of `TARGETS` or auto; None: what the run's `export.target` says. Everything is written to a hidden
    folder next to OUT, made durable, loaded by a fresh process that compares logits, and only then renamed to OUT, so
    OUT is absent or whole. Factored matrices are written multiplied out. Raises ValueError for a target that cannot
    hold the model or an OUT that is in use, RuntimeError
    for a failed verification: then the folder stands as OUT.failed (numbered if there is one), for examination.
    """
    out = Path(out_dir)
    check_free(out)
    weights = checkpoint_dir if isinstance(checkpoint_dir, Weights) else read_weights(checkpoint_dir, report)
    asked = target or (weights.run.export.target if weights.run is not None else "auto")
    model, state = multiply_out(weights.model, weights.state)
    merged = replace(weights, model=model, state=state)
    chosen = resolve_target(merged, asked)
    left_out = left_out_depths(merged.model, chosen)
    if left_out is not None:
        merged = merged.without_depths()
    plan = ExportPlan(merged, chosen, _max_positions(weights), max_shard_bytes, left_out)
    proof: dict[str, Any] = {}
    compared = "nothing: not verified"
    with begin_export(out) as temporary:
        report("writing tensors")
        write_export(plan, temporary)
        sync_files(temporary)
        if verify:
            tokens_BT, texts, compared = proof_text(weights)
            report("comparing logits with those of transformers in a fresh process")
            proof = run_proof(plan, temporary, tokens_BT, texts, weights)
            problems = find_problems(plan, proof)
            if problems:
                raise RuntimeError(_fail(temporary, out, problems))
        put_in_place(temporary, out)
    return ExportReport(
        path=out,
        target=plan.target,
        class_name=plan.hf_class.class_name,
        max_logit_difference=proof.get("max_logit_difference"),
        same_argmax=proof.get("same_argmax"),
        tokens_compared=proof.get("tokens", 0),
        compared=compared,
        files=tuple(sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())),
        reasons=tuple(plan.unfit_reasons()) if asked == "auto" else (),
        refusals=tuple(plan.refusals()),
        left_out=plan.left_out,
        kept=tuple(weights.released.describe()) if weights.released is not None else (),
    )


def resolve_target(weights: Weights, asked: str) -> Target:
    """Choose the target class to write.

    `auto` takes the class of the released model that it continues, or the first native class, that holds it, else `own`.

    Raises ValueError with every reason when the one asked for cannot hold the model or its tokenizer.
    """
    reasons = explain_unfit(weights.model, asked)
    given = weights.given_tokenizer
    kind = None if given is None or given.kind == IdVocabulary.kind else given.kind
    if given is not None and kind is not None:
        reasons += unfit_tokenizer(asked, kind)
        if kind != "sentencepiece":
            tokenizer_json(given)
    if reasons:
        raise ValueError(f"export target {asked} cannot hold this model: " + "; ".join(reasons))
    if asked == "auto":
        family = weights.released.model_type if weights.released is not None else None
        return choose_target(weights.model, family, kind)
    return find_target(asked).name


def _max_positions(weights: Weights) -> int:
    """Tokens a text that the export declares: as the run says, else those of its rows or of the released model that it continues.

    DEFAULT_MAX_POSITIONS if nothing is known of either.
    """
    if weights.run is not None and weights.run.export.max_position_embeddings is not None:
        return weights.run.export.max_position_embeddings
    released = weights.released.max_position_embeddings if weights.released is not None else None
    return max(weights.trained_length() or 0, released or 0) or DEFAULT_MAX_POSITIONS


def proof_text(weights: Weights) -> tuple[Tensor, list[str], str]:
    """Choose the text of the verification: tokens [2, T] int64, texts to encode, and a word on where they come from.

    The validation part of the run's store (its training part when there is none); for an import, which has no store, a
    built-in sample.
    """
    tokenizer = weights.vocabulary
    has_text = tokenizer.kind != IdVocabulary.kind
    if weights.run is None:
        ids = (
            tokenizer.encode(SAMPLE_TEXT)
            if has_text
            else [index % tokenizer.vocab_size for index in range(PROOF_TOKENS)]
        )
        source = "a built-in sample" if has_text else "ids that count up"
    else:
        ids, source = _store_tokens(weights.run.data.text_store(), PROOF_ROWS * PROOF_TOKENS)
    wanted = min(PROOF_TOKENS, weights.trained_length() or PROOF_TOKENS)
    while len(ids) < PROOF_ROWS * wanted:
        ids = ids + ids
    tokens_BT = torch.tensor(ids[: PROOF_ROWS * wanted]).view(PROOF_ROWS, wanted)
    if not has_text:
        return (
            tokens_BT,
            [],
            f"{source}; no tokenizer is in the export, because the model was trained on token ids without one",
        )
    text = tokenizer.decode([index for index in ids if index != tokenizer.eos_id])
    return tokens_BT, [text, SAMPLE_TEXT, *ODD_TEXTS], source


def logit_difference(first: Weights, second: Weights, tokens_BT: Tensor) -> float:
    """Largest difference of the logits of two models on tokens [B, T], over the largest logit where that is above 1."""
    meta = PackMeta.one_document_a_row(*tokens_BT.shape)
    with torch.no_grad():
        given, other = (weights.build()(tokens_BT, meta).logits_BTV for weights in (first, second))
    assert given is not None and other is not None, "no labels were given"
    return float((given - other).abs().max() / given.abs().max().clamp(min=1.0))


def _store_tokens(path: str, count: int) -> tuple[list[int], str]:
    """Read up to `count` tokens from the beginnings of a store's parts, and name the part.

    Raises RuntimeError when the store is empty.
    """
    store = TokenStore.open(path)
    for split in ("validation", "train"):
        ids: list[int] = []
        for _, part_split, part in store.all_parts():
            if part_split == split and len(ids) < count:
                ids += store.read_tokens(part, 0, min(part.num_tokens, count - len(ids))).tolist()
        if ids:
            store.close()
            return ids, f"the {split} part of {path}"
    raise RuntimeError(f"the store {path} holds no tokens; prepare it again, or export without verification")


def run_proof(
    plan: ExportPlan, folder: Path, tokens_BT: Tensor, texts: list[str], trained: Weights | None = None
) -> dict[str, Any]:
    """Load the folder in a fresh process and compare it with our model on tokens [B, T] and texts.

    `trained`: the model as it was trained, where its matrices were factored and the plan has them multiplied out.
    Returns what `verify.py` found, or `crash` with the error that ended it. Both models compute in float32 on the CPU; ours
    holds one block at a time, transformers the whole.
    """
    with torch.no_grad():
        meta = PackMeta.one_document_a_row(*tokens_BT.shape)
        logits_BTV = stream_model(trained or plan.weights)(tokens_BT, meta).logits_BTV
    assert logits_BTV is not None, "no labels were given"
    tokenizer: Tokenizer = plan.weights.vocabulary
    encoded = [(text, tokenizer.encode(text)) for text in texts]
    job = {
        "export": str(folder.resolve()),
        "remote_code": plan.hf_class.ships_code,
        "tolerance": LOGIT_TOLERANCE,
        # Text that survives our tokenizer must survive theirs.
        "texts": [(text, ids, tokenizer.decode(ids) == text) for text, ids in encoded],
    }
    with tempfile.TemporaryDirectory() as scratch:
        reference = {"tokens_BT": tokens_BT, "logits_BTV": logits_BTV.contiguous()}
        write_tensors(Path(scratch, "reference.safetensors"), reference)
        Path(scratch, "job.json").write_text(json.dumps(job), encoding="utf-8")
        # -P: our folders must not stand in for modules that transformers looks for.
        command = [sys.executable, "-P", str(amfm.pretrain.export.verify.__file__), scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        if done.returncode:
            return {"crash": find_error(done.stderr) or f"exit code {done.returncode}"}
        result: dict[str, Any] = json.loads(Path(scratch, "result.json").read_text(encoding="utf-8"))
        return result


def find_error(output: str) -> str:
    """Extract the message of the last error in a Python process's output, without its traceback; at most 600 characters."""
    _, _, last = output.rpartition("Traceback (most recent call last):")
    message = [line for line in last.splitlines() if line.strip() and not line.startswith("  ")]
    return " ".join(message)[:600]


def find_problems(plan: ExportPlan, proof: dict[str, Any]) -> list[str]:
    """List what speaks against the export, as sentences; empty when the verification holds.

    The most likely token is compared only where it leads by more than twice the tolerance. A few ids may differ: see
    MAX_WRONG_IDS.
    """
    if "crash" in proof:
        return [f"transformers could not load or run it: {proof['crash']}"]
    problems = []
    if proof["keys"]:
        problems.append(f"weights did not match the class: {proof['keys']}")
    if proof["class_name"] != plan.hf_class.class_name:
        problems.append(f"it loads as {proof['class_name']}, not {plan.hf_class.class_name}")
    difference = proof["max_logit_difference"]
    # Written with `not <=`, so that NaN fails.
    if not difference <= LOGIT_TOLERANCE:
        problems.append(f"logits differ by up to {difference:.2e}, at most {LOGIT_TOLERANCE:.0e} is allowed")
    if not proof["same_argmax"]:
        problems.append("the most likely token differs")
    if proof["wrong_ids"] > MAX_WRONG_IDS * proof["num_ids"]:
        problems.append(f"AutoTokenizer returns other ids for {proof['differing_texts'][:3]}")
    if proof["undecoded_texts"]:
        problems.append(f"AutoTokenizer does not restore {proof['undecoded_texts'][:3]}")
    return problems


def _fail(temporary: Path, out: Path, problems: list[str]) -> str:
    """Rename the folder to OUT.failed, for examination, and compose the error's message."""
    place = out.resolve()
    names = (
        place.with_name(f"{place.name}{number}.failed") for number in ("", *(f".{count}" for count in range(1, 1000)))
    )
    failed = next(path for path in names if not os.path.lexists(path))
    os.rename(temporary, failed)
    return (
        f"the export to {out} failed verification: "
        + "; ".join(problems)
        + f". It is kept as {failed} for examination."
    )


def stream_model(weights: Weights) -> HybridModel:
    """Build the whole model on one rank on the CPU, in float32 and eval mode, its weights read part by part in each pass."""
    model = HybridModel(weights.model, single_rank_groups(), device="meta").eval()
    state = on_demand(weights.state)
    # The ends are kept: a tied embedding is the head too.
    ends = {"embedding": ("embedding",), "head": ("final_norm", "final_stream", "head")}

    def take(part: str) -> None:
        for block in model.blocks:
            block.to("meta")
        for name in ends.get(part, (part,)):
            module = model.get_submodule(name) if model_has(model, name) else None
            if module is not None and any(tensor.is_meta for tensor in module.parameters()):
                materialize(module, name, state)

    model.before_use = take
    return model


def model_has(model: HybridModel, name: str) -> bool:
    """Whether a part of this name was built: a model of tied weights has no head."""
    return "." in name or getattr(model, name) is not None


def materialize(module: nn.Module, name: str, state: OnDemand) -> None:
    """Give a module on the meta device memory, first values of its buffers, and its weights by their global names."""
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, Mixer):
            part.reset_buffers()
    for own, tensor in module.state_dict().items():
        for start, rows in state.blocks(f"{name}.{own}"):
            (tensor[start : start + len(rows)] if rows.dim() else tensor).copy_(rows)
