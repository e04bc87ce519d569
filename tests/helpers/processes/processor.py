"""Counts the processor seconds of `make test`, and fails CI where they have grown by a tenth.

Seconds of a processor hardly depend on how many workers there are or how long they wait, as seconds of a clock do. What
they depend on is taken out as far as it can be measured, and where it cannot be, nothing is judged:

- a slower processor: a sample of the same kind of work (Python that compiles, small arrays) is timed every ten seconds in
  each worker. Seconds are scaled to the sample that was recorded with the number in pyproject.toml. Both the scaled and the
  counted seconds must be above the limit, so a fast processor is not asked for more, and one on which the sample takes
  1.3 times as long is too different to tell;
- other programs: they share caches and cores. Where they took more than a tenth of what the tests took, `/proc/stat`
  shows it, and nothing is judged.

With `--processor-seconds` files run longest first, by tests/seconds.json. `--processor-seconds record` rewrites that file,
scaled to the sample of pyproject.toml as well, and prints the number for there.
"""

from __future__ import annotations

import argparse
import json
import marshal
import os
import resource
import shlex
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from tests.helpers.processes import zygote

ROOT = Path(__file__).parents[3]
RECORD = ROOT / "tests" / "seconds.json"
PROPERTY = "processor_seconds"
SAMPLE_EVERY_SECONDS = 10.0
MOST_SLOWER = 1.3
MOST_OTHERS = 0.1
ALLOWED_GROWTH = 1.1
LEAST_RECORDED = 0.5  # seconds of a file; shorter ones run last, in their order
WORKER = f"{shlex.quote(sys.executable)} -m tests.helpers.processes.forked_worker"  # in place of an interpreter
_SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")[:20_000].rpartition("\n    def ")[0]


@dataclass(frozen=True)
class Seconds:
    """Processor seconds of a whole run, of its sample, and of other programs in the meantime."""

    counted: float
    sample: float
    others: float = 0.0


def judge(found: Seconds, recorded: Seconds) -> tuple[str, bool]:
    """What is printed about a run, and whether it is above the limit."""
    scaled = found.counted * recorded.sample / found.sample
    limit = ALLOWED_GROWTH * recorded.counted
    text = (
        f"{found.counted:.0f} s of the processor, {scaled:.0f} s scaled to the sample of pyproject.toml "
        f"({found.sample * 1e3:.1f} ms here, {recorded.sample * 1e3:.1f} there); limit {limit:.0f} s"
    )
    if found.others > MOST_OTHERS * found.counted:
        return f"{text}; not judged: other programs took {found.others:.0f} s", False
    if found.sample > MOST_SLOWER * recorded.sample:
        return f"{text}; not judged: this processor is too different", False
    return text, min(found.counted, scaled) > limit


def grown_most(files: Mapping[str, float], recorded: Mapping[str, float], scale: float) -> list[str]:
    """Ten files that grew most compared with the record, with seconds scaled to it."""
    growth = {file: seconds * scale - recorded.get(file, 0.0) for file, seconds in files.items()}
    most = sorted((file for file in growth if growth[file] > LEAST_RECORDED), key=lambda file: -growth[file])
    return [f"{growth[file]:+6.1f} s  {file} ({recorded.get(file, 0.0):.1f} s before)" for file in most[:10]]


def longest_first(items: list[pytest.Item], recorded: Mapping[str, float]) -> None:
    """Order whole files by the record; those that it lacks come last, in their order."""
    items.sort(key=lambda item: -recorded.get(file_of(item.nodeid), 0.0))


def file_of(nodeid: str) -> str:
    """The file of a test."""
    return nodeid.partition("::")[0]


def time_sample() -> float:
    """Processor seconds of this thread for a fixed piece of work, about 20 ms."""
    begun = time.thread_time()
    x = np.ones((64, 64), np.float32)
    for _ in range(3):
        marshal.loads(marshal.dumps(compile(_SOURCE, "sample", "exec")))
        for _ in range(50):
            x = np.tanh(x @ x * np.float32(1e-2)) + np.float32(1)
    return time.thread_time() - begun


