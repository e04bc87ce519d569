"""Damaged checkpoints are found, named and passed over; none is ever trained on."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amfm.pretrain.checkpoint import manifest_file
from amfm.pretrain.checkpoint.commit import examine_latest
from amfm.pretrain.checkpoint.files import measure_tensors, verify_checkpoint, write_tensors
from amfm.pretrain.checkpoint.inspect import find_checkpoint, inspect_checkpoint, read_full_state
from amfm.pretrain.checkpoint.manifest_file import encode_manifest, read_manifest
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.checkpoint.toys import digest_state, load, make_engine, run_steps, save

SHARD = "rank-00000.safetensors"
HEAD = ("format", "format_version", "sha256")


@pytest.fixture(scope="module")
def engine() -> ZeroEngine:
    return make_engine(initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1), stage=2, precision="bf16")


@pytest.fixture(scope="module")
def pristine(engine: ZeroEngine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """Checkpoints of steps 1, 2 and 3, and the digest of the state at each."""
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    digests = {}
    for step in (1, 2, 3):
        run_steps(engine, step - 1, step)
        save(folder, step, engine)
        digests[step] = digest_state(engine)
    return folder, digests


@pytest.fixture
def folder(pristine: tuple[Path, dict[int, str]], tmp_path: Path) -> Path:
    """A copy of the three checkpoints that a test may break."""
    return Path(shutil.copytree(pristine[0], tmp_path / "checkpoints"))


def step_dir(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def test_checkpoints_that_are_gone_are_no_fresh_start(folder: Path, engine: ZeroEngine) -> None:
    events = folder.parent / "events.jsonl"
    events.write_text("".join(json.dumps({"event": "checkpoint", "step": step}) + "\n" for step in (1, 2, 3)))
    folder.rename(folder.with_name("elsewhere"))
    for _ in ("absent", "empty, as the place of a disk that is not mounted"):
        with pytest.raises(RuntimeError, match=r"holds no checkpoint, .* the run saved one of step 3\. Put it back"):
            load(folder, engine)
        folder.mkdir(exist_ok=True)
    events.write_text(json.dumps({"event": "start", "step": 0}) + "\n")
    assert load(folder, engine) is None, "a run that ended before its first checkpoint starts over"


def test_storage_that_fails_is_no_damage(folder: Path, engine: ZeroEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest whose reads give EIO, as /proc/self/mem does at 0: sound checkpoints must not be written over."""
    monkeypatch.setattr(manifest_file, "READ_PAUSES", (0.01,))
    manifest = step_dir(folder, 3) / "manifest.json"
    manifest.rename(manifest.with_name("whole"))
    manifest.symlink_to("/proc/self/mem")
    with pytest.raises(RuntimeError, match=r"manifest.json: Input/output error \(EIO\) at 2 attempts"):
        load(folder, engine)
    manifest.unlink()
    manifest.with_name("whole").rename(manifest)
    loaded = load(folder, engine)
    assert loaded is not None and loaded.step == 3


def test_a_read_that_fails_in_passing_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_file, "READ_PAUSES", (0.01, 0.01, 0.01))
    errors = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]

    def read() -> str:
        if errors:
            raise OSError(errors.pop(), "passing")
        return "whole"

    assert manifest_file.read_patiently(tmp_path, read) == "whole"
    errors[:] = [errno.ENOENT]
    with pytest.raises(FileNotFoundError):
        manifest_file.read_patiently(tmp_path, read)


def test_every_flipped_bit_is_found(folder: Path) -> None:
    generator = random.Random(0)
    for name in (SHARD, "manifest.json"):
        path = step_dir(folder, 3) / name
        sound = path.read_bytes()
        for _ in range(40):
            place, bit = generator.randrange(len(sound)), generator.randrange(8)
            broken = bytearray(sound)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            _, problems = verify_checkpoint(step_dir(folder, 3))
            assert problems and name in problems[0], (name, place, bit)
        path.write_bytes(sound)
    assert verify_checkpoint(step_dir(folder, 3))[1] == []


def flip(folder: Path) -> str:
    path = step_dir(folder, 3) / SHARD
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    return "SHA-256"


def cut_one_byte(folder: Path) -> str:
    path = step_dir(folder, 3) / SHARD
    path.write_bytes(path.read_bytes()[:-1])
    return "bytes, the manifest states"


def empty_shard(folder: Path) -> str:
    (step_dir(folder, 3) / SHARD).write_bytes(b"")
    return "0 bytes, the manifest states"


