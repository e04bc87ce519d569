"""The verbs of `amfm`, in the order of its help, and where each is: the verb that is called is the only one that is imported.

The first paragraph of a verb's help is written only here, so that the list answers without the verbs: `load_verb` puts it
in place of the first paragraph of the function's docstring.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from amfm.launch.existing import load_packaged

PACKAGED = "examples"
# Name -> panel of the list, file below launch/commands, first paragraph of its help. A verb of `PACKAGED` comes with a package of
# examples/ (entry point group `amfm.verbs`, a function or a typer application); `load_packaged` loads parts of verbs too.
VERBS = {
    "init": (
        "Start",
        "config",
        "Write a first configuration that is valid and predicted to fit; asks for what is not given.",
    ),
    "config": (
        "Start",
        "config",
        "Check a configuration and print it resolved, with `extends`, overrides and defaults applied.",
    ),
    "recipes": ("Start", "config", "List the recipes that come with amfm, or print the path of one."),
    "doctor": ("Start", "doctor", "Check this machine, or every host with --cluster, and suggest fixes."),
    "sample-data": (
        "Data",
        "data",
        "Download a sample text from the package registry, or collect one without a network; does nothing if it exists.",
    ),
    "prepare": (
        "Data",
        "data",
        "Train or load the tokenizer and write the token store from all sources; does only what is missing.",
    ),
    "inspect": ("Data", "data", "Identify a folder and verify its checksums; exit code 2 if something is wrong."),
    "train": (
        "Train",
        "train",
        "Train, or resume from run.dir. A signal, Ctrl-C and train.stop_after_steps save and end the run.",
    ),
    "report": ("Train", "train", "Write one HTML page with interactive curves, expert load, events and configuration."),
    "rollback": (
        "Train",
        "rollback",
        "Go back to step N: later checkpoints are set aside, in the run directory and in its store; nothing is deleted.",
    ),
    "fork": (
        "Train",
        "rollback",
        "Branch off a run: OUT continues from a checkpoint with other settings, such as an annealing stage; RUN stays.",
    ),
    "replay": (
        "Train",
        PACKAGED,
        "Compute a step of a run again and compare loss, gradient norm and weights bitwise (a package: examples/replay).",
    ),
    "watch": (
        "Train",
        "watch",
        "Show a run live, from any machine that sees its directory: progress, speed, ranks, checkpoints, outcome.",
    ),
    "runs": (
        "Train",
        "watch",
        "List the runs of a folder in a table: state, step, loss, speed, time, and whether each is well.",
    ),
    "distill": (
        "Train",
        "merge",
        "Store a teacher's likeliest tokens for every sample of a run, which then learns from them (docs/distillation.md).",
    ),
    "plan": (
        "Scale",
        "plan",
        "Estimate parameters, FLOPs, memory and time of a run, and the layouts that fit, before you rent GPUs.",
    ),
    "launch": (
        "Scale",
        "launch",
        "Start a run on many nodes and restart it from the newest checkpoint after failures, on fewer nodes if necessary.",
    ),
    "profile": (
        "Scale",
        PACKAGED,
        "Show where the time of a traced step went, by kind of work, block and operation (a package: examples/profile).",
    ),
    "bench": (
        "Scale",
        "doctor",
        "Measure this machine's kernels.",
    ),
    "evaluate": (
        "Use a model",
        "evaluate",
        "Measure loss and perplexity on a split of a store, accuracy on a synthetic task, or tasks of lm-eval.",
    ),
    "tasks": (
        "Use a model",
        PACKAGED,
        "Make small lm-eval tasks from a store's held-out text: choice, completion, perplexity (a package: examples/tasks).",
    ),
    "generate": (
        "Use a model",
        "evaluate",
        "Generate text from a prompt. The recurrent state is kept, so the cost per token does not grow with the text.",
    ),
    "serve": (
        "Use a model",
        PACKAGED,
        "Serve a model with an OpenAI-compatible API (completions, chat completions, streaming) and a page to try it (a package: examples/serve).",
    ),
    "export": ("Use a model", "export", "Write a transformers checkpoint and verify its logits in a fresh process."),
    "import": (
        "Use a model",
        "importing",
        "Import a transformers checkpoint or another program's training state, to continue, export or use it.",
    ),
    "merge": (
        "Use a model",
        "merge",
        "Merge checkpoints: write the mean of their weights, often better than the last one before the rate decays.",
    ),
    "compact": (
        "Use a model",
        PACKAGED,
        "Remove channels, experts and heads that pruning set to zero, and compare the logits (a package: examples/compact).",
    ),
    "convert": (
        "Use a model",
        PACKAGED,
        "Replace a trained model's attention by other mixers: transfer, tune, measure, write weights (a package: examples/convert).",
    ),
    "study": ("Use a model", PACKAGED, "Train grids of small models and compare them (a package: examples/study)."),
}


class Verbs(TyperGroup):
    """The group of all verbs: names and first lines, until one is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {
            name: TyperCommand(name, help=text, rich_help_panel=panel) for name, (panel, _, text) in VERBS.items()
        }

    def resolve_command(self, context: Any, words: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the verb that `words` begin with, and import it."""
        name, command, rest = super().resolve_command(context, words)
        return name, load_verb(name) if name else command, rest


def load_verb(name: str) -> Any:
    """Import a verb as a command; flags of it, and of what is below it, have no type in help: typer writes `<bool>`, as if a
    value followed. Raises ValueError for one whose package is not installed.
    """
    _, file, text = VERBS[name]
    part = typer.Typer()
    if file == PACKAGED:
        loaded = load_packaged(name, name)
        if isinstance(loaded, typer.Typer):
            part.add_typer(loaded, name=name)
        else:
            part.command()(loaded)
    else:
        import_file(file).add_verbs(part)
    command = typer.main.get_group(part).commands[name]
    _, gap, rest = (command.help or "").partition("\n\n")
    command.help = text + gap + rest
    return without_types_of_flags(command)


def import_file(name: str) -> Any:
    """Import a file of `VERBS`; written out, so that contracts of imports see them."""
    module: Any
    match name:
        case "config":
            from amfm.launch.commands import config as module
        case "doctor":
            from amfm.launch.commands import doctor as module
        case "data":
            from amfm.launch.commands import data as module
        case "plan":
            from amfm.launch.commands import plan as module
        case "train":
            from amfm.launch.commands import train as module
        case "rollback":
            from amfm.launch.commands import rollback as module
        case "watch":
            from amfm.launch.commands import watch as module
        case "launch":
            from amfm.launch.commands import launch as module
        case "evaluate":
            from amfm.launch.commands import evaluate as module
        case "export":
            from amfm.launch.commands import export as module
        case "importing":
            from amfm.launch.commands import importing as module
        case "merge":
            from amfm.launch.commands import merge as module
        case _:
            raise KeyError(name)
    return module


def without_types_of_flags(command: Any) -> Any:
    """Return a command whose help, and that of those below it, gives flags no type."""
    original = command.get_params

    def get_params(context: Any) -> Any:
        parameters = original(context)
        for parameter in parameters:
            if getattr(parameter, "is_flag", False) and parameter.metavar is None:
                parameter.metavar = ""
        return parameters

    command.get_params = get_params
    for child in getattr(command, "commands", {}).values():
        without_types_of_flags(child)
    return command
