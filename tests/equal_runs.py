"""Two commits train alike: short runs of tiny models in each, compared bitwise. For changes that are to change nothing.

    python -m tests.equal_runs OLD [NEW] [--keep FOLDER]    # each a commit or the folder of a checkout

NEW is the working tree where it is not given; `--keep` keeps what OLD gave, for the next time. Each side makes its own
token store, trains `RUNS` (one plain, two with every side feature that goes together, two ranks among them), is stopped
halfway and continues. Compared are the store's files, exit codes, each line of metrics.jsonl and events.jsonl in order,
and each file of each checkpoint that is left; not times, memory, rates and settings that OLD does not have. At last NEW
continues the run directories that OLD left halfway, by the config.yaml in them. Prints what differs and exits with 1; 0 when nothing does.

Both sides compute in PyTorch (`kernels.backend: torch`): native code may be compiled otherwise in each, and older commits have
none, so its bits are compared with themselves by tests/kernels/native/test_mamba2.py and not here.

A commit is unpacked into a temporary folder. Import names may differ (`pretrain.x` or `amfm.pretrain.x`): this file itself
is the program that runs in each side, and finds them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24
HALF = 13
MAX_SHOWN = 12

MODEL: dict[str, Any] = {
    "pattern": "ME*-",
    "vocab_size": 448,
    "hidden_size": 32,
    "mamba": {"num_heads": 4, "head_dim": 16, "state_size": 16, "num_groups": 2, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "feed_forward": {"hidden_size": 48},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_hidden_size": 24,
        "shared_expert_hidden_size": 16,
        "expert_bias": True,
        "auxiliary_loss_weight": 0.01,
        "z_loss_weight": 0.001,
    },
}
TRAIN: dict[str, Any] = {
    "steps": STEPS,
    "sequence_length": 48,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "precision": "float32",
    "validation_batches": 1,
    "num_threads": 1,
    "timeout_seconds": 900,
    "checkpoint_in_background": False,  # or the place of its event among the others depends on the disk
    "keep_last": 9,
}
COMMON: dict[str, Any] = {
    "model": MODEL,
    "train": TRAIN,
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"kind": "wsd", "warmup_steps": 2},
    "parallel": {"zero_stage": 1},
    "kernels": {"backend": "torch"},
}
SIDE_FEATURES: dict[str, Any] = {
    "prune": {"groups": "experts", "keep": 0.5, "start_step": 3, "every_steps": 3, "end_step": 12},
    "forget": {"every_steps": 5, "until_step": 20},  # the loss jumps: a spike
    "hooks": {"envelope": {"groups": "heads", "keep": 0.5, "start_step": 4, "end_step": 9}},
}
# By name: the number of ranks, and what is put over COMMON, section by section.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "edited": (
        2,
        {
            "forget": SIDE_FEATURES["forget"],
            "prune": SIDE_FEATURES["prune"],
            "health": {
                "check_state_every_steps": 2,
                "on_spike": "rollback",
                "spike_window": 8,
                "spike_ratio": 1.002,
                "max_rollbacks": 9,
            },
            "train": {
                "steps": None,
                "validate_every_steps": 4,
                "checkpoint_every_steps": 4,
                "replica_every_steps": 2,
                "replica_folder": tempfile.gettempdir(),
                "profile": {"steps": [3]},
            },
            "stages": [
                {"name": "short", "steps": 6},
                {"name": "long", "steps": STEPS - 6, "sequence_length": 64, "parallel": {"tensor": 2}},
            ],
        },
    ),
    "guided": (
        1,
        {
            "model": {
                "pattern": "M-*E/*",
                "guide": {"skip": True},
                "feed_forward": {"hidden_size": 48, "linear_kind": "lowrank", "linear_rank": 8},
                "lora_mixer": {"num_experts": 4, "rank": 4, "hard_from_step": 7},
                "mtp": {},
            },
            "forget": SIDE_FEATURES["forget"],
            "hooks": SIDE_FEATURES["hooks"],
            "health": {
                "check_state_every_steps": 3,
                "on_spike": "skip",
                "spike_window": 8,
                "spike_ratio": 1.002,
                "max_rollbacks": 9,
            },
            "train": {"validate_every_steps": 5, "checkpoint_every_steps": 5},
        },
    ),
}
VOLATILE = {"time", "seconds", "tokens_per_second", "mfu", "memory_bytes", "saved_at"}
VOLATILE |= {"tokens_per_second_per_gpu", "tflops_per_gpu", "megatron_tflops_per_gpu"}
VOLATILE |= {"auxiliary_mean"}  # computed from `auxiliary`, and not in earlier lines
VOLATILE |= {
    "validation_seconds",
    "tasks_seconds",
    "opening_digest",
}  # the last is of what the files hold, compared apart
# Of the event of a start: where and when it was, by which code, and what a halfway run does not do again.
ORIGIN = {"hosts", "job", "code", "versions", "config", "config_sha256", "device"}
ORIGIN |= {"began_at", "failed_starts", "last_line_at", "discarded_steps", "discarded_seconds"}


def main() -> int:
    """Compare two sides; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="commit, or folder of a checkout")
    parser.add_argument("new", nargs="?", default=str(ROOT), help="commit or folder; default: the working tree")
    parser.add_argument("--keep", type=Path, help="folder that keeps what OLD gave, for the next time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="equal_runs_") as folder:
        old, new, resumed = (Path(folder) / name for name in ("old", "new", "resumed"))
        kept = keep_for(arguments.old, arguments.keep)
        if kept is not None and kept.exists():
            print(f"old: {arguments.old}, kept in {kept}", flush=True)
            old = kept
        else:
            print(f"old: {arguments.old}", flush=True)
            train_side(unpack(arguments.old, Path(folder) / "old_tree"), old, HALF, STEPS)
            if kept is not None:
                shutil.copytree(old, kept)
        print(f"new: {arguments.new}", flush=True)
        root = unpack(arguments.new, Path(folder) / "new_tree")
        train_side(root, new, HALF, STEPS)
        print("new, from where old was halfway", flush=True)
        shutil.copytree(old / "halfway", resumed)
        shutil.copytree(old / "data", resumed / "data")
        train_side(root, resumed, STEPS, written="1")
        expected, found = describe_side(old), describe_side(new)
        problems = list(compare("", expected, found))
        # Less the warnings of a resume, among them that the program's files are others since.
        whole, goes_on = without_resumes(found), without_resumes(describe_side(resumed))
        problems += [f"resumed from old: {text}" for text in compare("", goes_on, whole)]
    for text in problems[:MAX_SHOWN]:
        print(f"DIFFERS: {text}")
    if len(problems) > MAX_SHOWN:
        print(f"... and {len(problems) - MAX_SHOWN} more")
    print("not equal" if problems else "equal: losses, all logged numbers, order of events, digests of checkpoints")
    return 1 if problems else 0


def keep_for(given: str, folder: Path | None) -> Path | None:
    """Where what a commit gave is kept: by the commit and this file; nothing of a checkout, which may change."""
    if folder is None or Path(given).is_dir():
        return None
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", given], capture_output=True, text=True, check=False)
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return folder.absolute() / f"{found.stdout.strip()[:12]}-{digest[:12]}"


def unpack(given: str, folder: Path) -> Path:
    """The folder of a checkout: `given` itself where it is one, else the commit of that name, unpacked into `folder`."""
    if Path(given).is_dir():
        return Path(given).resolve()
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", given], stdout=subprocess.PIPE, check=False)
    if archive.returncode != 0:
        raise SystemExit(f"{given} is neither a commit of {ROOT} nor a folder")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def train_side(root: Path, work: Path, *stops: int, written: str = "") -> None:
    """Run this file as a program in the folder `work`, with the packages of `root`; by what runs there wrote, or as here."""
    metadata = work.parent / "packages" / "amfm_envelope-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(__file__, metadata.parent / "side_program.py")  # ranks import by name what they run
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: amfm-envelope\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[amfm.hooks]\nenvelope = amfm_envelope.spec:SPEC\n")
    # The second package is what helpers of ranks count by; an older commit has it in launch/.
    packages = [root / "examples" / name for name in ("envelope", "simulate")]
    paths = [root / "src", root, *packages, metadata.parent]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONSAFEPATH": "1",  # not the folder of this file, whose packages are named like those of before `amfm.*`
        "OMP_NUM_THREADS": "1",
        "EQUAL_RUNS_PREFIX": "amfm." if (root / "src" / "amfm").exists() else "",
        "EQUAL_RUNS_WRITTEN": written,
    }
    work.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", __file__, "--train", *map(str, stops)]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{root}: the runs ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def ours(name: str) -> Any:
    """Import a module of the side that this process belongs to, under its name there."""
    return importlib.import_module(os.environ["EQUAL_RUNS_PREFIX"] + name)


