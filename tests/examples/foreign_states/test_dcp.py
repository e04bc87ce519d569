"""torch Distributed Checkpoint: plain torch reads it, what comes back is bitwise equal, and a run continues as if it had
never left.
"""

from __future__ import annotations

import errno
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from amfm_foreign_states.adopt import import_state
from amfm_foreign_states.dcp import export_dcp
from amfm_foreign_states.dcp_folder import DcpFolder
from amfm_foreign_states.universal import export_universal

from amfm.launch.cli import run
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.inference.weights import read_weights
from tests.examples.foreign_states.conftest import Unbroken
from tests.helpers.full_disk import largest_file
from tests.helpers.processes.zygote import BARE, run_program


@pytest.fixture(scope="module")
def exported(unbroken: Unbroken, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of step 2 as torch Distributed Checkpoint."""
    return export_dcp(unbroken.checkpoint, tmp_path_factory.mktemp("dcp") / "out").path


@pytest.fixture(scope="module")
def from_torch(unbroken: Unbroken, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a program of plain torch saves that loaded it, and found every number as the checkpoint has it."""
    out = tmp_path_factory.mktemp("plain") / "out"
    file = unbroken.checkpoint / "rank-00000.safetensors"
    command = [sys.executable, str(Path(__file__).with_name("plain_torch.py")), str(exported), str(file), str(out)]
    done = run_program(command, zygote=BARE)
    assert done.returncode == 0, done.stderr
    return out


def test_a_round_trip_is_bit_equal_and_its_run_goes_on(unbroken: Unbroken, exported: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert run(["import", str(exported), str(back)]) == 0
    found = diff_checkpoints(unbroken.checkpoint, back / "checkpoints" / "step-00000002")
    assert found["same"], found
    unbroken.goes_on_in(back)


def test_a_run_goes_on_from_what_plain_torch_saved(unbroken: Unbroken, from_torch: Path, tmp_path: Path) -> None:
    file, back = tmp_path / "config.yaml", tmp_path / "back"
    file.write_text(resolved_yaml(unbroken.config))
    assert run(["import", str(from_torch), str(tmp_path / "none")]) == 2  # whose model is it?
    assert run(["import", str(from_torch), str(back), "--config", str(file)]) == 0
    found = diff_checkpoints(unbroken.checkpoint, back / "checkpoints" / "step-00000002")
    assert not found["tensors"] and not found["optimizer_steps"] and not found["only_in_second"]
    unbroken.goes_on_in(back)


@pytest.mark.parametrize("export", [export_dcp, export_universal])
def test_a_disk_that_fills_up_is_an_error_of_the_system_and_nothing_is_left(
    unbroken: Unbroken, tmp_path: Path, export: Callable[..., object]
) -> None:
    with largest_file(20_000), pytest.raises(OSError) as caught:
        export(unbroken.checkpoint, tmp_path / "out")
    assert caught.value.errno == errno.EFBIG and str(tmp_path) in str(caught.value.filename)
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_become_a_weights_folder(unbroken: Unbroken, exported: Path, tmp_path: Path) -> None:
    folder = DcpFolder(exported)
    names = [name for name in folder.tensors if name.startswith("model.")]
    alone = {name.removeprefix("model."): folder.tensor(name) for name in names}
    dcp.save({"model": alone}, checkpoint_id=tmp_path / "alone", no_dist=True)
    file = tmp_path / "config.yaml"
    file.write_text(resolved_yaml(unbroken.config))
    assert run(["import", str(tmp_path / "alone"), str(tmp_path / "weights"), "--config", str(file)]) == 0
    found = read_weights(tmp_path / "weights").state
    assert found.keys() == alone.keys() and all(found[name].equal(tensor) for name, tensor in alone.items())


def test_what_is_missing_cut_or_another_model_s_is_named_and_nothing_is_written(
    unbroken: Unbroken, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, *arguments: str) -> str:
        assert run(["import", str(folder), str(tmp_path / "out"), *arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    without, cut = tmp_path / "without", tmp_path / "cut"
    for copy in (without, cut):
        shutil.copytree(exported, copy)
    (without / "__0_0.distcp").unlink()
    assert "__0_0.distcp is missing" in refused(without)
    with (cut / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    assert "has 1000 bytes" in refused(cut)
    with (exported / ".metadata").open("rb") as file:
        written = pickle.load(file)
    del next(iter(written.storage_data.values())).__dict__["offset"]
    (cut / ".metadata").write_bytes(pickle.dumps(written))
    assert "metadata is not as its format asks: " in refused(cut)
    assert "leave out --config" in refused(exported, "--config", str(Path(unbroken.config.run.dir, "config.yaml")))
    other = {"model": {"embedding.weight": torch.zeros(7, 32), "strange": torch.zeros(2)}}
    dcp.save(other, checkpoint_id=tmp_path / "other", no_dist=True)
    config = unbroken.config.model_copy()
    with pytest.raises(ValueError, match="looked for 27 tensors, found 2") as caught:
        import_state(tmp_path / "other", tmp_path / "out", config)
    assert "; model.blocks.0.norm.weight is missing" in str(caught.value)
    with pytest.raises(ValueError, match=r"embedding.weight is \[7, 32\], the model states \[448, 32\]"):
        other["model"] = {name: torch.zeros(shape) for name, shape in _shapes(exported).items()}
        other["model"]["embedding.weight"] = torch.zeros(7, 32)
        dcp.save(other, checkpoint_id=tmp_path / "shape", no_dist=True)
        import_state(tmp_path / "shape", tmp_path / "out", config)


def test_weights_beyond_float32_are_refused(exported: Path, unbroken: Unbroken, tmp_path: Path) -> None:
    weights = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in _shapes(exported).items()}
    weights["embedding.weight"][3, 5] = 1e300
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "large", no_dist=True)
    with pytest.raises(ValueError, match=r"embedding\.weight holds NaN or infinity in float32"):
        import_state(tmp_path / "large", tmp_path / "out", unbroken.config)


def _shapes(exported: Path) -> dict[str, tuple[int, ...]]:
    folder = DcpFolder(exported)
    return {name.removeprefix("model."): folder.shape(name) for name in folder.tensors if name.startswith("model.")}
