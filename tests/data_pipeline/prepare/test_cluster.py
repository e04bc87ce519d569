"""Preparation on a Ray cluster that is there already: nodes of their own processes, which can be killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from amfm.data_pipeline.config import FilterConfig
from amfm.data_pipeline.prepare.plan import UnitSettings, make_units, plan_source
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.ray_actors import run_on_ray
from amfm.data_pipeline.store.manifest import Layout
from amfm.data_pipeline.tokenizer.tokenizer import SentencePieceTokenizer
from tests.data_pipeline.prepare.stores import ROOT, actor_pids, contents, elsewhere, is_descendant
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tiny_store import make_tiny_store, run_in_process

pytestmark = pytest.mark.slow

DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.plan import UnitSettings, make_units, plan_source
from amfm.data_pipeline.prepare.ray_actors import run_on_ray
from amfm.data_pipeline.store.manifest import Layout
from amfm.data_pipeline.tokenizer.tokenizer import SentencePieceTokenizer
config = DataConfig.model_validate_json(sys.argv[2])
prepare(config, address=sys.argv[3], progress=lambda now: print(now.stage, now.units_done, flush=True))
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A store of about thirty parts without exact duplicates, written in this process."""
    config = make_tiny_store(tmp_path_factory.mktemp("reference"), num_documents=900, part_bytes=12_000)
    dropping = config.sources[0].model_copy(update={"filters": FilterConfig(exact_duplicates="drop")})
    config = config.model_copy(update={"sources": (dropping,), "store": f"{config.store}-unique"})
    prepare(config, runner=run_in_process)
    return config


@pytest.fixture()
def cluster():
    """A head without cores and two nodes with one core each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    nodes = [made.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
    yield made, nodes
    made.shutdown()


def start_driver(config, cluster):
    command = [sys.executable, "-c", DRIVER, str(ROOT), config.model_dump_json(), cluster.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_until(process, stage, units):
    """Lines of the driver until this many units of a stage are done."""
    for line in process.stdout:
        found, done = line.split()
        if found == stage and int(done) >= units:
            return
    raise AssertionError(f"the driver ended before {units} units of {stage}")


@pytest.mark.parametrize("stage", ["duplicates", "tokenize"])
def test_a_killed_node_loses_and_duplicates_nothing(reference, cluster, tmp_path, stage):
    made, nodes = cluster
    config = elsewhere(reference, tmp_path)
    process = start_driver(config, made)
    read_until(process, stage, 2)
    made.remove_node(nodes[0], allow_graceful=False)
    process.stdout.read()
    assert process.wait(PATIENCE_SECONDS) == 0, "the node that is left does the whole work"
    assert contents(config.store) == contents(reference.store)


def test_a_killed_driver_and_killed_actors_lose_and_duplicate_nothing(reference, cluster, tmp_path):
    made, _ = cluster
    config = elsewhere(reference, tmp_path)
    for stage, units in (("duplicates", 3), ("tokenize", 2), ("tokenize", 3)):
        process = start_driver(config, made)
        read_until(process, stage, units)
        process.kill()
        process.wait()
    process = start_driver(config, made)
    read_until(process, "tokenize", 1)
    killed = [pid for pid in actor_pids() if is_descendant(pid, os.getpid())][:1]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    process.stdout.read()
    assert process.wait(PATIENCE_SECONDS) == 0 and killed
    assert contents(config.store) == contents(reference.store)


def test_a_cluster_without_cores_is_one_message(reference, tmp_path, monkeypatch):
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    monkeypatch.setattr("amfm.data_pipeline.prepare.ray_actors.NO_CORE_SECONDS", 2)
    try:
        with pytest.raises(RuntimeError, match=r"Ray gave no core within 2 seconds: \d+ parts wait, .* `ray status`"):
            prepare(elsewhere(reference, tmp_path), address=made.address)
    finally:
        made.shutdown()
    assert not list(Path(tmp_path, "store").glob("parts/*/*"))


def test_actors_that_cannot_start_are_one_message(reference, cluster, tmp_path, monkeypatch):
    """As on a node without the tokenizer's library: the actor fails when its arguments are unpacked."""
    made, _ = cluster
    monkeypatch.setattr("amfm.data_pipeline.prepare.ray_actors.MAX_FAILED_STARTS", 3)
    tokenizer = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
    tokenizer._model = b"not a model"
    settings = UnitSettings("text", FilterConfig(), 0.0, 0, 1000, Layout("uint16", 512, "fast"), "", 400, 2)
    (unit, *_) = make_units("web", plan_source(reference.sources[0], reference), settings)
    with pytest.raises(
        RuntimeError, match=r"cannot start on the Ray cluster .* need this package and its requirements"
    ):
        list(run_on_ray([unit], tmp_path, tokenizer, reference, address=made.address))


def test_without_an_address_a_cluster_that_runs_here_is_left_alone(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what Ray looks at first, then the cluster that `ray start` left
    config = elsewhere(reference, tmp_path, num_actors=1)
    assert prepare(config).units_written > 0
    assert contents(config.store) == contents(reference.store)
