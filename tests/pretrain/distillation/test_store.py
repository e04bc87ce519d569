"""A teacher stored once: training reads what an online teacher says, in its order; what is of something else is rejected."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run as run_cli
from amfm.model.divergence import Outcomes
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.distillation import store as module
from amfm.pretrain.distillation.store import StoreLayout, TeacherStore, open_order, stored_teacher
from amfm.pretrain.distillation.teacher import Teacher
from amfm.pretrain.distillation.write import write_store
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.distillation.teachers import DISTILL, distilling
from tests.pretrain.tiny_run import read_events, read_metrics

CPU = torch.device("cpu")


def stored(data: DataConfig, run_dir: Path, teacher: str, folder: Path, **distill: Any) -> RunConfig:
    return distilling(data, run_dir, teacher, DISTILL | {"store": str(folder)} | distill)


def opened(config: RunConfig) -> TeacherStore:
    """As a run opens it."""
    section = config.distill
    assert section is not None and section.store is not None
    teacher = Teacher.find(section.teacher, stored_teacher(section.store))
    return TeacherStore(section.store, config, open_order(config), teacher)


@pytest.fixture(scope="module")
def written(data: DataConfig, tmp_path_factory: pytest.TempPathFactory, teacher: str) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "store"
    write_store(stored(data, folder.parent / "run", teacher, folder), CPU, "torch")
    return folder


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
def test_a_record_gives_back_ids_and_probabilities_that_sum_to_one(vocab_size: int) -> None:
    layout = StoreLayout(1, ((0, 5),), 3, 2 if vocab_size <= 1 << 16 else 4)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (5, 3), generator=generator)
    ids[0, 0] = vocab_size - 1
    log_p = torch.randn(5, 4, generator=generator).mul(4).log_softmax(-1)
    record = layout.encode(Outcomes(log_p, ids))
    assert len(record) == layout.record_bytes(5)
    found = layout.decode(record, 5)
    assert found.chosen_RK is not None and torch.equal(found.chosen_RK, ids)
    torch.testing.assert_close(found.log_p.exp().sum(-1), torch.ones(5))
    torch.testing.assert_close(found.log_p, log_p, rtol=2**-8, atol=2**-7)


def test_training_from_a_store_is_training_with_its_teacher(
    data: DataConfig, tmp_path: Path, teacher: str, written: Path
) -> None:
    stop = {"train__stop_after_steps": 2}
    assert train(distilling(data, tmp_path / "online", teacher, **stop)) == 0
    assert train(distilling(data, tmp_path / "stored", teacher, DISTILL | {"store": str(written)}, **stop)) == 0
    online, found = (read_metrics(tmp_path / name) for name in ("online", "stored"))
    for key in ("loss", "divergence", "grad_norm"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in online], rel=3e-3)
    assert read_events(tmp_path / "stored", "distill")[0]["teacher"].endswith("checkpoints/step-00000012")


def test_what_is_there_is_not_written_a_second_time_and_more_steps_add_to_it(
    data: DataConfig, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stored(data, tmp_path / "run", teacher, tmp_path / "store")
    monkeypatch.setattr(module, "FILE_BYTES", 5 * StoreLayout.of_run(config).record_bytes(48))
    whole = write_store(config, CPU, "torch")
    assert (whole.samples, whole.files, whole.kept) == (16, 4, 0)
    assert whole.bytes == sum(path.stat().st_size for path in (tmp_path / "store").glob("*.bin"))
    lost, kept = tmp_path / "store/samples-000000000005.bin", tmp_path / "store/samples-000000000010.bin"
    content, changed = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    with pytest.raises(
        ValueError, match=r"lacks 1 of 4 files, first samples-000000000005.bin; run `amfm distill store"
    ):
        opened(config)
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    assert run_cli(["distill", "store", str(tmp_path / "run.yaml"), "train.steps=5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["files"], found["kept"]) == (20, 4, 2)  # the last file was of one sample
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"top_k": 21}}, "was made with top_k 20, this run has 21; set it back, or write a store"),
        ({"distill": {"temperature": 1.0}}, "was made with temperature 1.5, this run has 1.0"),
        ({"train": {"seed": 7}}, "was made with seed .*, this run has 7"),
        ({"data": {"packing": "best_fit"}}, "was made with packing 'concatenate', this run has 'best_fit'"),
        ({"train": {"sequence_length": 32}}, "was made with phases"),
    ],
)
def test_a_store_of_something_else_is_refused(
    data: DataConfig, tmp_path: Path, teacher: str, written: Path, changes: dict[str, Any], message: str
) -> None:
    tree = stored(data, tmp_path, teacher, written).model_dump(mode="json")
    for section, values in changes.items():
        tree[section] |= values
    config = RunConfig.model_validate(tree)
    with pytest.raises(ValueError, match=message):
        opened(config)
    with pytest.raises(ValueError, match=message):
        write_store(config, CPU, "torch")


def test_another_teacher_and_damage_are_refused(data: DataConfig, tmp_path: Path, teacher: str, written: Path) -> None:
    own = tmp_path / "store"
    shutil.copytree(written, own)
    config = stored(data, tmp_path, teacher, own)
    with (own / "samples-000000000000.bin").open("r+b") as file:
        file.seek(3 * StoreLayout.of_run(config).record_bytes(48) + 50)
        file.write(b"\xff\xff\xff")
    found = opened(config)
    assert found.read([2, 15]).log_p.shape == (2, 48, 21)
    with pytest.raises(RuntimeError, match=r"bin is damaged at sample 3; delete the file and run `amfm distill store"):
        found.read([2, 3])
    found.close()
    other = stored(data, tmp_path, str(Path(teacher) / "checkpoints/step-00000006"), own)
    with pytest.raises(ValueError, match=r"has weights of digest .*, and what taught before, .*step-00000012, had"):
        opened(other)
    with pytest.raises(ValueError, match="missing has no store of a teacher; run `amfm distill store CONFIG`"):
        opened(stored(data, tmp_path, teacher, tmp_path / "missing"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").touch()
    with pytest.raises(ValueError, match="holds other files; name a folder that is missing or empty"):
        write_store(stored(data, tmp_path, teacher, tmp_path / "full"), CPU, "torch")


def test_inspect_shows_what_a_store_holds_and_names_what_is_damaged(
    data: DataConfig,
    tmp_path: Path,
    teacher: str,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def inspect(*arguments: str) -> dict[str, Any]:
        code = run_cli(["inspect", *arguments, "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert code == (0 if found["ok"] else 2)
        return found

    config = stored(data, tmp_path / "run", teacher, tmp_path / "store")
    record = StoreLayout.of_run(config).record_bytes(48)
    found = inspect(str(written))
    assert (found["kind"], found["problems"], found["verified"]) == ("teacher store", [], "every sample")
    assert (found["step"], found["teacher_digest"]) == (12, Teacher.find(teacher).digest)
    assert (found["vocab_size"], found["top_k"], found["temperature"]) == (config.model.vocab_size, 20, 1.5)
    assert (found["samples"], found["tokens"], found["bytes"]) == (16, 16 * 48, 16 * record)

    monkeypatch.setattr(module, "FILE_BYTES", 5 * record)
    folder = tmp_path / "store"
    write_store(config, CPU, "torch")
    (folder / "samples-000000000005.bin").unlink()
    with (folder / "samples-000000000000.bin").open("r+b") as file:
        file.seek(3 * record + 50)
        file.write(b"\xff\xff\xff")
    os.truncate(folder / "samples-000000000010.bin", 2 * record - 1)
    missing, cut, gone, damaged = inspect(str(folder))["problems"]
    assert missing.endswith("samples 5 to 9 are in no file before samples-000000000010.bin")
    assert cut.endswith(f"{record - 1} bytes follow its 1 samples of {record:,}")
    assert gone.endswith("samples 11 to 14 are in no file before samples-000000000015.bin")
    assert "samples-000000000000.bin: 1 of 5 samples fail their CRC-32C, first 3; delete the file" in damaged
    assert len(inspect(str(folder), "--quick")["problems"]) == 3

    written_then = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"version": 2}, "is a teacher's store of version 2, this release reads 1"),
        ({"top_k": "20"}, "top_k is '20', it must be int; the file was edited or damaged"),
        ({"phases": []}, "is not as its format asks: list index out of range"),
    ):
        (folder / "manifest.json").write_text(json.dumps(written_then | change))
        assert run_cli(["inspect", str(folder)]) == 2
        assert message in capsys.readouterr().err


def test_a_store_needs_to_know_how_many_tokens(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distill.store = s: holds the likeliest tokens alone; set distill.top_k"):
        check_run(distilling(data, tmp_path, "teacher", {"store": "s"}), 1)


def test_the_verb_asks_for_a_place(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["distill", "store", str(base)]) == 2
    assert (
        "has no distill.store; name the folder to write, such as distill.store=data/teacher" in capsys.readouterr().err
    )


LAYOUTS: list[dict[str, Any]] = [
    {"parallel__context": 2},
    {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    {"parallel__zero_stage": 3},
    {"parallel__expert": 2, "parallel__expert_buffer_factor": 4.0},
]


def train_layouts(data: DataConfig, root: str, teacher: str, folder: str, layouts: list[dict[str, Any]]) -> None:
    for number, layout in enumerate(layouts):
        changes = {"optimizer__epsilon": 1e-3, "train__micro_batch_size": 1, **layout}
        config = distilling(data, Path(root, str(number)), teacher, DISTILL | {"store": folder}, **changes)
        assert train(config) == 0


@pytest.mark.slow
def test_every_layout_reads_its_part_of_a_store(data: DataConfig, tmp_path: Path, teacher: str, written: Path) -> None:
    run_ranks(train_layouts, data, str(tmp_path / "one"), teacher, str(written), [{}], num_ranks=1)
    run_ranks(train_layouts, data, str(tmp_path / "two"), teacher, str(written), LAYOUTS)
    expected = read_metrics(tmp_path / "one/0")
    for number, layout in enumerate(LAYOUTS):
        found = read_metrics(tmp_path / f"two/{number}")
        for key in ("loss", "divergence", "grad_norm"):
            assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-4), layout