def delete_shard(folder: Path) -> str:
    (step_dir(folder, 3) / SHARD).unlink()
    return "No such file"


def delete_manifest(folder: Path) -> str:
    (step_dir(folder, 3) / "manifest.json").unlink()
    return "never completed"


def cut_manifest(folder: Path) -> str:
    path = step_dir(folder, 3) / "manifest.json"
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    return "not valid JSON"


def nest_manifest(folder: Path) -> str:
    (step_dir(folder, 3) / "manifest.json").write_text('{"step": ' + "[" * 200_000 + "]" * 200_000 + "}")
    return "not valid JSON"


def swap_shards(folder: Path) -> str:
    shutil.copy(step_dir(folder, 1) / SHARD, step_dir(folder, 3) / SHARD)
    return "the manifest states"


def swap_folders(folder: Path) -> str:
    shutil.rmtree(step_dir(folder, 3))
    shutil.copytree(step_dir(folder, 1), step_dir(folder, 3))
    return "is of step 1 but is in step-00000003"


def add_foreign_shard(folder: Path) -> str:
    shutil.copy(step_dir(folder, 2) / SHARD, step_dir(folder, 3) / "rank-00001.safetensors")
    return "is not in the manifest"


def store_infinity(folder: Path) -> str:
    """NaN or infinity under valid digests: what a program without our checks could have saved."""
    manifest = read_manifest(step_dir(folder, 3))
    path = step_dir(folder, 3) / SHARD
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 4] = torch.tensor([float("inf")]).numpy().tobytes()
    path.write_bytes(data)
    manifest["files"][SHARD] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {key: value for key, value in manifest.items() if key not in ("format", "format_version", "sha256")}
    (step_dir(folder, 3) / "manifest.json").write_text(encode_manifest(body))
    return "holds NaN or infinity"


DAMAGES = [
    flip,
    cut_one_byte,
    empty_shard,
    delete_shard,
    delete_manifest,
    cut_manifest,
    nest_manifest,
    swap_shards,
    swap_folders,
    add_foreign_shard,
    store_infinity,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    folder: Path,
    engine: ZeroEngine,
    pristine: tuple[Path, dict[int, str]],
    damage: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert callable(damage)
    reason = damage(folder)
    loaded = load(folder, engine)
    assert loaded is not None
    assert (loaded.step, loaded.state["cursor"]) == (2, 2)
    assert len(loaded.skipped) == 1
    assert loaded.skipped[0].startswith("step-00000003: ") and reason in loaded.skipped[0]
    assert digest_state(engine) == pristine[1][2]
    found = inspect_checkpoint(step_dir(folder, 3))
    assert (found["kind"], found["ok"]) == ("checkpoint", False) and reason in found["problems"][0]
    assert find_checkpoint(folder) == step_dir(folder, 2)
    assert "because newer ones are damaged: step-00000003: " in caplog.text and reason in caplog.text
    with pytest.raises(RuntimeError, match="is damaged"):
        read_full_state(step_dir(folder, 3))


def test_none_sound_is_an_error_naming_each(folder: Path, engine: ZeroEngine) -> None:
    delete_manifest(folder)
    (step_dir(folder, 2) / SHARD).unlink()
    (step_dir(folder, 1) / SHARD).write_bytes(b"")
    with pytest.raises(RuntimeError) as caught:
        load(folder, engine)
    text = str(caught.value)
    assert "none of the 3 checkpoints" in text and "to start over" in text
    assert "Put back a copy of one of them" in text
    for part in ("step-00000003: ", "never completed", "step-00000002: ", "No such file", "step-00000001: ", "0 bytes"):
        assert part in text


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path: Path, engine: ZeroEngine) -> None:
    assert load(tmp_path / "absent", engine) is None
    (tmp_path / "step-00000007.tmp").mkdir()
    assert load(tmp_path, engine) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is absent"),
        (b"", "is empty"),
        (b"step-00000099\n", "does not exist"),
        (b"../../etc/passwd\n", "names no checkpoint"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"step-00000001\n", "names step-00000001"),
    ],
)
def test_latest_is_only_a_hint(folder: Path, engine: ZeroEngine, content: bytes | None, reason: str) -> None:
    (folder.parent / "events.jsonl").touch()
    if content is None:
        (folder / "latest").unlink()
    else:
        (folder / "latest").write_bytes(content)
    loaded = load(folder, engine)
    assert loaded is not None
    assert loaded.step == 3 and loaded.skipped == ()
    assert len(loaded.warnings) == 1 and reason in loaded.warnings[0]


