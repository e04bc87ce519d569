"""torchrun's command lines, one per node."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from amfm.launch.cli import run
from amfm.launch.cluster import local
from amfm.launch.cluster.links import listen
from amfm.launch.cluster.local import run_here
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.startup.log import find_restart_cause
from tests.pretrain.tiny_run import tiny_config, tiny_data


def write_config(folder: Path, **overrides: object) -> RunConfig:
    config = tiny_config(
        tiny_data(folder / "data"),
        folder / "run",
        **{"train__steps": 200, "train__global_batch_size": 12, "train__checkpoint_every_steps": 10, **overrides},
    )
    (folder / "run.yaml").write_text(resolved_yaml(config))
    return config


def test_each_node_has_its_own_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path)
    path = str(tmp_path / "run.yaml")
    arguments = ["launch", path, "train.seed=3", "--on", "torchrun", "--nodes", "3", "--nproc-per-node", "2"]
    assert run([*arguments, "--master", "first:1234", "--dry-run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[6] for line in lines] == ["--node-rank=0", "--node-rank=1", "--node-rank=2"]
    assert lines[1][:4] == [sys.executable, "-P", "-m", "torch.distributed.run"]
    assert {"--nnodes=3", "--nproc-per-node=2", "--master-addr=first", "--master-port=1234"} < set(lines[1])
    assert (
        run([*arguments, "launch.environment={NCCL_DEBUG: INFO}", "--master", "first:1234", "--dry-run", "--json"]) == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert (shown["launcher"], shown["nodes"], len(shown["commands"])) == ("torchrun", 3, 3)
    assert shown["commands"][0].startswith(f"env NCCL_DEBUG=INFO {sys.executable} -P")
    assert lines[1][-8:] == ["--no-python", sys.executable, "-P", "-m", "amfm.launch", "train", path, "train.seed=3"]


def test_torchrun_s_own_restarts_are_told_by_their_number() -> None:
    assert find_restart_cause({}) is find_restart_cause({"TORCHELASTIC_RESTART_COUNT": "0"}) is None
    assert find_restart_cause({"TORCHELASTIC_RESTART_COUNT": "2"}) == "torchrun started its ranks again, restart 2"
    assert find_restart_cause({"TORCHELASTIC_RESTART_COUNT": "2"}, "next_layout") is None
    named = {"AMFM_RESTART_CAUSE": "rank 3 was lost", "TORCHELASTIC_RESTART_COUNT": "0"}
    assert find_restart_cause(named) == "rank 3 was lost"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "torchrun", "--nodes", "3"], "needs --hosts FILE to start them all, or --node-rank and --master"),
        (["--on", "torchrun", "--nodes", "3", "--node-rank", "3", "--master", "a"], "must be less than --nodes 3"),
        (["--on", "torchrun", "--nodes", "3", "--node-rank", "1", "--master", "a:b"], "must be HOST or HOST:PORT"),
        (["--on", "torchrun", "--nodes", "3", "--node-rank", "1", "--master", "a:70000"], "a number from 1 to 65535"),
        (["--on", "ray", "--node-rank", "0"], "--node-rank 0 belongs to --on torchrun"),
        (["--on", "slurm", "--address", "auto"], "--address auto belongs to --on ray"),
        (["--on", "slurm", "--nodes", "2", "launch.spare_nodes=3"], "is more than --nodes 2; lower it to 2 or less"),
        (["--on", "ray", "launch.spare_nodes=1"], "beyond --nodes is a spare already; set it to 0"),
        (["--on", "torchrun", "launch.spare_nodes=1"], "this machine names 1 hosts"),
        (["--on", "ray", "--nodes", "5"], "must be a multiple of train.micro_batch_size=2 x 5 data ranks"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path)
    assert run(["launch", str(tmp_path / "run.yaml"), "--nproc-per-node", "1", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_on_the_first_node_is_said_with_another_one() -> None:
    with listen() as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"port {port}, .* is taken .* another: --master first:\d+"):
            run_here(["false"], node_rank=0, master="first", port=port)
    assert run_here(["true"], node_rank=0, master="first", port=port) == 0


def test_a_torchrun_that_starts_no_ranks_is_said_and_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(local, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(local, "MEETING_SECONDS", 0.2)
    waiting = [sys.executable, "-c", "import time; time.sleep(900)"]
    assert run_here(waiting, node_rank=1, master="first", port=1) == 3
    said = capsys.readouterr().err
    assert "the other nodes have not come to first:1 yet, or another program has that port" in said
    assert "the nodes did not meet at first:1 within 0 s" in said
