"""Manifests obey the schemas that JobSet, Kubernetes and SkyPilot publish, and say what the run needs.

The schemas come with packages that are kept: kubeflow-trainer-api has those of JobSet and of Kubernetes' own API. SkyPilot's and
KubeRay's are looked at where they are: an installed SkyPilot, and KubeRay's custom resource in a file named by KUBERAY_CRD
(helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of its repository), with openapi-schema-validator installed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from amfm.launch.cli import run
from amfm.launch.cluster.kubernetes import name_of
from amfm.pretrain.config.file import resolved_yaml
from tests.pretrain.tiny_run import tiny_config, tiny_data

LAUNCH = {
    "setup": "source /shared/env.sh",
    "environment": {"NCCL_SOCKET_IFNAME": "ib0"},
    "kubernetes": {"image": "registry/amfm:1", "claim": "runs", "namespace": "training", "bucket": "s3://runs"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    config = tiny_config(
        tiny_data(tmp_path / "data"),
        tmp_path / "run",
        run__name="My Run_8B",
        train__global_batch_size=32,
        **{f"launch__{name}": value for name, value in LAUNCH.items()},
    )
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    return tmp_path / "run.yaml"


def manifest(path: Path, form: str, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    words = [
        "launch",
        str(path),
        *options,
        "--on",
        "kubernetes",
        "--form",
        form,
        "--nodes",
        "2",
        "--nproc-per-node",
        "8",
    ]
    assert run([*words, "--dry-run"]) == 0
    made: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return made


def unknown_fields(given: Any, known: Any, place: str = "") -> list[str]:
    """Where a manifest says what its schema does not know: models drop it on the way."""
    if isinstance(given, dict):
        return [
            text
            for key, value in given.items()
            for text in unknown_fields(value, (known or {}).get(key), f"{place}.{key}")
        ]
    if isinstance(given, list):
        pairs = zip(given, known if isinstance(known, list) else [None] * len(given))
        return [
            text
            for number, (one, other) in enumerate(pairs)
            for text in unknown_fields(one, other, f"{place}[{number}]")
        ]
    return [] if given == known else [f"{place}: {given!r}, not {known!r}"]


def test_a_jobset_holds_to_its_schema_and_starts_a_torchrun_per_pod(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    made = manifest(path, "jobset", capsys)
    parsed = models.JobsetV1alpha2JobSet.from_dict(made)
    assert unknown_fields(made, parsed.to_dict()) == []
    job = parsed.spec.replicated_jobs[0].template.spec
    assert (job.parallelism, job.completions, job.completion_mode, job.backoff_limit) == (2, 2, "Indexed", 0)
    assert job.template.spec.termination_grace_period_seconds == 300
    (rule,) = job.pod_failure_policy.rules
    assert (rule.action, rule.on_exit_codes.operator, rule.on_exit_codes.values) == ("FailJob", "In", [2])
    assert parsed.spec.failure_policy.rules[0].action == "FailJobSet"
    (container,) = job.template.spec.containers
    assert [variable.name for variable in container.env] == ["AMFM_STOPPED_FAILS", "NCCL_SOCKET_IFNAME"]
    *_, line = container.command
    assert line.startswith("source /shared/env.sh && exec amfm launch ")
    assert line.endswith(
        '--master my-run-8b-604a1f-node-0-0.my-run-8b-604a1f:29500 --node-rank "$JOB_COMPLETION_INDEX"'
    )
    assert made["metadata"] == {"name": "my-run-8b-604a1f", "namespace": "training"}
    assert {mount.mount_path for mount in container.volume_mounts} == {"/dev/shm", "/shared"}


def test_runs_whose_names_kubernetes_would_write_alike_have_two(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    names = [name_of(tiny_config(data, tmp_path / "run", run__name=name)) for name in ("lr-x", "lr_x", "lr.x")]
    assert names[0] == "lr-x" and len(set(names)) == 3


def test_a_run_that_a_drain_stopped_is_not_complete(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pod that ends with 0 is a success for its job."""
    monkeypatch.setattr("amfm.launch.commands.launch.run_attempts", lambda *_: 0)
    (tmp_path / "run").mkdir()
    events = tmp_path / "run/events.jsonl"
    command = ["launch", str(path), "--on", "torchrun", "--nproc-per-node", "1"]
    events.write_text('{"event": "start"}\n{"event": "signal"}\n')
    assert run(command) == 0
    monkeypatch.setenv("AMFM_STOPPED_FAILS", "1")
    assert run(command) == 3
    events.write_text('{"event": "start"}\n{"event": "end"}\n')
    assert run(command) == 0


def test_a_rayjob_s_pods_hold_to_their_schema_and_its_workers_are_nodes_and_spares(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    made = manifest(path, "rayjob", capsys, "launch.spare_nodes=1")
    cluster = made["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        parsed = models.IoK8sApiCoreV1PodTemplateSpec.from_dict(group["template"])
        assert unknown_fields(group["template"], parsed.to_dict()) == []
    assert cluster["workerGroupSpecs"][0]["replicas"] == 3
    assert "--on ray --address auto --nodes 2 --nproc-per-node 8" in made["spec"]["entrypoint"]


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names no file of KubeRay's RayJob resource")
def test_a_rayjob_holds_to_kuberay_s_schema(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validators = pytest.importorskip("openapi_schema_validator")
    resource = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    (version,) = [version for version in resource["spec"]["versions"] if version["name"] == "v1"]
    validator = validators.OAS30Validator(strict(version["schema"]["openAPIV3Schema"]))
    made = manifest(path, "rayjob", capsys, "launch.spare_nodes=1")
    validator.validate(made)
    made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["image"] = "of the container"
    assert not validator.is_valid(made), "a field that the schema does not name"


def strict(schema: Any) -> Any:
    """The schema as Kubernetes applies it with strict field validation: what it does not name is rejected."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    is_open = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys()
    closed = {"additionalProperties": False} if "properties" in schema and "type" in schema and not is_open else {}
    return {key: strict(value) for key, value in schema.items()} | closed


def test_a_skypilot_task_holds_to_its_schema(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    made = manifest(path, "skypilot", capsys)
    jsonschema.validate(made, schemas.get_task_schema())
    assert made["resources"] == {"image_id": "docker:registry/amfm:1", "accelerators": "H100:8"}


def test_every_form_says_how_the_ranks_meet(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the packages of others."""
    task = manifest(path, "skypilot", capsys)
    assert task["num_nodes"] == 2 and '--node-rank "$SKYPILOT_NODE_RANK" --master "$(echo' in task["run"]
    made = manifest(path, "jobset", capsys)
    assert made["spec"]["network"] == {"enableDNSHostnames": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "kubernetes"], "submits nothing on its own; add --dry-run"),
        (["--on", "kubernetes", "--dry-run", "launch.kubernetes.image=null"], "launch.kubernetes.image is not set"),
        (["--on", "kubernetes", "--dry-run", "launch.spare_nodes=1"], "set it to 0, or use --form rayjob"),
        (["--on", "slurm", "--form", "jobset"], "--form jobset belongs to --on kubernetes"),
    ],
)
def test_what_cannot_serve_is_refused_with_what_does(
    words: list[str], message: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["launch", str(path), "--nodes", "2", "--nproc-per-node", "1", *words]) == 2
    assert message in capsys.readouterr().err
