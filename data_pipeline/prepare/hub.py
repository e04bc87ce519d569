"""Data sets of the Hugging Face Hub by name: `hub:OWNER/NAME[@REVISION][/CONFIG or path]`.

A data set there is files in a git repository, so it is read as files: two requests tell the commit and the files of it,
and the readers of parquet and jsonl then take byte ranges. The `datasets` library is not used, although it streams too: it
gives examples one after the other, where a store needs pieces that any actor can read again on its own, and its rules for which
files belong to a configuration are one field of the dataset card. Nor is `huggingface_hub`, whose client waits for a silent network
without limit; token, endpoint and offline mode are looked up where it does (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).

The commit is pinned at the first preparation (`HUB_REVISIONS` in the store) and recorded in its manifest: a second call
reads the same text although the data set has moved on.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.durable.json_files import read_object
from amfm.data_pipeline.store.http_files import HttpError, ask, origin

PREFIX = "hub:"
HUB_REVISIONS = "hub_revisions.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
FORM = re.compile(
    r"hub:(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<inside>[^:]*[^:/]))?/?"
)
LINK_NEXT = re.compile(r'<([^>]+)>\s*;\s*rel="next"')
ATTEMPTS = 2  # to look something up: a person waits
TIMEOUT_SECONDS = 10.0
OFFLINE = {"1", "on", "yes", "true"}


@dataclass(frozen=True)
class HubPath:
    """A path of the configuration that names a data set, taken apart. inside: a configuration, folder, file or glob."""

    given: str
    repository: str
    revision: str
    inside: str


@dataclass(frozen=True)
class HubFile:
    """A file of a data set at one commit. digest: of its content, as git or LFS has it."""

    name: str
    url: str
    num_bytes: int
    digest: str


def is_hub(path: str) -> bool:
    """Whether a path of the configuration names a data set of the Hub."""
    return path.startswith(PREFIX)


def parse_hub(given: str) -> HubPath:
    """Take a path apart. Raises ValueError with the form that it must have."""
    found = FORM.fullmatch(given)
    if found is None:
        raise ValueError(
            f"{given!r} must be hub:OWNER/NAME, with @REVISION and /CONFIG or /FOLDER after it if you want them, such as "
            "hub:HuggingFaceFW/fineweb-edu/sample-10BT"
        )
    return HubPath(given, found["repository"], found["revision"] or "main", found["inside"] or "")


def endpoint() -> str:
    """Address of the Hub, or of a mirror."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def headers_for(url: str) -> dict[str, str]:
    """The token of this machine's user, for addresses of the Hub itself and no others."""
    if origin(url) != origin(endpoint()):
        return {}
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    file = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    token = os.environ.get("HF_TOKEN") or (file.read_text(encoding="utf-8") if file.is_file() else "")
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def pin_revisions(paths: Iterable[str], pinned: Mapping[str, str]) -> dict[str, str]:
    """The commit of each path that names a data set: as pinned, or as the Hub has it now.

    Raises ValueError for a name that is not one, is not there or not for this user, and where the Hub cannot be reached.
    """
    commits = {}
    for given in paths:
        if is_hub(given):
            path = parse_hub(given)
            is_commit = COMMIT.fullmatch(path.revision) is not None
            commits[given] = pinned.get(given) or (path.revision if is_commit else str(describe(path)["sha"]))
    return commits


def read_pins(store: str) -> dict[str, str]:
    """Commits that an earlier preparation of this store pinned."""
    file = Path(store) / HUB_REVISIONS
    return {str(name): str(commit) for name, commit in read_object(file).items()} if file.is_file() else {}


def write_pins(store: Path, pins: Mapping[str, str]) -> None:
    """Keep the commits next to the store's other settings, before anything is read at them."""
    if pins and pins != read_pins(str(store)):
        write_file_atomically(store / HUB_REVISIONS, json.dumps(dict(pins), indent=1).encode())


def describe(path: HubPath, revision: str | None = None) -> dict[str, Any]:
    """What the Hub says of a data set at a revision: `sha`, `cardData` and more."""
    quoted = urllib.parse.quote(revision or path.revision, safe="%")
    answer: dict[str, Any] = _ask(path, f"{endpoint()}/api/datasets/{path.repository}/revision/{quoted}")[0]
    if not COMMIT.fullmatch(str(answer.get("sha", ""))):
        raise ValueError(
            f"{path.given}: {endpoint()} answers without a commit; HF_ENDPOINT must be a Hub or a mirror of it"
        )
    return answer