def train_all(stops: list[int]) -> None:
    """Train every run up to each of the steps in turn; keep the run directories as they are after the first.

    All paths are relative to the working directory, so that configurations, and digests of them, are equal.
    """
    importlib.import_module("torch").manual_seed(0)  # which ranks of tests are seeded with
    spawn = importlib.import_module("tests.helpers.spawn")
    stores = importlib.import_module("tests.helpers.tiny_store")
    program = importlib.import_module("side_program")
    described = Path("data.json")
    if not described.exists():
        data = stores.make_tiny_store("data", num_documents=200, mean_words=12, num_sources=2)
        described.write_text(data.model_dump_json())
    for name, (num_ranks, over) in RUNS.items():
        tree = {"run": {"dir": name, "tensorboard": False}, "data": json.loads(described.read_text())}
        for section in {*COMMON, *over}:
            base, change = COMMON.get(section, {}), over.get(section, {})
            tree[section] = {**base, **change} if isinstance(change, Mapping) else change
        for stop in stops:
            codes = spawn.run_ranks(program.train_until, tree, stop, num_ranks=num_ranks)
            Path(name, f"codes-{stop}.json").write_text(json.dumps(codes))
            if stop != stops[-1]:
                shutil.copytree(name, Path("halfway") / name)
                shutil.copy(described, "halfway")


