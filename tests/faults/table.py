"""The fault table: every way in which we know that a run can be hurt, and the tests that show what happens then.

`python -m tests.faults.table` prints it and checks that each test exists; `--run` runs them (quick ones; `--slow` all) and
prints a verdict per row, `--reports` takes it from suites that ran. Exit code 1 when a row has no test, or one that fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Row:
    """A fault, what must follow, and the tests that inject it: file::beginning of the test's name."""

    number: int
    fault: str
    outcome: str
    tests: tuple[str, ...]


F, P, L, D = "tests/faults/", "tests/pretrain/", "tests/launch/", "tests/data_pipeline/"
TABLE = (
    Row(1, "stop and resume", "bitwise", ("tests/end_to_end/test_resume.py::", "tests/parallel/test_reshard.py::")),
    Row(2, "kill -9 of a rank in a step", "named, restarted, same end", (F + "test_lost_rank.py::", F + "test_kill_anywhere.py::")),
    Row(3, "kill -9 before each disk operation of a save", "old or new checkpoint", (F + "test_kill_while_saving.py::",)),
    Row(4, "power lost: unsynced bytes and names gone in any order, where a stage begins too", "nothing durable lost", (F + "crash/test_states.py::", F + "test_kill_anywhere.py::")),
    Row(5, "kill -9 of the launcher, in a run too", "its ranks end with it, same end", (F + "test_lost_launcher.py::", F + "test_stage_boundary.py::", "tests/soak/test_soak.py::test_three_minutes")),
    Row(6, "SIGTERM, and more of them during its save", "saved, code 0", (P + "test_train.py::test_a_signal_saves", P + "test_train.py::test_a_signal_to_one_rank", F + "test_signals.py::")),
    Row(7, "full disk, quota, EIO, read-only, stale handle, time-out", "code 3, path named, nothing lost", (F + "test_storage.py::", P + "checkpoint/test_save.py::test_a_disk_that_fills_up", P + "checkpoint/test_save.py::test_a_read_only")),
    Row(8, "a cut file", "named, older checkpoint taken", (P + "checkpoint/test_damage.py::test_a_damaged_checkpoint_is_passed_over",)),
    Row(9, "a flipped bit", "found", (P + "checkpoint/test_damage.py::test_every_flipped_bit",)),
    Row(10, "a lost, foreign or swapped file", "named, older checkpoint taken", (P + "checkpoint/test_damage.py::",)),
    Row(11, "`latest` empty, wrong, dangling", "warning", (P + "checkpoint/test_damage.py::test_latest",)),
    Row(12, "NaN in the gradients of one rank, and a resume before, between and after", "all ranks skip the step, counts continue", (P + "monitor/test_anomalies.py::", F + "test_nan_across_resume.py::")),
    Row(13, "NaN again and again; a loss spike", "stop or rollback", (P + "monitor/test_anomalies.py::",)),
    Row(14, "NaN or another dtype in a checkpoint with a right digest", "rejected", (P + "checkpoint/test_damage.py::test_tensors_of_another_dtype", P + "checkpoint/test_save.py::test_a_state_with_nan")),
    Row(15, "a rank that hangs or is stopped; storage that hangs under the loader or the watchdog", "named, ended", (P + "monitor/test_heartbeat.py::", F + "test_storage.py::test_storage_that_hangs_under_the_loader")),
    Row(16, "a slow rank", "named", (P + "monitor/test_anomalies.py::test_slow_ranks", F + "test_slow_rank.py::")),
    Row(17, "a slow or stuck store while saving", "waits, same end", (F + "test_storage.py::test_slow_storage", P + "checkpoint/test_background.py::")),
    Row(18, "weights change during a background save", "saved as at the call", (P + "checkpoint/test_background.py::",)),
    Row(19, "another layout at the resume", "equal", ("tests/parallel/test_reshard.py::",)),
    Row(20, "parameter groups at another layout", "equal by name", ("tests/parallel/test_reshard.py::",)),
    Row(21, "gradients and norms of layouts", "those of one rank", ("tests/parallel/test_layouts.py::",)),
    Row(22, "other settings at the resume", "rejected with an error", (P + "checkpoint/test_save.py::test_another_run_is_refused",)),
    Row(23, "another tokenizer or store; a damaged tokenizer", "rejected", (P + "test_train.py::test_a_damaged_tokenizer", P + "checkpoint/test_save.py::test_another_run_is_refused")),
    Row(24, "a node lost; two launchers on two hosts; a host that comes back", "waited for, then fewer; one trains, the other ends", (L + "cluster/test_supervise.py::", L + "cluster/test_ray.py::", F + "test_two_launchers.py::")),
    Row(25, "damaged shards of the store; tokens outside the vocabulary", "named, skipped and counted, or stopped", (F + "test_damaged_text.py::", D + "store/test_store.py::", D + "test_verify.py::")),
    Row(26, "ranks with other versions, settings or data", "all reject, code 2", (P + "test_packages.py::",)),
    Row(27, "export: keys, numbers, traps", "verified or rejected", (P + "export/test_export.py::",)),
    Row(28, "leftovers of a killed export", "OUT absent or whole", (P + "export/test_export.py::test_an_export_over", F + "test_killed_export.py::")),
    Row(29, "a prune or a clean-up that fails", "warning, saving continues", (P + "checkpoint/test_save.py::test_what_cannot_be_cleared", P + "checkpoint/test_save.py::test_a_checkpoint_moved_away")),
    Row(30, "a changed journal; files of others in a store", "written again; untouched", tuple(D + "prepare/test_prepare.py::" + name for name in ("test_one_changed_digit", "test_a_journal_line", "test_what_is_not_ours", "test_a_driver_killed"))),
    Row(31, "settings that would become shell, hosts that are options", "rejected, code 2", (L + "cluster/test_lines.py::",)),
    Row(32, "packages of our names in the working directory", "not run", (L + "test_rank_command.py::",)),
    Row(33, "mutated files under every reader", "one message", (F + "test_fuzz.py::", D + "durable/test_json_files.py::", P + "config/test_yaml_tree.py::")),
    Row(34, "a lock or a deletion through a link; a cache of others", "rejected", (D + "durable/test_locks.py::", D + "durable/test_deletion.py::", D + "store/test_node_cache.py::")),
    Row(35, "a flipped bit in memory, in an update, in a computation", "rank named, code 3, nothing of it saved", (P + "hooks/test_state_watch.py::",)),
    Row(36, "an object store damaged, away, or left at any request", "old or new checkpoint", (P + "checkpoint/test_remote.py::",)),
    Row(37, "all of these at random", "the losses of an undisturbed run, bitwise", ("tests/soak/test_soak.py::",)),
    Row(39, "a process that has computed with several threads starts ranks", "not forked: no hang", (L + "cluster/test_local.py::test_a_process_that_has_computed", "tests/recipes/test_recipes.py::test_a_softmax_model")),
    Row(40, "a call that keeps Python's lock; a start that does not end; SIGTERM in it; a rank that is stopped for a while", "ended with its stacks; left alone", (P + "monitor/test_guard.py::", F + "test_in_a_run.py::test_a_hook_that_keeps")),
    Row(41, "no checkpoint where the events report one", "rejected, metrics untouched", (P + "checkpoint/test_damage.py::test_checkpoints_that_are_gone",)),
    Row(42, "EIO, ESTALE, ETIMEDOUT while a checkpoint is read", "read again, then code 3 with path and errno", (P + "checkpoint/test_damage.py::test_storage_that_fails", P + "checkpoint/test_damage.py::test_a_read_that_fails")),
    Row(43, "a plug-in that exits, closes descriptors, lowers limits, moves the run away, turns gradients off", "code 3, same end", (F + "test_in_a_run.py::test_what_ends_a_rank", P + "test_failures.py::test_a_plug_in_that_exits", L + "cluster/test_supervise.py::test_a_code_of_0", P + "hooks/test_table.py::")),
    Row(44, "a rank that the kernel kills for memory; a reader and an actor that are killed", "named, same end", (F + "test_in_a_run.py::test_a_rank_that_the_kernel", D + "loader/test_reader_process.py::test_a_killed", D + "prepare/test_ray_actors.py::test_killed_actors")),
    Row(45, "NaN in one expert; numbers beyond bfloat16; other seeds, umask, environment", "skipped, or code 3; the same losses", (F + "test_in_a_run.py::test_numbers_that_overflow",)),
    Row(46, "a store replaced or removed under a run", "code 3; another one rejected", (F + "test_in_a_run.py::test_a_store_that_is_replaced",)),
    Row(47, "no shared memory, a read-only package", "trains", (F + "test_in_a_run.py::test_a_run_needs_no_shared_memory",)),
    Row(55, "a thread or process that the system rejects", "code 3 with the limits to raise, same end", (F + "test_in_a_run.py::test_a_rank_that_gets_no_further_thread", P + "test_failures.py::test_a_thread_or_process")),
    Row(48, "2,000 steps", "no more memory, descriptors, threads, processes", (F + "test_in_a_run.py::test_two_thousand_steps",)),
    Row(49, "a checkpoint of the oldest format", "loaded", (P + "checkpoint/test_damage.py::test_a_checkpoint_of_version_1",)),
    Row(50, "a link instead of a log, a temporary name, a board; plots on a full disk; a run directory that was moved", "nothing of others written; a warning; named", (P + "monitor/test_metrics.py::test_a_link", P + "monitor/test_metrics.py::test_plots", P + "monitor/test_metrics.py::test_a_run_directory", P + "monitor/test_beats.py::test_what_others", P + "report/test_report.py::test_a_link_in_the_place", D + "store/test_megatron_files.py::test_links_in", L + "cluster/test_ray.py::test_the_log_of_a_rank", "tests/test_untrusted.py::test_files_get_their_names")),
    Row(51, "files of Python's and our names in the working directory, under readers too", "not run", (D + "loader/test_reader_process.py::test_files_of_the_working_directory", L + "test_rank_command.py::test_every_process", D + "prepare/test_ray_actors.py::test_actors_of_a_ray")),
    Row(52, "standard error that takes nothing; control characters; another encoding", "same exit code; written out; explained", (L + "test_cli.py::test_standard_error", L + "test_console.py::test_names_from_elsewhere", L + "commands/test_watch.py::test_events_give", L + "test_cli.py::test_an_override_in")),
    Row(53, "a document without an end, packed small; one of 10^7 tokens, 10^6 tiny ones", "a reject; the tokens of the text", (D + "prepare/test_documents.py::test_a_document_beyond", F + "test_sizes_of_documents.py::")),
    Row(54, "requests in the bodies of rejected ones, half-open connections, prompts without an end, a model that fails", "one answer and the end of the connection", ("tests/examples/serve/test_server.py::test_what_follows", "tests/examples/serve/test_http_server.py::test_connections", "tests/examples/serve/test_server.py::test_what_cannot_take", "tests/examples/serve/test_server.py::test_a_model_that_fails")),
    Row(60, "a write, sync, rename of export, import, merge, prepare, train that fails (ENOSPC, EIO) or is interrupted (EINTR)", "code 3 with the path, OUT absent, again is equal; done again", (F + "writes/test_failing_writes.py::",)),
    Row(61, "mutated files of every kind that is read", "one message, in a gigabyte of memory", (F + "test_fuzz.py::", D + "prepare/test_documents.py::test_arrow_cells")),
    Row(62, "sources of many row groups, documents, rejects, or one line", "read once, however large; rejects leave memory", (D + "prepare/test_documents.py::test_bytes_that_are_read", D + "prepare/test_rejects.py::")),
    Row(63, "shared memory of a node that is full", "a private board, no SIGBUS", (P + "monitor/test_beats.py::test_the_board_s_memory",)),
    Row(64, "SIGTERM of a preparation", "code 3, the same command does what is missing", (L + "commands/test_data.py::test_sigterm", D + "prepare/test_ray_actors.py::test_actors_of_a_ray")),
    Row(65, "a pipe or device instead of a file", "rejected, not waited for", (D + "durable/test_json_files.py::test_a_pipe", D + "prepare/test_sources.py::test_a_pipe")),
    Row(66, "code in a file that is read: TorchScript, pickles, types of Arrow, tags, templates, a transformers folder", "not run; rejected with an error", ("tests/test_hostile_files.py::", "tests/examples/foreign_states/test_hostile.py::", "tests/test_untrusted.py::test_no_file")),
    Row(67, "a part of another store with files of equal sizes, before or while a run reads", "named when it is opened", (D + "store/test_store.py::test_a_part_of_another_store",)),
    Row(68, "weights beyond float32; chunks that overlap and leave a gap; documents that leave out sequences", "rejected with an error, nothing written", (P + "export/test_import_huggingface.py::test_weights_that_are_no_sound", "tests/examples/foreign_states/test_dcp.py::test_weights_beyond", "tests/examples/foreign_states/test_hostile.py::test_chunks_that", D + "store/test_megatron_files.py::test_documents_that_are_none")),
    Row(69, "links to folders under a glob, a file twice in a source, an empty path", "rejected; a warning; rejected", (D + "prepare/test_sources.py::test_a_glob", D + "prepare/test_prepare.py::test_a_file_that_a_source_has_twice", D + "prepare/test_sources.py::test_an_empty_path")),
    Row(70, "200 clients at once, heads that programs read differently, addresses that are not", "all answered; rejected; rejected", ("tests/examples/serve/test_http_server.py::test_200_clients", "tests/examples/serve/test_http_server.py::test_a_head", "tests/examples/serve/test_http_server.py::test_an_address")),
    Row(71, "text that once gave a traceback: patterns of 5,000 parentheses, a column twice, records without a field, empty lists, model types that hold no such model, damaged findings of duplicates, times of 10^308, numbers of 5,000 digits, NUL in a name, negative lengths", "one message, code 2", ("tests/model/config/test_pattern.py::test_parentheses_nest", D + "prepare/test_documents.py::test_two_columns", "tests/examples/foreign_states/test_hostile.py::test_a_tensor_without", P + "export/test_import_huggingface.py::test_a_description_that_no_longer", D + "prepare/test_duplicates.py::test_what_was_found", P + "report/test_report.py::test_times_are_shown", P + "config/test_yaml_tree.py::test_a_number_of_thousands", P + "config/test_yaml_tree.py::test_an_extended_name", D + "store/test_megatron_files.py::test_a_sequence_of_negative")),
    Row(72, "outputs that are the working directory, a link, or there already; patterns of 10^6 letters and YAML tags in messages", "rejected before any work, or the folder behind the link; cut", (P + "export/test_export.py::test_the_working_directory", D + "store/test_megatron_files.py::test_links_in", L + "commands/test_export.py::test_a_tiktoken", "tests/model/config/test_pattern.py::test_bad_pattern", P + "config/test_yaml_tree.py::test_a_tag")),
    Row(73, "1,700 bad inputs of every verb: configurations, patterns, overrides, settings, texts, training states, models, run directories, stores, command lines, outputs, markup", "code 0 or 2, a message, nothing left of the output", (F + "inputs/test_inputs.py::test_bad_input",)),
    Row(74, "274 raw requests to a server", "an answer other than 500, or the end of the connection; the next is answered", (F + "inputs/test_inputs.py::test_raw",)),
    Row(75, "small files that unpack to 3 GiB or claim 2^63 of something, files of 1 TB, YAML of 100 MB", "rejected in bounded memory and time", (F + "inputs/test_inputs.py::test_bad_input", D + "prepare/test_documents.py::test_a_document_beyond", P + "config/test_yaml_tree.py::test_a_file_of_megabytes")),
    Row(76, "two trains of one directory; a preparation of the store that a run reads; an export while checkpoints are pruned", "the first continues; the same losses or code 3; whole or rejected", (F + "circumstances/test_at_once.py::",)),
    Row(77, "a clock that is set back and on; locales C, tr_TR, de_DE", "the same losses, positive times", (F + "circumstances/test_surroundings.py::test_a_clock", F + "circumstances/test_surroundings.py::test_a_locale")),
    Row(80, "Python without asserts and docstrings, with warnings as errors, in development mode", "the same losses and files", (F + "circumstances/test_surroundings.py::test_options", F + "writes/test_failing_writes.py::test_every_verb")),
    Row(78, "a limit of a file's size; of addresses and open files, in a run", "code 3 in words, then the same losses", (F + "circumstances/test_surroundings.py::test_a_limit", F + "test_in_a_run.py::test_what_ends_a_rank")),
    Row(79, "what a rename publishes, by every verb and again after a failed one", "its content is on the disk before, its name after", (F + "writes/test_failing_writes.py::test_what_a_rename",)),
    Row(38, "a rank or a node lost between checkpoints, with replicas in memory; copies lost, damaged, half written", "from memory at the newer step, else from the disk, same end", (P + "checkpoint/replicas/test_replicas.py::",)),
)  # fmt: skip


