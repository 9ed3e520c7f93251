"""Reading single tensors of a checkpoint's safetensors files, each file checked against its hash when first read."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from fxprune.core.errors import CheckpointError
from fxprune.models.loading import weight_files
from fxprune.models.manifest import MANIFEST_NAME, read_manifest
from fxprune.models.shards import verify_hashes

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

__all__ = ["ShardReader", "read_tensor"]


class ShardReader:
    """Reads single tensors of a checkpoint's safetensors files.

    Where the directory has an `fxprune.json`, a file must have the SHA-256 that it says.

    Args:
        directory: of the checkpoint.

    Attributes:
        files: the weight files.
        where: for every tensor, its file.
        dtypes: for every tensor, its dtype.
        hashes: SHA-256 of each file by name, as `fxprune.json` has them; empty where there is none.

    Raises:
        CheckpointError: a file is missing or damaged, or `fxprune.json` does not know it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = weight_files(directory)
        self.hashes = dict(read_manifest(directory).files) if (directory / MANIFEST_NAME).is_file() else {}
        if self.hashes and (unknown := [path.name for path in self.files if path.name not in self.hashes]):
            raise CheckpointError(f"{directory / MANIFEST_NAME} has no hash of {unknown[0]}; copy the checkpoint again")
        self.where: dict[str, Path] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._verified: set[Path] = set()
        for path in self.files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping, it has no __iter__
                    self.where[name] = path
                    piece = file.get_slice(name)
                    self.dtypes[name] = (piece[:0] if piece.get_shape() else file.get_tensor(name)).dtype

    def read(self, name: str) -> Tensor:
        """A tensor in its own memory, on the CPU.

        Raises:
            CheckpointError: no file has it, or its file is damaged or was changed.
        """
        if name not in self.where:
            raise CheckpointError(f"{self.directory} has no tensor {name!r}")
        path = self.where[name]
        if self.hashes and path not in self._verified:
            hint = f"or remove {MANIFEST_NAME} if the change was meant"
            verify_hashes(self.directory, {path.name: self.hashes[path.name]}, hint)
            self._verified.add(path)
        return read_tensor(path, name)

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes, headers and known hashes of the files: what they hold, as far as that is known."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(f"{path.name} {path.stat().st_size} {self.hashes.get(path.name)}\n".encode())
                digest.update(file.read(length))
        return digest.hexdigest()


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file in its own memory, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or has no such tensor.
    """
    with _opened(path) as file:
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}); copy the file again") from error
        return tensor.clone()  # the mapping of the file goes with the handle


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, truncated or damaged ({error}); copy it again") from error
