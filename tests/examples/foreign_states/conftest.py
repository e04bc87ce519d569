"""The run that the tests of this folder move: four steps, with a checkpoint after two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.config.schema import RunConfig
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import Trained, tiny_config, train_and_collect


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing stopped, and its checkpoint on the way."""

    config: RunConfig
    checkpoint: Path
    trained: Trained

    def goes_on_in(self, directory: Path) -> None:
        """Train in a directory that has the state of step 2, and compare each loss and weight with the unbroken run's."""
        moved = self.config.model_copy(update={"run": self.config.run.model_copy(update={"dir": str(directory)})})
        found: Trained = run_ranks(train_and_collect, moved, num_ranks=1)[0]
        assert found.series("loss") == self.trained.series("loss")[2:]
        assert found.weights.keys() == self.trained.weights.keys()
        assert all(found.weights[name].equal(value) for name, value in self.trained.weights.items())


class Evil:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="session")
def unbroken(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Trained once for the session; nothing writes to it."""
    config = tiny_config(data, tmp_path_factory.mktemp("unbroken") / "run", train__checkpoint_every_steps=2)
    trained = run_ranks(train_and_collect, config, num_ranks=1)[0]
    return Unbroken(config, Path(config.run.dir, "checkpoints", "step-00000002"), trained)