def seconds_of(who: int) -> float:
    """Processor seconds of this process, or of its children that have ended."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def machine_seconds() -> float:
    """Seconds that all processors of this machine were busy since it started; 0 where the system does not report them."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0
    user, nice, system, _idle, _wait, *interrupts = map(int, file.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


class Worker:
    """In a process that runs tests: seconds of each test go out with its last report, samples at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.samples: list[float] = []
        self.sampled = 0.0
        self.mark = 0.0

    def used(self) -> float:
        """Seconds of this process, of its children, and of what was forked for it."""
        return seconds_of(resource.RUSAGE_SELF) + seconds_of(resource.RUSAGE_CHILDREN) + zygote.forked_seconds()

    def pytest_collection_finish(self) -> None:
        """Begin to count."""
        self.mark = self.used()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add what was used since the last test's end."""
        report = yield
        if call.when == "teardown":
            if time.monotonic() - self.sampled > SAMPLE_EVERY_SECONDS:
                self.samples.append(time_sample())
                self.sampled = time.monotonic()
            now = self.used()
            report.user_properties.append((PROPERTY, round(now - self.mark, 3)))
            self.mark = now
        return report

    def pytest_sessionfinish(self) -> None:
        """Give samples to the process that started this one."""
        self.config.workeroutput["samples"] = self.samples  # type: ignore[attr-defined]


class Master:
    """In the process that starts workers: the processes to fork them and ranks from, the sums, and the verdict."""

    def __init__(self, config: pytest.Config) -> None:
        self.mode: str | None = config.getoption("processor_seconds")
        self.files: Counter[str] = Counter()
        self.samples: list[float] = []
        self.lines: list[str] = []
        self.busy = machine_seconds()
        forks_workers = Path.cwd() == ROOT and config.option.tx == ["popen"] * len(config.option.tx)
        os.environ[zygote.ADDRESS], self.end = zygote.start(config.args if forks_workers else ())
        if forks_workers:
            config.option.tx = [f"popen//python={WORKER}"] * len(config.option.tx)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a test's seconds to its file's."""
        if report.when == "teardown":
            self.files[file_of(report.nodeid)] += dict(report.user_properties).get(PROPERTY, 0.0)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take a worker's samples."""
        self.samples += getattr(node, "workeroutput", {}).get("samples", [])

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """Once all processes have ended, count and judge."""
        yield
        self.end()
        if self.mode is None or not self.samples:
            return
        counted = seconds_of(resource.RUSAGE_SELF) + seconds_of(resource.RUSAGE_CHILDREN)
        found = Seconds(counted, median(self.samples), max(0.0, machine_seconds() - self.busy - counted))
        recorded, files = read_record()
        scale = recorded.sample / found.sample
        if self.mode == "record":
            self.lines = write_record(found, self.files, scale)
            return
        text, is_over = judge(found, recorded)
        self.lines = [text, *grown_most(self.files, files, scale)]
        if is_over and os.environ.get("CI") == "true":
            self.lines.append(
                "FAILED: make tests cheaper, or record what they cost now and say why: make test RECORD=1"
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print them."""
        for line in self.lines:
            terminalreporter.write_line(line)


def read_record() -> tuple[Seconds, dict[str, float]]:
    """The numbers of pyproject.toml, and seconds by file."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["amfm"]["tests"]
    return Seconds(table["processor_seconds"], table["sample_seconds"]), json.loads(RECORD.read_text())


def write_record(found: Seconds, files: Mapping[str, float], scale: float) -> list[str]:
    """Write seconds by file, scaled; returns what to print."""
    scaled = {file: round(seconds * scale, 1) for file, seconds in sorted(files.items())}
    kept = {file: seconds for file, seconds in scaled.items() if seconds >= LEAST_RECORDED}
    RECORD.write_text(json.dumps(kept, indent=0) + "\n")
    return [
        "for pyproject.toml, [tool.amfm.tests]:",
        f"processor_seconds = {found.counted * scale:.0f}",
        f"other programs took {found.others:.0f} s meanwhile: record on a quiet machine",
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Count only in whole runs."""
    parser.addoption(
        "--processor-seconds",
        choices=("compare", "record"),
        help="run files longest first, and count processor seconds",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Be what this process is: it starts workers, is one, or runs tests alone and counts nothing."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(config), "processor-worker")
    elif getattr(config.option, "numprocesses", None):
        master = Master(config)
        config.pluginmanager.register(master, "processor-master")
        config.add_cleanup(master.end)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker is alone with one at the end."""
    if config.getoption("processor_seconds"):
        longest_first(items, json.loads(RECORD.read_text()))
