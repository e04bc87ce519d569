"""The choice of an implementation."""

from __future__ import annotations

import logging
import os
import sys

import pytest
import torch

from amfm.kernels.runtime import native
from amfm.kernels.runtime.backend import (
    INTERPRETED,
    find_miscompile,
    judge_miscompile,
    resolve_backend,
    resolve_for_run,
)
from amfm.kernels.runtime.tuning import describe_launch_failure
from tests.helpers.processes.zygote import BARE, run_program

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_name_means_itself(name: str) -> None:
    assert resolve_backend(name, CPU) == name


def test_auto_means_torch_on_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="amfm.kernels.runtime.backend"):
        assert resolve_backend("auto", CPU) == "torch"
        assert resolve_backend("auto", CPU) == "torch"
    assert sum("auto -> torch" in message for message in caplog.messages) <= 1


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs Triton on CPU")
def test_triton_on_cpu_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device; the tensors are on cpu"):
        resolve_backend("triton", CPU)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'cudnn'"):
        resolve_backend("cudnn", CPU)


def test_a_run_in_float32_takes_pytorchs_products_on_a_card_unless_it_names_a_backend() -> None:
    gpu = torch.device("cuda")
    assert resolve_for_run("auto", gpu, torch.float32, unfit=None) == "torch"
    assert resolve_for_run("reference", gpu, torch.float32, unfit=None) == "reference"
    assert resolve_for_run("auto", CPU, torch.float16, unfit=None) == "torch"


def test_auto_on_a_cpu_is_native_code_where_a_block_has_it_and_it_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[str | None] = [None, "there is no C compiler (cc, gcc, clang)"]
    monkeypatch.setattr(native, "_try_native", lambda: answers[0])
    assert resolve_for_run("auto", CPU, torch.float32, unfit=None) == "native"
    assert resolve_for_run("auto", CPU, torch.bfloat16, unfit=None) == "native"
    assert resolve_for_run("auto", CPU, torch.float32, unfit="no block has native code") == "torch"
    assert [resolve_backend("native", CPU, name) for name in ("mamba2", "attention", "")] == [
        "native",
        "torch",
        "native",
    ]
    with pytest.raises(ValueError, match="native code runs on a CPU; the tensors are on cuda; use"):
        resolve_backend("native", torch.device("cuda"))
    answers.pop(0)
    with caplog.at_level(logging.INFO, logger="amfm.kernels.runtime.backend"):
        assert resolve_for_run("auto", CPU, torch.float32, unfit=None) == "torch"
    assert "kernels backend auto -> torch: there is no C compiler (cc, gcc, clang)" in caplog.messages
    with pytest.raises(ValueError, match="there is no C compiler"):
        resolve_backend("native", CPU)


def test_a_process_whose_other_ranks_cannot_runs_no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_try_native", lambda: None)
    monkeypatch.setattr(native, "_WITHDRAWN", [])
    assert resolve_for_run("auto", CPU, torch.float32, unfit=None) == "native"
    native.withdraw_native("rank 3 cannot run native code")
    assert resolve_for_run("auto", CPU, torch.float32, unfit=None) == "torch"


def test_versions_that_go_wrong_on_a_card_are_known() -> None:
    assert find_miscompile((3, 8, 0), 9) is not None
    assert find_miscompile((3, 8, 0), 8) is None
    assert find_miscompile((3, 6, 0), 9) is None
    # Their compiler ends in an error there; a rejection must not lead to another release that is rejected.
    assert all(find_miscompile(version, 10) is not None for version in ((3, 6, 0), (3, 7, 0), (3, 7, 1)))
    assert all(find_miscompile(version, 10) is None for version in ((3, 5, 1), (3, 8, 0), (3, 9, 0)))


@pytest.mark.parametrize("version", [(3, 5, 1), (3, 6, 0), (3, 7, 0), (3, 7, 1), (3, 9, 0)])
def test_the_triton_that_a_release_of_torch_pins_runs_on_hopper(version: tuple[int, int, int]) -> None:
    assert find_miscompile(version, 9) is None


def test_a_refusal_names_what_pip_can_install_and_can_be_overruled(caplog: pytest.LogCaptureFixture) -> None:
    refusal = judge_miscompile("columns are zero", (3, 8, 0), allowed=False)
    assert refusal is not None and "Triton 3.8.0" in refusal and "pip install 'torch>=2.15'" in refusal
    assert "2.13" not in refusal  # its Triton is rejected on Blackwell
    with caplog.at_level(logging.WARNING, logger="amfm.kernels.runtime.backend"):
        assert judge_miscompile("columns are zero", (3, 8, 0), allowed=True) is None
    assert "AMFM_ALLOW_TRITON=1, though columns are zero" in caplog.text


@pytest.mark.parametrize(("said", "fuses"), [(None, "True"), pytest.param("0", "False", marks=pytest.mark.slow)])
def test_multiply_adds_fuse_without_a_warning_unless_the_environment_forbids(said: str | None, fuses: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_DEFAULT_FP_FUSION"}
    environment |= {} if said is None else {"TRITON_DEFAULT_FP_FUSION": said}
    code = (
        "import warnings; warnings.simplefilter('error', UserWarning)\n"
        "import amfm.kernels.runtime.backend\n"
        "from triton import knobs; print(knobs.language.fp_fusion_enabled(None))"
    )
    child = run_program([sys.executable, "-c", code], env=environment, zygote=BARE)
    assert (child.stdout.strip(), child.stderr) == (fuses, "")


def test_a_failed_launch_names_kernel_tile_cause_and_remedy() -> None:
    """Raised as Triton raises it: from the launcher of the kernel, whose frame is all that knows which one it was."""
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction

    class Launcher(JITFunction):
        def __init__(self) -> None:
            self.__name__ = "walk_kernel"

        def run(self, **kwargs: int) -> None:
            raise OutOfResources(300000, 232448, "shared memory")

    with pytest.raises(OutOfResources) as raised:
        Launcher().run(BLOCK_V=64, num_warps=8, num_stages=3, T=100)
    said = describe_launch_failure(raised.value)
    assert said is not None and said.startswith(
        "the kernel walk_kernel with the tile BLOCK_V=64, num_warps=8, num_stages=3"
    )
    assert "300000" in said and "--tune" in said and "kernels.backend=torch" in said
    assert describe_launch_failure(RuntimeError("other")) is None