def list_hub(given: str, commit: str) -> tuple[list[HubFile], Sequence[str]]:
    """Files of a data set at a commit, and the globs of those that are meant.

    Without a path inside: of the default configuration in its dataset card, or all. A path inside that is not a configuration
    is a folder, a file or a glob. Raises ValueError as `pin_revisions` does, and for a data set of several
    configurations without a default.
    """
    path = parse_hub(given)
    patterns = choose_patterns(path, (describe(path, commit).get("cardData") or {}).get("configs") or [])
    files: dict[str, HubFile] = {}
    for root in dict.fromkeys(_fixed_root(pattern) for pattern in patterns):
        tree = f"{endpoint()}/api/datasets/{path.repository}/tree/{commit}/{urllib.parse.quote(root)}".rstrip("/")
        page: str | None = f"{tree}?recursive=true"
        while page is not None:
            entries, page = _ask(path, page)
            for entry in entries:
                if entry.get("type") == "file":
                    name = str(entry["path"])
                    url = f"{endpoint()}/datasets/{path.repository}/resolve/{commit}/{urllib.parse.quote(name)}"
                    digest = str((entry.get("lfs") or {}).get("oid") or entry["oid"])
                    files[name] = HubFile(name, url, int(entry["size"]), digest)
    return list(files.values()), patterns


def choose_patterns(path: HubPath, configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The globs of the files that a path means, by the configurations of the dataset card."""
    by_name = {str(config.get("config_name")): config for config in configs}
    if path.inside and path.inside not in by_name:
        is_glob = any(letter in path.inside for letter in "*?[")
        is_file = "." in path.inside.rpartition("/")[2]
        return [path.inside] if is_glob or is_file else [f"{path.inside}/**"]
    if not by_name:
        return ["**"]
    chosen = by_name.get(path.inside) or next((config for config in configs if config.get("default")), None)
    chosen = chosen or by_name.get("default") or (configs[0] if len(by_name) == 1 else None)
    if chosen is None:
        raise ValueError(
            f"{path.given} has the configurations {', '.join(by_name)} and none by default; name one: "
            f"{PREFIX}{path.repository}/{next(iter(by_name))}"
        )
    return _training_files(path, chosen)


def _training_files(path: HubPath, config: Mapping[str, Any]) -> list[str]:
    """The globs of a configuration's training split; of its only split where it has no `train`."""
    data_files = config.get("data_files")
    folder = str(config.get("data_dir") or "").strip("/")
    if data_files is None:
        return [f"{folder}/**" if folder else "**"]
    items = data_files if isinstance(data_files, list) else [data_files]
    by_split: dict[str, list[str]] = {}
    for item in items:
        split, globs = (
            (str(item.get("split", "train")), item.get("path")) if isinstance(item, dict) else ("train", item)
        )
        by_split.setdefault(split, []).extend(map(str, globs if isinstance(globs, list) else [globs]))
    if "train" not in by_split and len(by_split) != 1:
        raise ValueError(
            f"{path.given} has the splits {', '.join(by_split)} and no `train`; name a folder or a glob of one"
        )
    globs = by_split.get("train") or next(iter(by_split.values()))
    return [f"{folder}/{pattern}" if folder else pattern.removeprefix("./") for pattern in globs]


def _fixed_root(pattern: str) -> str:
    """The folders of a glob before its first magic character, so that only that part of the tree is listed."""
    return re.split(r"[*?[]", pattern)[0].rpartition("/")[0]


def _ask(path: HubPath, url: str) -> tuple[Any, str | None]:
    """JSON at an address of the Hub, and the address of the next page. Raises ValueError with what to do."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in OFFLINE:
        raise ValueError(f"{path.given}: HF_HUB_OFFLINE is set; unset it, or {_elsewhere(path)}")
    try:
        answer = ask(url, headers_for(url), attempts=ATTEMPTS, timeout_seconds=TIMEOUT_SECONDS)
        following = LINK_NEXT.search(answer.headers.get("link", ""))
        return answer.json(), following and following[1]
    except HttpError as error:
        if error.status in (401, 403):
            remedy = "the data set is private, gated or not there: accept its terms on its page and set HF_TOKEN"
        elif error.status == 404:
            remedy = f"there is no such data set, revision or folder: look at {endpoint()}/datasets/{path.repository}"
        else:
            remedy = f"check the network, HTTPS_PROXY and HF_ENDPOINT, or {_elsewhere(path)}"
        raise ValueError(f"{path.given} cannot be looked up ({error}); {remedy}") from error


def _elsewhere(path: HubPath) -> str:
    return (
        f"fetch it if there is a network (hf download {path.repository} --repo-type dataset --local-dir FOLDER) and name "
        "the folder"
    )
