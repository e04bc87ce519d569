"""Nothing runs from data: what the product may not call, wherever it reads a file. Files that try it are in the tests of each reader."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("launch", "pretrain", "model", "kernels", "data_pipeline", "examples", "benchmarks")
MARKS = re.compile(r"\.load\b|Unpickler|PackageImporter|allow_pickle|trust_remote_code|weights_only")
# Bases of an unpickler: only one whose names are a list.
UNPICKLERS = {"examples/foreign_states/amfm_foreign_states/dcp_folder.py"}


def test_no_file_is_loaded_in_a_way_that_runs_what_it_names() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, what in faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert not found


def test_what_would_run_a_file_is_found() -> None:
    bad = (
        "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=not safe)", "torch.jit.load(p)",
        "jit.load(p)", "torch.package.PackageImporter(p)", "pickle.Unpickler(f).load()", "numpy.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)", "tensor = torch.load",
    )  # fmt: skip
    assert [text for text in bad if not list(faults(text, "a.py"))] == []
    assert not list(faults("torch.load(p, weights_only=True); numpy.load(p); json.load(f)", "a.py"))


def test_only_start_ray_starts_ray_which_keeps_the_working_directory_from_its_workers() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES[:5]
        for path in (ROOT / package).rglob("*.py")
        if "ray.init(" in path.read_text(encoding="utf-8")
    }
    assert found == {"data_pipeline/prepare/ray_actors.py"}


# What gives a file its final name: a name that is random, or must not exist, and a folder that only its owner may enter.
RENAMES = {
    "data_pipeline/durable/files.py": "replacing(), for all others",
    "data_pipeline/store/node_cache.py": "in a folder of mode 700",
    "data_pipeline/store/part_writer.py": "a folder that mkdir made",
    "kernels/runtime/native.py": "in a folder of mode 700",
    "kernels/runtime/user_cache.py": "kernels import no other package; opened with x",
    "pretrain/checkpoint/commit.py": "folders that mkdir made",
    "pretrain/checkpoint/remote.py": "a folder that mkdir made",
    "pretrain/checkpoint/files.py": "opened with x",
    "pretrain/export/export.py": "a folder that mkdir made",
    "pretrain/export/files.py": "a folder that mkdir made",
    "pretrain/hooks/trace_choices.py": "opened with x",
    "pretrain/monitor/heartbeat.py": "opened with x",
    "pretrain/rollback.py": "a folder that mkdir made; files and folders of the run, which have their names already",
}


def test_files_get_their_names_where_no_link_in_a_temporary_name_is_followed() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES[:5]
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"\.(replace|rename)\(", text := path.read_text(encoding="utf-8"))
        and any(is_rename(node) for node in ast.walk(ast.parse(text)))
    }
    assert found == RENAMES.keys()


def is_rename(node: ast.AST) -> bool:
    """os.replace and os.rename, and those of a path: one argument, where text takes two and dataclasses keywords."""
    if not (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("replace", "rename")
    ):
        return False
    return ast.unparse(node.func.value) == "os" or (len(node.args) == 1 and not node.keywords)


def test_each_promise_about_untrusted_input_names_its_test() -> None:
    page = (
        (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## What is not trusted")[2].partition("\n## ")[0]
    )
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        assert len(row) == 4 and all(row), row[0]
        tests = re.findall(r"`(tests/[\w/]+\.py)`", row[3])
        assert tests and all((ROOT / test).is_file() for test in tests), row[0]


def faults(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Lines with what loads a file and may run what is in it. Pickle's functions, eval, exec and YAML are ruff's rules S."""
    if not MARKS.search(source):
        return
    tree = ast.parse(source)
    safe = {
        id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and "weights_only=True" in keywords(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for word in {"allow_pickle=True", "trust_remote_code=True", "weights_only=False"} & keywords(node):
                yield node.lineno, word
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name == "torch.load" and id(node) not in safe:
                yield node.lineno, "torch.load without weights_only=True"
            if name.endswith(("jit.load", "torch.package.PackageImporter")):
                yield node.lineno, name
            if name.endswith("Unpickler") and path not in UNPICKLERS:
                yield node.lineno, name


def keywords(node: ast.Call) -> set[str]:
    return {f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords}
