"""Sends an export to the Hugging Face Hub, or to what `HF_ENDPOINT` names, as one commit of a model repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from amfm.pretrain.packages import require_extra

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class Hub:
    """A repository of the Hub, OWNER/NAME, that can be written: a new one is private.

    Made before an export takes its time. Raises ValueError for another name and if the Hub rejects, RuntimeError if it cannot
    be reached.
    """

    def __init__(self, name: str) -> None:
        if NAME.fullmatch(name) is None:
            raise ValueError(f"--push {name} must be OWNER/NAME, such as my-team/tiny-cpu")
        require_extra("export", "amfm export --push")
        from huggingface_hub import HfApi

        self.name, self.api = name, HfApi()
        with self.refusals("see whether HF_ENDPOINT and the network are right, and give the same command"):
            self.api.create_repo(name, private=True, exist_ok=True)

    def push(self, folder: Path) -> str:
        """Send the files of an export as one commit, in place of the weights that were there; returns the commit's address."""
        with self.refusals(f"send it again by amfm export {folder} --push {self.name}"):
            info = self.api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message=f"amfm export {folder.name}",
                delete_patterns="*.safetensors",
            )
        return str(info.commit_url)

    @contextmanager
    def refusals(self, remedy: str) -> Iterator[None]:
        """Inside, what the Hub rejects is a ValueError, and what fails on the way a RuntimeError, with what to do."""
        from huggingface_hub.errors import HfHubHTTPError

        # Its client's errors, whichever client that is, and the system's.
        failures = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
        try:
            yield
        except failures as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            is_refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
            kind, what = (
                (ValueError, "set HF_TOKEN to a token that may write there") if is_refused else (RuntimeError, remedy)
            )
            raise kind(f"--push {self.name}: {self.api.endpoint}: {reason}; {what}") from error


def require_export(folder: Path) -> None:
    """Raise ValueError if a folder that is sent without an export is not one."""
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(f"{folder} is not an export (config.json and safetensors); name OUT to export it first")