def train_until(tree: dict[str, Any], stop: int) -> list[int]:
    """Train up to a step, started again as often as stages ask for; returns the exit codes. Every rank must call this."""
    schema, training = ours("pretrain.config.schema"), ours("pretrain.train")
    protocol = ours("pretrain.launcher_protocol")
    tree["train"]["stop_after_steps"] = stop
    if Path(schema.__file__).parents[2].joinpath("model/config/old_names.py").is_file():
        ours("model.config.old_names").use_current_names(tree)  # the settings have the names of OLD
    if os.environ["EQUAL_RUNS_WRITTEN"]:
        written = Path(tree["run"]["dir"], "config.yaml")
        config = ours("pretrain.config.file").load_config(written, [f"train.stop_after_steps={stop}"])
    else:
        config = schema.RunConfig.model_validate(tree)
    codes: list[int] = []
    while not codes or codes[-1] == protocol.NEXT_LAYOUT:
        codes.append(training.train(config))
    return codes


def describe_side(work: Path) -> dict[str, Any]:
    """Everything that is compared of a side, by name."""
    found: dict[str, Any] = {f"{name}: exit codes": (work / name / f"codes-{STEPS}.json").read_text() for name in RUNS}
    for path in sorted(path for path in (work / "data" / "store").rglob("*") if path.is_file()):
        if path.name != "journal.jsonl":  # has times
            found[f"data/{path.relative_to(work / 'data')}"] = digest_file(path)
    for name in RUNS:
        run = work / name
        for kind in ("metrics", "events"):
            lines = [json.loads(line) for line in (run / f"{kind}.jsonl").read_text().splitlines()]
            for line in lines:
                rename(line)
            found[f"{name}: {kind}.jsonl"] = [
                strip({key: value for key, value in line.items() if key not in ORIGIN}) for line in lines
            ]
        for path in sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file()):
            found[f"{name}: {path.relative_to(run)}"] = digest_file(path)
    return found


def without_resumes(found: dict[str, Any]) -> dict[str, Any]:
    """What was found, without the events `resume`."""
    return {
        name: [line for line in value if line.get("event") != "resume"] if name.endswith("events.jsonl") else value
        for name, value in found.items()
    }


def digest_file(path: Path) -> Any:
    """SHA-256 of a file, or of each tensor of a checkpoint's; of a manifest its content without what is compared elsewhere.

    Left out: times, versions, digests of configurations and of whole files, and the balancing biases of routers, whose mean
    has been taken out since 1d43216a, and the window of gradient norms, which it did not keep. Metrics, choices, losses and all other weights show what they do.
    """
    if path.name == "manifest.json":
        content = json.loads(path.read_text())
        if "config" in content:
            rename(content["config"])
            content["files"] = sorted(content["files"])
            content["state"]["progress"].pop("recent_norms", None)
        return strip(
            {key: value for key, value in content.items() if key not in ("sha256", "versions", "config_sha256")}
        )
    if path.suffix == ".safetensors":
        import safetensors
        import torch

        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if "expert_bias" not in name}  # noqa: SIM118
        return {
            name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in tensors.items()
        }
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rename(settings: dict[str, Any]) -> None:
    """Give settings their present names, in place."""
    from amfm.model.config.old_names import use_current_names  # not in every OLD, where this file runs too

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        use_current_names(settings)


def strip(value: Any) -> Any:
    """A value of JSON without what no two runs have alike."""
    if isinstance(value, dict):
        return {key: strip(each) for key, each in value.items() if key not in VOLATILE}
    return [strip(each) for each in value] if isinstance(value, list) else value


def compare(name: str, old: Any, new: Any) -> Iterator[str]:
    """Name what differs, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        # A saved configuration, and a layout in an event, may have settings that OLD does not know, at values that change
        # nothing, and lack empty sections of mixers that became a package.
        saved = "/manifest.json/config" in name or name.endswith("/parallel")
        added = [key for key in new if key not in old and not saved]
        for key in [*(key for key in old if not saved or key in new or old[key] is not None), *added]:
            yield from compare(f"{name}/{key}", old.get(key, "(missing)"), new.get(key, "(missing)"))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new)):
            yield from compare(f"{name}[{number}]", one, other)
    elif old != new or type(old) is not type(new):
        yield f"{name.lstrip('/')}: {str(old)[:300]} in old, {str(new)[:300]} in new"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_all([int(stop) for stop in sys.argv[2:]])
    else:
        sys.exit(main())