def find_missing(row: Row) -> list[str]:
    """Tests of a row that are not there."""
    missing = []
    for test in row.tests:
        path, _, name = test.partition("::")
        place = ROOT / path
        if not place.is_file() or f"def {name or 'test_'}" not in place.read_text(encoding="utf-8"):
            missing.append(test)
    return missing


def find_tests() -> list[str]:
    """All tests that the table names, as pytest takes them: whole files, or file::test."""
    found = set()
    for path, _, name in (test.partition("::") for row in TABLE for test in row.tests):
        if name:
            text = (ROOT / path).read_text(encoding="utf-8")
            found |= {f"{path}::{test}" for test in re.findall(rf"^def ({name}\w*)", text, re.MULTILINE)}
        else:
            found.add(path)
    return sorted(test for test in found if "::" not in test or test.partition("::")[0] not in found)


def run_tests(marks: str, report: Path) -> None:
    """Run all tests that the table names, with a JUnit report."""
    command = [sys.executable, "-m", "pytest", "-vv", "-m", marks, "--timeout", "3600", f"--junitxml={report}"]
    code = subprocess.run([*command, *find_tests()], cwd=ROOT, check=False, stdout=sys.stderr).returncode
    if code not in (0, 1):  # a file that cannot be imported would look like tests that were not run
        sys.exit(f"pytest ended with {code}: no verdict")


