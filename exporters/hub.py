"""The hub: upload a checkpoint, when asked, through huggingface_hub.

The files are compared with their hashes first, so that what others will download is what was written and proved. Paths
of this machine (of the model it came from, of calibration text, of outputs) are nobody else's business: in what is
uploaded they are cut to their last part, and the record is sealed anew. The directory itself stays as it is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import ExportError
from fxprune.exporters.model_card import refresh_model_card
from fxprune.models.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_files, write_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Pushed", "push_to_hub"]

_HIDDEN = [".*", "**/.*"]
_TEXTS = ("README.md", "report.json", "report.md", "report.html")


@dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Attributes:
        repo_id: under which name.
        url: of the commit.
        files: names of the files.
        bytes: of all of them.
    """

    repo_id: str
    url: str
    files: tuple[str, ...]
    bytes: int


def push_to_hub(
    directory: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    api: Any = None,
) -> Pushed:
    """Upload a checkpoint; the repository is created if it does not exist.

    Args:
        directory: a checkpoint that fxprune wrote. Its model card gets the commands to load it from the hub, unless it
            was taken over.
        repo_id: such as `user/name`.
        private: whether a repository that is created shall be private.
        revision: branch, created if need be; the main one by default.
        message: of the commit.
        api: a `huggingface_hub.HfApi`, for a token or an endpoint of one's own; by default that of the environment.

    Returns:
        What was uploaded.

    Raises:
        CheckpointError: the directory is no checkpoint of fxprune, or one of its files was changed.
        ExportError: the hub cannot be reached or refuses; nothing is uploaded in part, commits are whole.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415 - slow to import, and only this needs it

    verify_files(directory)
    refresh_model_card(directory, repo_id=repo_id)
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    api = HfApi() if api is None else api
    home = directory.resolve()
    with tempfile.TemporaryDirectory(prefix=f".{home.name}.push-", dir=home.parent) as scratch:
        staged = _without_local_paths(files, Path(scratch))
        size = sum(path.stat().st_size for path in staged)
        try:
            created = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
            named = getattr(created, "repo_id", repo_id)
            if revision is not None:
                api.create_branch(named, branch=revision, exist_ok=True, repo_type="model")
            commit = api.upload_folder(
                repo_id=named,
                folder_path=scratch,
                repo_type="model",
                revision=revision,
                commit_message=message or f"Upload {home.name}",
                allow_patterns=[path.name for path in staged],
                ignore_patterns=_HIDDEN,
            )
        except Exception as error:  # wrong ids, no token, HTTP errors, whose types share no base but Exception
            raise ExportError(
                f"{directory} was not uploaded to {repo_id}: {type(error).__name__}: {error}; check the name, the "
                "network, and that `hf auth login` was run with a token that may write"
            ) from error
    url = str(getattr(commit, "commit_url", commit))
    return Pushed(str(named), url, tuple(path.name for path in staged), size)


def _without_local_paths(files: list[Path], scratch: Path) -> list[Path]:
    """What is uploaded, in a directory of its own: weights are linked, texts of fxprune are written without paths."""
    read = {path.name: path.read_text(encoding="utf-8") for path in files if path.name in {MANIFEST_NAME, *_TEXTS}}
    found = {path for name, text in read.items() if name.endswith(".json") for path in _local_paths(json.loads(text))}
    for path in files:
        target = scratch / path.name
        if path.name not in read:
            _link(path, target)
            continue
        text = read[path.name]
        for local in sorted(found, key=len, reverse=True):  # what lies in a directory goes before the directory
            for form in (json.dumps(local)[1:-1], local):
                # Behind a letter or in `</main>` it is part of something else.
                text = re.sub(rf"(?<![\w<]){re.escape(form)}", _last(local).replace("\\", r"\\"), text)
        target.write_text(text, encoding="utf-8")
    write_manifest(scratch, Manifest.model_validate_json((scratch / MANIFEST_NAME).read_text(encoding="utf-8")))
    read_manifest(scratch)  # the weights are those that were compared a moment ago; they are not read again
    return [scratch / path.name for path in files]


def _local_paths(data: Any) -> Iterator[str]:
    """Strings of JSON data that are absolute paths, of this system or of Windows."""
    if isinstance(data, dict):
        for value in data.values():
            yield from _local_paths(value)
    elif isinstance(data, list):
        for value in data:
            yield from _local_paths(value)
    elif isinstance(data, str) and len(data) > 1 and "\n" not in data:
        windows = PureWindowsPath(data)
        if (PurePosixPath(data).is_absolute() or (windows.is_absolute() and windows.drive)) and _last(data):
            yield data


def _last(path: str) -> str:
    return (PurePosixPath(path) if path.startswith("/") else PureWindowsPath(path)).name


def _link(path: Path, target: Path) -> None:
    """Weights are large: a second name where the file system has it, a copy where not."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copy2(path, target)
