"""`amfm import megatron-args`: a configuration out of the arguments of Megatron-LM, and a summary of what became of them."""

from __future__ import annotations

from pathlib import Path

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.launch.console import print_json, print_pairs

WORD = "megatron-args"


def import_arguments(source: Path, out: Path | None, *, as_json: bool) -> None:
    """Write OUT.yaml and print how many arguments are equal, in another form, missing and not known.

    Raises ValueError if OUT exists or the arguments describe no model.
    """
    from amfm.pretrain.config.file import load_config
    from amfm.pretrain.exchange.megatron_arguments.sources import read_arguments
    from amfm.pretrain.exchange.megatron_arguments.translation import translate
    from amfm.pretrain.exchange.megatron_arguments.write import flag, summarize, write_yaml

    if out is None or out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"amfm import {WORD} needs a source and a file to write: amfm import {WORD} train.sh run.yaml")
    if out.exists():
        raise ValueError(f"{out} exists; name another file, or delete it")
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
