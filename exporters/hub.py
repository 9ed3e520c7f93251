"""The hub: upload a checkpoint, when asked, through huggingface_hub.

The files are compared with their hashes first, so that what others will download is what was written and proved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxprune.errors import ExportError
from fxprune.exporters.model_card import refresh_model_card
from fxprune.manifest import verify_files

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Pushed", "push_to_hub"]

_HIDDEN = [".*", "**/.*"]


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
    try:
        created = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        named = getattr(created, "repo_id", repo_id)
        if revision is not None:
            api.create_branch(named, branch=revision, exist_ok=True, repo_type="model")
        commit = api.upload_folder(
            repo_id=named,
            folder_path=str(directory),
            repo_type="model",
            revision=revision,
            commit_message=message or f"Upload {directory.resolve().name}",
            allow_patterns=[path.name for path in files],
            ignore_patterns=_HIDDEN,
        )
    except Exception as error:  # wrong ids, no token, HTTP errors; the HTTP client's own share no base but Exception
        raise ExportError(
            f"{directory} was not uploaded to {repo_id}: {type(error).__name__}: {error}; check the name, the network, "
            "and that `hf auth login` was run with a token that may write"
        ) from error
    url = str(getattr(commit, "commit_url", commit))
    return Pushed(str(named), url, tuple(path.name for path in files), sum(path.stat().st_size for path in files))
