"""A run whose store is in an object store: training in fresh processes, resumed, evaluated, exported, inspected."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.s3 import BUCKET, s3_server, upload
from tests.pretrain.tiny_run import read_metrics, tiny_config, tiny_data

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def test_a_run_on_a_store_behind_a_url_is_the_run_on_its_folder(tmp_path, monkeypatch):
    data = tiny_data(tmp_path / "data")

    def amfm(*arguments):
        command = [sys.executable, "-m", "amfm.launch", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with s3_server() as (variables, requests):
        for name, value in (variables | {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}).items():
            monkeypatch.setenv(name, value)
        upload(data.store, f"s3://{BUCKET}/store")
        remote = data.model_copy(update={"store": f"s3://{BUCKET}/store", "num_workers": 1})
        for name, settings in (("local", data), ("remote", remote)):
            config = tiny_config(settings, tmp_path / name)
            (tmp_path / f"{name}.json").write_text(json.dumps(config.model_dump(mode="json")))
        amfm("train", tmp_path / "local.json")
        amfm("train", tmp_path / "remote.json", "train.stop_after_steps=2")
        amfm("train", tmp_path / "remote.json")
        for key in ("loss", "grad_norm", "data"):
            local, far = ([line[key] for line in read_metrics(tmp_path / name)] for name in ("local", "remote"))
            assert far == local, key
        assert requests.gets("/tokens/") > 0
        losses = [json.loads(amfm("evaluate", tmp_path / name, "--json"))["loss"] for name in ("local", "remote")]
        assert losses[0] == losses[1]
        amfm("export", tmp_path / "remote", tmp_path / "export")
        shown = [json.loads(amfm("inspect", tmp_path / n, "--sample", "5", "--json")) for n in ("local", "remote")]
        assert shown[0] == shown[1]
        assert json.loads(amfm("inspect", remote.store, "--json"))["ok"]
