"""In float64, classes of transformers and our models have the same gradients, to float64's rounding."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from amfm.data_pipeline.config import DataConfig
from amfm.model.hybrid import HybridModel
from amfm.pretrain.micro_batch import LossShare, MicroBatches
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import count_valid_tokens
from tests.model.huggingface.differences import gradients_by_our_name
from tests.replica.families import FAMILIES, Family
from tests.replica.plain import backward, find_routers
from tests.replica.runs import MICRO_ROWS, ROWS, import_model, make_model, read_steps, run_config

# Of the largest gradient of each weight.
TOLERANCE = 1e-12
# The class adds 1e-6 to the sum of the chosen scores, by which it divides; we add nothing that counts.
TOLERANCES = {"lfm2_moe": 2e-6}


class Float64(TorchFunctionMode):
    """Casts to float32 are casts to float64: classes of transformers compute norms and routers in float32 by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call with the other dtype."""

        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {name: widened(value) for name, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*map(widened, args), **named)


def plain_model(model: Any, data: DataConfig, family: Family) -> Any:
    """A copy in float64, with the gradients of the first step of the plain loop."""
    exact = copy.deepcopy(model).double().train()
    exact.config._experts_implementation = "eager"  # the grouped product has no float64
    with Float64():
        for module in exact.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = type(module)(exact.config).inv_freq
        backward(exact, find_routers(exact, exact.config), read_steps(data, 1)[0], family.recipe)
    return exact


def our_model(folder: Path, data: DataConfig, family: Family) -> HybridModel:
    """Ours in float64, with the gradients of the first step of a run."""
    config = run_config(family, folder / "ours", folder / "run", data, {})
    with SignalWatch() as signals:
        run = start_run(config, signals)
        exact = HybridModel(config.model, run.parallel.groups, seed=0)
        exact.load_state_dict(run.model.state_dict())
        exact.double().train()
        with Float64():
            for module in exact.modules():
                if hasattr(module, "inverse_frequencies"):
                    module.reset_buffers()
        batches = run.loader.take(ROWS, MICRO_ROWS)
        counts = count_valid_tokens(batches, run.parallel, config.model)
        share = LossShare.of_counts(counts, len(batches), config.model)
        for given in MicroBatches(batches, run.parallel, config.model):
            loss = share.apply(exact(given.tokens_BT, given.meta, given.labels_BT, ahead=given.ahead))
            assert loss is not None, "a batch has labels"
            loss.backward()
        close_run(run)
    return exact


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_a_step_are_those_of_the_class(name: str) -> None:
    # With the epsilon of the class, with which float32 loses most.
    family = replace(FAMILIES[name], fields=FAMILIES[name].fields | {"rms_norm_eps": 1e-6})
    model = make_model(family)
    with torch.no_grad():
        for weight in model.parameters():
            # Where theirs is stored less 1, the sum is exact in float32.
            weight.copy_((weight * 2**16).round() / 2**16)
    folder, data = import_model(model)
    theirs, ours = plain_model(model, data, family), our_model(Path(folder.name), data, family)
    expected = gradients_by_our_name(ours, theirs, name)
    found = {weight: parameter.grad for weight, parameter in ours.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for weight, gradient in found.items():
        gap = float((gradient - expected[weight]).abs().max() / expected[weight].abs().max())
        assert gap < TOLERANCES.get(name, TOLERANCE), (weight, gap)
