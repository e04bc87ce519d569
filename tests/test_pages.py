"""What the pages name exists: link targets and headings, paths, `make` targets, `amfm` verbs and flags, settings.

Pages are the Markdown files at the root and below docs/, examples/ and recipes/, and the scripts of recipes/.
Nothing is run: verbs and flags are looked up in the command line's own description, settings in the schema. The examples
under `--help` are checked against the same.
"""

import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from amfm.launch.cli import OLD_OPTIONS, app
from amfm.launch.verbs import PACKAGED, VERBS, load_verb
from amfm.pretrain.config.fields import describe_fields, describe_sections

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "study"))  # whose verb pages name
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "examples", "recipes") for page in ROOT.glob(f"{folder}/**/*.md")),
        *ROOT.glob("recipes/*.sh"),
    ]
)
CURRENT = [page for page in PAGES if page.parent.name != "log"]  # results of a month keep the names of their day
FOLDERS = "benchmarks|configs|data_pipeline|docs|examples|kernels|launch|model|pretrain|recipes|tests"
SECTIONS = sorted({field.key.split(".")[0] for field in describe_fields()})

FENCE = re.compile(r"^```.*?^```\s*?$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w./<{{$-])(?:{FOLDERS})/[\w./*-]*[\w*/]")
# Settings as the pages write them: `train.steps`, `launch.slurm.*`; not files, modules or calls.
SETTING = re.compile(rf"(?:{'|'.join(SECTIONS)})(?:\.(?:[a-z_0-9]+|\*))+")
# The example mixer that docs/mixers.md writes.
EXAMPLES = {"model.mixers.halving", "optimizer.lr"}  # the second is torchtitan's
# Flags of other programs that pages name, and of our recipes.
FOREIGN_FLAGS = {
    *("--toy", "--mem", "--dependency", "--cpus-per-task", "--container-image", "--container-mounts"),
    *("--model", "--model_args", "--include_path", "--batch_size"),  # lm_eval
    *("--logdir", "--reports"),  # tensorboard, tests.faults.table
    *(
        "--no-pipeline-parallel",
        "--swiglu",
        "--squared-relu",
        "--untie-embeddings-and-output-weights",
    ),  # Megatron-DeepSpeed
    *("--global-batch-size", "--micro-batch-size", "--data-path", "--split", "--moe-router-force-load-balancing"),
    *("--transformer-impl", "--expert-model-parallel-size", "--no-load-optim"),  # Megatron-LM
    "--seed-offset",  # of our tests
    *(option for options in OLD_OPTIONS.values() for option in options),
}

