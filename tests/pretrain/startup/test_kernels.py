"""Which kernels a run on a CPU takes, and what it says of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.kernels.runtime import native
from amfm.kernels.runtime.native import refuse_native
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.startup.kernels import find_earlier_kernels, share_native
from amfm.pretrain.startup.model import choose_backend
from amfm.pretrain.train import train
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL, read_events, read_metrics, tiny_config

FIT = MODEL | {"pattern": "M-", "mamba": MODEL["mamba"] | {"chunk_size": 64}, "moe": None}
needs_compiler = pytest.mark.skipif(refuse_native(torch.device("cpu")) is not None, reason="no C compiler")


@needs_compiler
def test_auto_is_native_code_and_a_resume_under_other_kernels_says_that_numbers_differ(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: str, backend: str, stop: int | None = None) -> None:
        model = {f"model__{key}": value for key, value in FIT.items()}
        config = tiny_config(
            data, tmp_path / folder, **model, kernels__backend=backend, train__stop_after_steps=stop, train__steps=4
        )
        assert train(config) == 0

    run("torch", "torch")
    run("native", "auto", stop=2)
    assert "native kernels" in capsys.readouterr().err
    assert find_earlier_kernels(tmp_path / "native") == "native"
    run("native", "torch")
    (event,) = (event for event in read_events(tmp_path / "native", "resume") if "kernels were" in event["text"])
    assert event["text"] == "kernels were native and are torch: numbers differ from here on in their last bits"
    by_torch, by_native = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("torch", "native"))
    assert by_native == pytest.approx(by_torch, rel=1e-5)


def choose(config: RunConfig) -> str:
    """The backend on a rank, of which the second one has no compiler."""
    parallel = initialize_parallel(config.parallel, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    if parallel.rank == 1:
        os.environ["CC"] = "no-such-compiler"
        for found in (native._try_native, native.load_library):
            found.cache_clear()  # by the process that this one is a fork of
    share_native(config, parallel, choose_backend(config, parallel))
    return choose_backend(config, parallel)


@needs_compiler
@pytest.mark.slow
def test_all_ranks_compute_in_pytorch_where_one_has_no_compiler(data: DataConfig, tmp_path: Path) -> None:
    model = {f"model__{key}": value for key, value in FIT.items()}
    assert run_ranks(choose, tiny_config(data, tmp_path, **model, kernels__backend="auto")) == ["torch", "torch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "kernels.backend = native: has no block to run: native code takes states x heads of multiples of 16 in chunks of 64; got 16 x 16 in 16",
        ),
        ({"model__pattern": "*-"}, "kernels.backend = native: has no block to run: no block has native code"),
    ],
)
def test_native_code_that_a_run_asks_for_and_does_not_fit_is_an_error(
    changes: dict[str, str], message: str, data: DataConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_run(tiny_config(data, tmp_path, kernels__backend="native", **changes))
    assert message in str(caught.value)