def read_outcomes(reports: list[Path]) -> dict[str, str]:
    """Outcome by file::test of JUnit reports; of a test in several the one that tells more: failed, shown, skipped."""
    worst = ("failure", "error", "shown", "skipped")
    outcomes: dict[str, str] = {}
    for report in reports:
        for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
            kinds = {child.tag for child in case} & set(worst)
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            found = [outcomes.get(name, "skipped"), min(kinds, default="shown", key=worst.index)]
            outcomes[name] = min(found, key=worst.index)
    return outcomes


def judge(row: Row, outcomes: dict[str, str]) -> str:
    """One word about a row."""
    found = [outcome for name, outcome in outcomes.items() if any(name.startswith(test) for test in row.tests)]
    if any(outcome in ("failure", "error") for outcome in found):
        return "FAILED"
    return "shown" if "shown" in found else "not run"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.table")
    parser.add_argument("--run", action="store_true", help="run the quick tests, and add a verdict to each row")
    parser.add_argument("--slow", action="store_true", help="with --run: run all of them")
    parser.add_argument(
        "--reports", type=Path, nargs="+", default=[], metavar="XML",
        help="take the verdicts from JUnit reports of suites, as `make test` and `make test-slow` leave them in build/",
    )  # fmt: skip
    given = parser.parse_args()
    if (given.slow and not given.run) or (given.run and given.reports):
        parser.error("--slow goes with --run, and --reports takes its place")
    for report in given.reports:
        if not report.is_file():
            parser.error(f"{report} does not exist; `make test` and `make test-slow` write such reports")
    with TemporaryDirectory() as folder:
        if given.run:
            given.reports.append(Path(folder, "report.xml"))
            run_tests("not gpu" if given.slow else "not slow and not gpu", given.reports[0])
        outcomes = read_outcomes(given.reports)
    bad = False
    print(f"| # | fault | must follow | tests |{' verdict |' if outcomes else ''}")
    print(f"|---|---|---|---|{'---|' if outcomes else ''}")
    for row in TABLE:
        missing = find_missing(row)
        verdict = f" {judge(row, outcomes)} |" if outcomes else ""
        tests = ", ".join(test.removesuffix("::") for test in row.tests)
        lost = f" MISSING: {missing}" if missing else ""
        print(f"| {row.number} | {row.fault} | {row.outcome} | {tests}{lost} |{verdict}")
        bad = bad or bool(missing) or "FAILED" in verdict
    sys.exit(bad)


if __name__ == "__main__":
    main()