# That CONTRIBUTING says there is none of, and that a stranger may leave in a shared folder.
ANYBODYS = {"utils.py", "json.py", "numpy.py", "pydantic.py"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
every_current_page = pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_lines(page: Path) -> Iterator[str]:
    """Inline code, and the lines of fenced blocks with continued lines joined and comments cut."""
    text = read(page) if page.suffix == ".md" else f"```\n{read(page)}\n```"
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines()[1:-1]:
            yield re.sub(r"(^|\s)#.*", "", line).strip()
    yield from SPAN.findall(FENCE.sub("", text))


@cache
def source_files() -> set[str]:
    """The names of all Python files, for pages that name one without its folder."""
    return {path.name for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.py")}


@cache
def command_line() -> typer.core.TyperGroup:
    command = typer.main.get_command(app)
    command.commands = {name: load_verb(name) for name, (_, file, _) in VERBS.items() if file != PACKAGED}
    sys.path.insert(0, str(ROOT / "examples/study"))
    command.commands["study"] = typer.main.get_command(importlib.import_module("amfm_study.ladder.verb").study)
    command.commands |= {
        name: load_verb(name) for name in ("convert", "tasks", "compact", "replay", "serve", "profile")
    }
    return command


@cache
def settings() -> tuple[str, ...]:
    return tuple(row.key for section in describe_sections() for row in (section, *section.fields))


def find_command(words: list[str]) -> tuple[typer.core.TyperCommand | None, list[str]]:
    """The command that `words` (after `amfm`) name, and the words after its name; None if there is no such verb."""
    command = command_line()
    while hasattr(command, "commands"):
        words = words[1:] if words[:1] == ["--traceback"] else words
        if not words or not re.fullmatch(r"[a-z][a-z-]*", words[0]):
            return command, words  # `amfm --help`, `amfm bench ...`
        if words[0] not in command.commands:
            return None, words
        command, words = command.commands[words[0]], words[1:]
    return command, words


@cache
def flags_of(command: object) -> set[str]:
    params = getattr(command, "params", [])
    return {flag for param in params for flag in (*param.opts, *param.secondary_opts)} | {"-h", "--help"}


@cache
def all_commands() -> list[typer.core.TyperCommand]:
    found = [command_line()]
    for command in found:
        found.extend(getattr(command, "commands", {}).values())
    return found


@cache
def programs() -> dict[str, typer.core.TyperCommand]:
    """The programs of a clone, by module: `python -m benchmarks.NAME` and the soak."""
    modules = [
        f"benchmarks.{name}" for name in re.findall(r"benchmarks\.(\w+)", read(ROOT / "docs/benchmarks/README.md"))
    ]
    found = {}
    for module in {*modules, "tests.soak"}:
        is_folder = (ROOT / module.replace(".", "/")).is_dir()
        source = importlib.import_module(f"{module}.__main__" if is_folder else module)
        application = typer.Typer()
        application.command()(getattr(source, module.split(".")[-1]))
        found[module] = typer.main.get_command(application)
    return found


@cache
def all_flags() -> set[str]:
    return set().union(*(flags_of(command) for command in (*all_commands(), *programs().values())))


def commands_in(line: str) -> Iterator[list[str]]:
    """The words after each `amfm` of a line, up to what ends a command."""
    for part in re.split(r"\s*(?:&&|\|\||;|\s\|\s|, then )\s*", line):
        found = re.search(r"(?:^|[\s(])(?:\.venv/bin/)?amfm (.+)$", part)
        if found:
            try:
                yield shlex.split(found[1])
            except ValueError:
                yield found[1].split()


def unknown_in(line: str) -> list[str]:
    """What is wrong with the commands of a line, in words."""
    wrong = []
    for module, rest in re.findall(r"python -m ((?:benchmarks|tests\.soak)[.\w]*)([^|&;]*)", line):
        if module not in programs() and module != "benchmarks.NAME":
            wrong.append(f"python -m {module}: no such program")
        elif unknown := sorted(set(re.findall(r"(?<=\s)--[a-z][\w-]*", rest)) - flags_of(programs().get(module))):
            wrong.append(f"python -m {module}: no such flag: {unknown}")
    for words in commands_in(line):
        command, rest = find_command(words)
        if command is None:
            wrong.append(f"amfm {' '.join(words)}: no such verb")
            continue
        flags = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        if unknown := sorted(flags - flags_of(command)):
            wrong.append(f"amfm {' '.join(words)}: no such flag: {unknown}")
    return wrong


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in LINK.findall(FENCE.sub("", read(page))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in slugs(file)):
            wrong.append(target)
    assert not wrong, f"{page.relative_to(ROOT)} links to what is not there: {wrong}"


@every_current_page
def test_paths_exist(page: Path) -> None:
    text = re.sub(r"https?://\S+", "", LINK.sub("]()", read(page)))
    named = sorted(set(PATH.findall(text)))
    places = (ROOT, page.parent)  # docs/ has benchmarks/ too
    wrong = [path for path in named if not any(list(place.glob(path.rstrip("/"))) for place in places)]
    modules = {span for span in SPAN.findall(FENCE.sub("", text)) if re.fullmatch(r"\w+\.py", span)}
    wrong += sorted(modules - source_files() - ANYBODYS)
    assert not wrong, f"{page.relative_to(ROOT)} names files that are not there: {wrong}"


@every_current_page
def test_verbs_and_flags_exist(page: Path) -> None:
    wrong = []
    for line in code_lines(page):
        if re.match(r"\w+Error: ", line):  # words of another program, which may name ours
            continue
        wrong += unknown_in(line)
        is_own = not page.name.startswith("from_")  # pages with the flags of another program
        if is_own and re.fullmatch(r"--[a-z][\w-]*( .*)?", line) and line.split()[0] not in all_flags() | FOREIGN_FLAGS:
            wrong.append(f"{line}: no verb has this flag")
    assert not wrong, f"{page.relative_to(ROOT)}: {wrong}"


def test_examples_of_help_name_files_verbs_and_flags_that_exist() -> None:
    examples = [command.epilog for command in all_commands() if command.epilog]
    assert len(examples) > 20
    paths = {path for example in examples for path in PATH.findall(example)}
    wrong = sorted(path for path in paths if not any(ROOT.glob(path)))
    wrong += [words for example in examples for words in unknown_in(example.removeprefix("Example: "))]
    assert not wrong, f"--help names what is not there: {wrong}"


@every_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    named = {found for line in code_lines(page) for found in re.findall(r"(?:^|\s)make ([a-z-]+)", line)}
    assert named <= targets, f"{page.relative_to(ROOT)} names no target of the Makefile: {named - targets}"


@every_current_page
def test_settings_exist(page: Path) -> None:
    wrong = []
    text = FENCE.sub("", read(page))
    if page.name.startswith("from_"):
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)  # a first column of another program's names
    for span in SPAN.findall(text):
        name = re.split(r"[=: ]", span)[0]
        if (
            SETTING.fullmatch(name)
            and name not in EXAMPLES
            and not name.endswith((".py", ".yaml"))
            and not is_setting(name)
            and not is_python(name)
        ):
            wrong.append(name)
    assert not wrong, f"{page.relative_to(ROOT)} names settings that do not exist: {wrong}"


def is_setting(name: str) -> bool:
    """Whether the schema has this key or section; `data.sources.0.paths` is written for `data.sources.*.paths`."""
    wanted = re.sub(r"\.\d+(?=\.|$)", ".*", name.removesuffix(".*"))
    return any(key == wanted or key.startswith(wanted + ".") for key in settings())


def is_python(name: str) -> bool:
    """Whether the dotted name is a module of ours, or a name that a module's source defines."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    module, _, attribute = name.rpartition(".")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py")
    return source.exists() and re.search(rf"\b{attribute}\b", source.read_text()) is not None


def test_every_event_that_a_run_records_is_on_the_page_of_events() -> None:
    calls = re.compile(r"\b(?:record_event|write_event|tell)\(\s*\"([a-z_]+)\"")
    recorded = {name for path in ROOT.glob("pretrain/**/*.py") for name in calls.findall(path.read_text())}
    listed = set(re.findall(r"`([a-z_]+)`", (ROOT / "docs/metrics.md").read_text().partition("## events.jsonl")[2]))
    assert len(recorded) > 20 and recorded <= listed, recorded - listed


def test_tests_that_the_pages_of_trials_name_exist() -> None:
    pages = [(ROOT / f"docs/benchmarks/{name}.md").read_text() for name in ("operator", "researcher")]
    named = {pair for page in pages for pair in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)}
    assert len(named) > 32
    assert not [each for each in named if f"def {each[1]}" not in (ROOT / each[0]).read_text()]


def test_every_section_of_the_reference_is_listed_once_with_its_table() -> None:
    sections = re.split(r"\n(?=## )", read(ROOT / "docs/configuration.md"))[1:]
    headings = [section.splitlines()[0] for section in sections]
    assert len(headings) == len(set(headings)) > 60
    without = {heading for heading, section in zip(headings, sections) if "| key | type |" not in section}
    of_packages = {
        "## `model.mixers`",
        "## `optimizer.options`",
        "## `schedule.options`",
        "## `hooks`",
        "## `model.moe.router_options`",
        "## `model.variants`",
    }
    assert without == of_packages
    assert not re.search(r"^\| `[^|]+` \| text ", read(ROOT / "docs/configuration.md"), re.MULTILINE)