def test_tensors_of_another_dtype_with_a_sound_digest_are_refused(folder: Path, engine: ZeroEngine) -> None:
    place = step_dir(folder, 3)
    tensors = load_file(place / SHARD)
    name = next(key for key in tensors if key.startswith("weight/"))
    (place / SHARD).unlink()
    entry = write_tensors(place / SHARD, {**tensors, name: tensors[name].half()}, {"format": "pt"})
    manifest = read_manifest(place)
    manifest["files"][SHARD] = {"bytes": entry.num_bytes, "sha256": entry.sha256}
    (place / "manifest.json").write_text(encode_manifest({k: v for k, v in manifest.items() if k not in HEAD}))
    loaded = load(folder, engine)
    assert loaded is not None and loaded.step == 2
    assert f"tensor {name} is torch.float16, saved are float32" in loaded.skipped[0]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd"])
def test_a_manifest_that_names_a_file_outside_its_folder_reads_nothing_there(folder: Path, name: str) -> None:
    place = step_dir(folder, 3)
    manifest = read_manifest(place)
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (place / "manifest.json").write_text(encode_manifest({k: v for k, v in manifest.items() if k not in HEAD}))
    with pytest.raises(RuntimeError, match="which is not one below it"):
        read_manifest(place)


@pytest.mark.parametrize("key", ["step", "files", "state", "layout", "versions", "buffers"])
def test_a_manifest_that_lacks_a_key_is_one_message(folder: Path, key: str) -> None:
    place = step_dir(folder, 3)
    manifest = {k: v for k, v in read_manifest(place).items() if k not in (*HEAD, key)}
    (place / "manifest.json").write_text(encode_manifest(manifest))
    with pytest.raises(RuntimeError, match=f"{key} is missing"):
        read_manifest(place)


def test_latest_names_the_newest_after_a_save(folder: Path) -> None:
    assert (folder / "latest").read_text() == "step-00000003\n"
    assert examine_latest(folder, step_dir(folder, 3)) is None
    (folder / "latest").unlink()
    assert examine_latest(folder, step_dir(folder, 3)) is None, "a folder that was copied into a new run has none"


def test_other_files_in_a_checkpoint_are_mentioned_and_ignored(folder: Path, engine: ZeroEngine) -> None:
    (step_dir(folder, 3) / "notes.txt").write_text("good run")
    loaded = load(folder, engine)
    assert loaded is not None
    assert loaded.step == 3 and "notes.txt" in loaded.warnings[0]
    assert inspect_checkpoint(step_dir(folder, 3))["warnings"] == ["notes.txt is not part of the checkpoint"]


def test_a_future_format_is_named(folder: Path) -> None:
    path = step_dir(folder, 3) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["format_version"] = 99
    path.write_text(json.dumps(manifest))
    assert "format version 99, this program reads versions 1 and 2" in verify_checkpoint(step_dir(folder, 3))[1][0]


def test_tensor_files_are_plain_safetensors_of_the_announced_size(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(7, dtype=torch.float32) / 3,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "strided": torch.arange(12).view(3, 4).t(),
        "flags": torch.tensor([True, False]),
    }
    entry = write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    assert entry.num_bytes == measure_tensors(tensors, {"format": "pt"}) == (tmp_path / "x.safetensors").stat().st_size
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_a_checkpoint_of_version_1_loads(
    engine: ZeroEngine, pristine: tuple[Path, dict[int, str]], folder: Path
) -> None:
    path = step_dir(folder, 3) / "manifest.json"
    body = json.loads(path.read_text())
    # Version 1 had only whole parameters, and no word on their place.
    body["fragments"] = {name: entries[0]["ranges"] for name, entries in body.pop("shards").items()}
    body["buffers"] = {name: {"shape": b["shape"], "dtype": b["dtype"]} for name, b in body["buffers"].items()}
    del body["layout"]["axes"]
    text = json.dumps({**body, "format_version": 1, "sha256": "0" * 64}, indent=1) + "\n"
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))
    loaded = load(folder, engine)
    assert loaded is not None and (loaded.step, loaded.skipped) == (3, ())
    assert digest_state(engine) == pristine[1][3]
    assert read_full_state(step_dir(folder, 3)).keys() == engine.module.state_dict().keys()
