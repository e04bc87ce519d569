"""When the supervisor starts again, on how many nodes, and when it stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from amfm.launch.cluster.supervise import Attempt, Outcome, fitting_nodes, supervise
from amfm.pretrain.config.schema import RunConfig
from tests.pretrain.tiny_run import tiny_config, tiny_data


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    # 12 rows in micro-batches of 2: one, two, three and six ranks can share them.
    return tiny_config(
        tiny_data(tmp_path / "data"), tmp_path / "run", train__global_batch_size=12, launch__node_wait_seconds=3
    )


class Script:
    """Attempts with given outcomes; each may leave a checkpoint of a step after."""

    def __init__(self, config: RunConfig, *outcomes: tuple[int, str, int | None]) -> None:
        self.directory = Path(config.run.dir) / "checkpoints"
        self.outcomes = list(outcomes)
        self.attempts: list[Attempt] = []

    def __call__(self, attempt: Attempt) -> Outcome:
        self.attempts.append(attempt)
        code, cause, saved_step = self.outcomes.pop(0)
        if saved_step is not None:
            folder = self.directory / f"step-{saved_step:08d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
        return Outcome(code, cause)


def run(config: RunConfig, script: Script, usable: Callable[[], int] = lambda: 3, nodes: int = 3) -> int:
    return supervise(config, script, nodes=nodes, ranks_per_node=1, usable_nodes=usable)


def test_a_failure_with_progress_is_started_again_with_its_cause(config: RunConfig) -> None:
    script = Script(config, (3, "rank 1 was lost", 10), (0, "", 20))
    assert run(config, script) == 0
    assert [(attempt.nodes, attempt.cause) for attempt in script.attempts] == [(3, None), (3, "rank 1 was lost")]


def test_a_code_of_0_without_an_end_in_the_events_is_a_failure(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `os._exit(0)` in a plug-in."""
    events = Path(config.run.dir, "events.jsonl")
    events.parent.mkdir()
    events.write_text('{"event": "start"}\n{"event": "end"}\n{"event": "start"}\n{"event": "checkpoint"}\n')
    assert run(config, Script(config, (0, "", 3), (0, "", None), (0, "", None))) == 3
    assert "the run's events report no end" in capsys.readouterr().err
    events.write_text(events.read_text() + '{"event": "signal"}\n')
    assert run(config, Script(config, (0, "", None))) == 0


def test_an_attempt_that_the_end_of_the_job_leaves_no_time_for_ends_the_launch(config: RunConfig) -> None:
    """The rank that failed before it left no word of an end either."""
    events = Path(config.run.dir, "events.jsonl")
    events.parent.mkdir()
    events.write_text('{"event": "start"}\n')
    outcomes = [Outcome(3, "rank 1 was lost"), Outcome(0, began=False)]
    assert supervise(config, lambda _: outcomes.pop(0), nodes=3, ranks_per_node=1, usable_nodes=lambda: 3) == 0
    assert not outcomes


def test_refused_input_is_not_started_again(config: RunConfig) -> None:
    script = Script(config, (2, "wrong tokenizer", None))
    assert run(config, script) == 2
    assert len(script.attempts) == 1


def test_a_crash_loop_stops_with_its_first_cause(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    script = Script(config, (3, "an old trouble", 10), (3, "rank 0: out of memory", None), (3, "peer gone", None))
    assert run(config, script) == 3
    assert len(script.attempts) == 3
    assert "came to no newer checkpoint; not starting again" in (errors := capsys.readouterr().err)
    assert "failed because: rank 0: out of memory" in errors


def test_restarts_that_bring_no_newer_checkpoint_are_counted(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = [(3, f"trouble {number}", number if number % 2 else None) for number in range(9)]
    script = Script(config, *outcomes)
    assert run(config, script) == 3
    assert len(script.attempts) == 7  # four of them in vain, one more than launch.max_restarts
    assert "launch.max_restarts=3 are used up. First cause: trouble 0" in capsys.readouterr().err


def test_restarts_with_progress_are_free(config: RunConfig) -> None:
    script = Script(config, *[(3, "a node was lost", step) for step in range(1, 9)], (0, "", 9))
    assert run(config, script) == 0
    assert len(script.attempts) == 9


@pytest.mark.parametrize("code", [4, 3], ids=["its own code", "the code of a launcher that saw ranks end"])
def test_a_stage_of_another_layout_is_a_start_of_its_own(
    config: RunConfig, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["train"].pop("steps")
    tree["schedule"] = {"kind": "constant", "warmup_steps": 0}
    stages = [{"name": "short", "steps": 2}, {"name": "long", "steps": 2, "parallel": {"tensor": 2}}]
    staged = RunConfig.model_validate(tree | {"stages": stages})
    script = Script(staged, (code, "", 2), (0, "", 4))
    assert run(staged, script) == 0
    assert [(attempt.number, attempt.nodes, attempt.cause) for attempt in script.attempts] == [
        (0, 3, None),
        (1, 2, None),
    ]
    assert "stage long begins at step 2, in its own layout" in capsys.readouterr().err


def test_a_lost_node_leaves_as_many_as_can_share_the_batch(config: RunConfig) -> None:
    script = Script(config, (3, "node lost", 10), (0, "", 20))
    usable = iter([6])
    assert run(config, script, usable=lambda: next(usable, 5), nodes=6) == 0
    assert [attempt.nodes for attempt in script.attempts] == [6, 3]


def test_a_node_that_comes_back_in_time_is_waited_for(config: RunConfig) -> None:
    script = Script(config, (3, "node lost", 10), (0, "", 20))
    answers = [3, 2, 3]
    assert run(config, script, usable=lambda: answers.pop(0)) == 0
    assert [attempt.nodes for attempt in script.attempts] == [3, 3]


def test_too_few_nodes_is_an_error_with_both_numbers(config: RunConfig) -> None:
    with pytest.raises(RuntimeError, match=r"0 node\(s\) can be used and launch.min_nodes=1; bring nodes back"):
        fitting_nodes(config, 0, 1)
    with pytest.raises(RuntimeError, match=r"no number of nodes from 1 to 1 fits the run.*train\.global_batch_size"):
        fitting_nodes(config, 1, 5)


def test_nodes_lost_before_ranks_start_cost_no_attempt(config: RunConfig) -> None:
    """Ray notices a cut link later than the ranks do: the placement that fails for it is none of the run's failures."""
    script = Script(config, (3, "rank 1 was lost", None), (0, "", 20))
    refused: list[int] = []

    def start(attempt: Attempt) -> Outcome:
        if script.attempts and not refused:
            refused.append(attempt.nodes)
            return Outcome(3, "no 3 nodes free", began=False)
        return script(attempt)

    usable = iter([3, 3, 2, 2, 2])
    # One failure without a checkpoint stands already: a second one that counted would end the run.
    assert supervise(config, start, nodes=3, ranks_per_node=1, usable_nodes=lambda: next(usable, 2)) == 0
    assert [(attempt.number, attempt.nodes) for attempt in script.attempts] == [(0, 3), (1, 2)] and refused == [3]
