"""What `amfm import` and `amfm export` do with the states and arguments of other programs, and what they print.

Each function is a part of a verb: an entry point of the group `amfm.verbs` that is called `VERB.PART` (pyproject.toml).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.terminal import Waiting
from amfm.launch.console import print_json, print_pairs


def import_training_state(
    source: Path, out: Path, config: Path | None, step: int | None, changed: list[str], *, as_json: bool
) -> None:
    """Read a training state of another program, and print what it became."""
    from amfm.pretrain.config.file import load_config
    from amfm.pretrain.startup.arithmetic import resolve_precision
    from amfm_foreign_states.adopt import import_state
    from amfm_foreign_states.state import WrittenRun

    run = None if config is None else resolve_precision(load_config(config))[0]
    with Waiting("amfm import") as waiting:
        written = import_state(source, out, run, step=step, changed=changed, report=waiting)
    if not isinstance(written, WrittenRun):
        if as_json:
            print_json({"path": str(out), "kind": "weights", "tensors": len(written.state)})
        else:
            pairs = [("folder", out), ("tensors", f"{len(written.state):,}"), ("use", f"run.initial_weights={out}")]
            print_pairs("Import of weights without moments", pairs)
        return
    if as_json:
        kept = {"path": str(written.path), "kind": "run", "checkpoint": str(written.checkpoint)}
        counts = {"step": written.step, "tensors": written.num_tensors, "bytes": written.num_bytes}
        print_json({**kept, **counts, "warnings": list(written.warnings)})
        return
    pairs = [("run directory", written.path), ("checkpoint", written.checkpoint.name), ("step", written.step)]
    pairs += [("tensors", f"{written.num_tensors:,}"), ("bytes", f"{written.num_bytes:,}")]
    pairs += [("data", warning) for warning in written.warnings]
    print_pairs("Import of a training state", [*pairs, ("continue", f"amfm train {written.path}/config.yaml")])


def import_blend(source: Path, out: Path, *, as_json: bool) -> None:
    """Write the sources of a blend file, with its validation sets, and print how many there are."""
    import yaml

    from amfm_foreign_states.megatron_arguments.blend import read_blend

    blend = read_blend(source)
    tree: dict[str, object] = {"data": {"sources": blend.sources}}
    if blend.validation:
        tree["validation"] = blend.validation
    head = f"# Sources of {source}. data.tokenizer.model must name the tokenizer that made these ids.\n"
    write_file_atomically(out, (head + yaml.safe_dump(tree, sort_keys=False)).encode())
    if as_json:
        print_json(
            {
                "path": str(out),
                "sources": blend.sources,
                "validation": blend.validation,
                "left_out": list(blend.left_out),
            }
        )
        return
    pairs: list[tuple[str, object]] = [("file", out), ("sources", len(blend.sources))]
    pairs += [("validation sets", len(blend.validation))] if blend.validation else []
    pairs += [("left out", f"{name}: amfm has no such split") for name in blend.left_out]
    pairs += [("next", "set data.store and data.tokenizer.model, then `amfm prepare CONFIG`")]
    print_pairs("Blend of Megatron-LM", pairs)


def import_arguments(source: Path, out: Path, *, as_json: bool) -> None:
    """Write OUT.yaml and print how many arguments are equal, in another form, missing and not known.

    Raises ValueError if the arguments describe no model.
    """
    from amfm.pretrain.config.file import load_config
    from amfm_foreign_states.megatron_arguments.sources import read_arguments
    from amfm_foreign_states.megatron_arguments.translation import translate
    from amfm_foreign_states.megatron_arguments.write import flag, summarize, write_yaml

    translated = translate(read_arguments(source))
    write_file_atomically(out, write_yaml(translated).encode())
    counts = summarize(translated)
    missing = {flag(each.name): each.row.users or "L" for each in translated.missing if each.row is not None}
    approximate = [found.setting for found in translated.lines.values() if found.is_approximate]
    try:
        load_config(out)
        problem = None
    except ValueError as error:
        problem = str(error)
    if as_json:
        print_json(
            {"path": str(out), **counts, "missing_flags": missing, "approximated": approximate, "to_correct": problem}
        )
        return
    pairs: list[tuple[str, object]] = [("file", out), ("equal here", counts["equal"])]
    pairs += [("in another form", counts["differs"]), ("not known", counts["unknown"])]
    pairs += [("missing", f"{counts['missing']} (users: high {counts['H']}, medium {counts['M']}, low {counts['L']})")]
    pairs += [("missing, high", name) for name, users in missing.items() if users == "H"]
    pairs += [("approximated", setting) for setting in approximate]
    pairs += [("to correct", problem)] if problem else [("next", f"amfm plan {out}")]
    print_pairs("Arguments of Megatron-LM", pairs)


# The model of Megatron-DeepSpeed whose names a format has; None: ours.
NAMES: dict[str, Literal["pipeline", "plain"] | None] = {
    "deepspeed-universal": None,
    "megatron-deepspeed": "pipeline",
    "megatron-deepspeed-plain": "plain",
}


def export_state(checkpoint: Path, out: Path, file_format: str, *, as_json: bool) -> None:
    """Write master weights and moments for torch Distributed Checkpoint or DeepSpeed's loader, and print what was written."""
    from amfm_foreign_states.dcp import export_dcp
    from amfm_foreign_states.megatron.write import export_megatron
    from amfm_foreign_states.universal import export_universal

    with Waiting("amfm export") as waiting:
        if file_format.startswith("torch-dist"):
            report = export_megatron(checkpoint, out, waiting, is_gpt=file_format.endswith("gpt"))
        else:
            write = export_dcp if file_format == "dcp" else partial(export_universal, gpt=NAMES[file_format])
            report = write(checkpoint, out, waiting)
    if as_json:
        given = {key: value for key, value in asdict(report).items() if value is not None}
        print_json({**given, "path": str(report.path)})
        return
    pairs: list[tuple[str, object]] = [("folder", report.path), ("step", report.step)]
    pairs += [("tensors", f"{report.num_tensors:,}"), ("bytes", f"{report.num_bytes:,}")]
    print_pairs(f"Training state as {file_format}", pairs)
