"""`amfm import megatron-args` and `blend`: a configuration out of the arguments or the blend file of Megatron-LM, and a summary."""

from __future__ import annotations

from pathlib import Path

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.launch.console import print_json, print_pairs

WORD, BLEND = "megatron-args", "blend"


def import_words(word: str, source: Path, out: Path | None, *, as_json: bool) -> None:
    """Write OUT.yaml out of what the word says that SOURCE is. Raises ValueError if OUT exists, and as the readers do."""
    if out is None or out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"amfm import {word} needs a source and a file to write: amfm import {word} SOURCE run.yaml")
    if out.exists():
        raise ValueError(f"{out} exists; name another file, or delete it")
    (import_arguments if word == WORD else import_blend)(source, out, as_json=as_json)


def import_blend(source: Path, out: Path, *, as_json: bool) -> None:
    """Write the sources of a blend file, with its validation sets, and print how many there are."""
    import yaml

    from amfm.pretrain.foreign_states.megatron_arguments.blend import read_blend

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
    from amfm.pretrain.foreign_states.megatron_arguments.sources import read_arguments
    from amfm.pretrain.foreign_states.megatron_arguments.translation import translate
    from amfm.pretrain.foreign_states.megatron_arguments.write import flag, summarize, write_yaml

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
