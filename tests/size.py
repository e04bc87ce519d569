"""Sizes that stay small by rule: `python tests/size.py [COMMIT]` prints lines of Python by package.

Without a commit it also checks the working tree, and ends with 1 where a rule is broken: the loop and the step stay
readable at a glance, a folder is a list that one can keep in mind, and so is what the loop reaches by imports at the top of
files. What only one setting needs is imported where that setting is read.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path, PurePosixPath
from statistics import median

ROOT = Path(__file__).parents[1]
PRODUCT = ("launch", "pretrain", "model", "kernels", "data_pipeline")
BESIDE = ("benchmarks", "tests", "examples")
LONGEST = {("pretrain/train.py", "run_steps"): 25, ("pretrain/step.py", "train_step"): 60}
MOST_FILES = 25  # of a folder, __init__.py apart
TRAINING_PATH = PurePosixPath("pretrain/train.py")
MOST_REACHED = 31_312  # lines that TRAINING_PATH reaches; lower it when it can be
LONG, MOST_LONG = 400, 0  # lines of a file of the product, and files that have more: split them by idea
SMALL, MOST_SMALL = 60, 24  # files with fewer, which are read only with a neighbour: join it
MOST_PRODUCT_LINES = 104_000  # what few need is a package of examples/, behind an entry point
MOST_PRODUCT_FILES, LEAST_MEDIAN = 581, 186  # of the product, the second in lines of a file: joins move both
# Branches on a block's symbol or on a mixer's class, where a question to its options or its mixer would do. Loops are none.
BRANCH = re.compile(r"""(==|in) *["'(]+[ME*-]["',)]|(letter|symbol) *(==|in) |isinstance\([^)]*Mixer""")
LOOP = re.compile(r"\bfor [^:]*(letter|symbol) in ")
PARSER = PurePosixPath("model/config/pattern.py")  # of patterns, where a symbol is one of the text
MOST_BRANCHES = {"model": 15, "pretrain": 4, "launch/plan": 4}  # falling only


def count_lines(commit: str | None) -> dict[PurePosixPath, int]:
    """Lines of each Python file that git knows, of a commit or of the working tree; empty files are left out."""
    command = ["git", "grep", "--count", "", *([commit] if commit else []), "--", "*.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [line.removeprefix(f"{commit}:").rsplit(":", 1) for line in found]
    return {PurePosixPath(path): int(lines) for path, lines in pairs}


def print_sizes(lines: dict[PurePosixPath, int]) -> None:
    """Print files and lines of each package, and of the product."""
    sizes: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for path, number in lines.items():
        sizes[path.parts[0]] += number
        files[path.parts[0]] += 1
    for name in PRODUCT:
        print(f"{name:<14}{files[name]:>5} files{sizes[name]:>8,} lines")
    print(f"{'product':<14}{sum(files[n] for n in PRODUCT):>5} files{sum(sizes[n] for n in PRODUCT):>8,} lines")
    for name in BESIDE:
        print(f"{name:<14}{files[name]:>5} files{sizes[name]:>8,} lines")


def long_functions() -> list[str]:
    """Functions of `LONGEST` that are too long, or are not where they were."""
    problems = []
    for (path, name), most in LONGEST.items():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        if not found:
            problems.append(f"{path} has no {name}: say in tests/size.py where it is")
        for node in found:
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > most:
                problems.append(f"{path}: {name} has {length} lines, at most {most}; side features are hooks")
    return problems


def reached_files(start: PurePosixPath, lines: dict[PurePosixPath, int]) -> set[PurePosixPath]:
    """Files of the product that a file reaches by imports at the top of files, itself among them."""
    found, waiting = {start}, [start]
    while waiting:
        tree = ast.parse((ROOT / waiting.pop()).read_text(encoding="utf-8"))
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names] + [str(node.module)]
            places = [PurePosixPath(*name.split(".")[1:]) for name in names if name.startswith("amfm.")]
            paths = {path for place in places for path in (place.with_suffix(".py"), place / "__init__.py")}
            new = paths & lines.keys() - found
            found |= new
            waiting += new
    return found


def long_training_path(lines: dict[PurePosixPath, int]) -> list[str]:
    """Print what the loop of training reaches; a problem where it is too much."""
    reached = reached_files(TRAINING_PATH, lines)
    number = sum(lines[path] for path in reached)
    print(f"{TRAINING_PATH} reaches {len(reached)} files, {number:,} lines")
    if number <= MOST_REACHED:
        return []
    return [
        f"{TRAINING_PATH} reaches {number:,} lines, at most {MOST_REACHED:,}; import what few runs need where its setting is read"
    ]


def branches_on_blocks(lines: dict[PurePosixPath, int]) -> list[str]:
    """Packages with more branches on letters and classes of mixers than they had."""
    problems = []
    for package, most in MOST_BRANCHES.items():
        own = [path for path in lines if path.is_relative_to(package) and path != PARSER]
        texts = [(ROOT / path).read_text(encoding="utf-8") for path in own]
        found = [line for text in texts for line in text.splitlines() if BRANCH.search(line) and not LOOP.search(line)]
        if len(found) > most:
            problems.append(f"{package} branches on a block's letter or class in {len(found)} places, at most {most}")
    return problems


def odd_files(lines: dict[PurePosixPath, int]) -> list[str]:
    """Print the median of the product's files; problems where they are more, or more are long or small, than there were."""
    sizes = {path: number for path, number in lines.items() if path.parts[0] in PRODUCT and path.name != "__init__.py"}
    long = sorted(str(path) for path, number in sizes.items() if number > LONG)
    small = sum(number < SMALL for number in sizes.values())
    middle, number = median(sizes.values()), sum(path.parts[0] in PRODUCT for path in lines)
    print(f"median of a file {middle:.0f} lines, {len(long)} above {LONG}, {small} below {SMALL}")
    problems = []
    if (total := sum(sizes.values())) > MOST_PRODUCT_LINES:
        problems.append(
            f"the product has {total:,} lines, at most {MOST_PRODUCT_LINES:,}; move what few need to examples/"
        )
    if number > MOST_PRODUCT_FILES or middle < LEAST_MEDIAN:
        problems.append(
            f"{number} files of the product (at most {MOST_PRODUCT_FILES}) with a median of {middle:.0f} lines (at least "
            f"{LEAST_MEDIAN}); join what is read only with a neighbour"
        )
    if len(long) > MOST_LONG:
        problems.append(f"{', '.join(long)} have more than {LONG} lines, at most {MOST_LONG} may; split one by idea")
    if small > MOST_SMALL:
        problems.append(f"{small} files have fewer than {SMALL} lines, at most {MOST_SMALL}; join one to its neighbour")
    return problems


def full_folders(lines: dict[PurePosixPath, int]) -> list[str]:
    """Folders with too many Python files."""
    files = Counter(path.parent for path in lines if path.name != "__init__.py" and path.parts[0] in PRODUCT + BESIDE)
    return [
        f"{folder} holds {number} files, at most {MOST_FILES}; move what belongs together into a folder"
        for folder, number in sorted(files.items())
        if number > MOST_FILES
    ]


def main(commit: str | None) -> int:
    """Print sizes, and for the working tree what breaks a rule; returns the exit code."""
    lines = count_lines(commit)
    print_sizes(lines)
    problems = [] if commit else long_functions() + full_folders(lines)
    problems += [] if commit else long_training_path(lines) + branches_on_blocks(lines) + odd_files(lines)
    for problem in problems:
        print(f"too large: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
