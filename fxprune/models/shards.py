"""Weight files: safetensors written in shards, hashed, and read back with typed errors."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fxprune.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

__all__ = [
    "hash_dense_weights",
    "hash_file",
    "hash_header",
    "read_shapes",
    "read_tensors",
    "separate",
    "verify_hashes",
    "verify_headers",
    "write_shards",
]

_T = TypeVar("_T")
_HASH_BLOCK = 1 << 20


def write_shards(
    tensors: Mapping[str, Tensor], directory: Path, max_shard_size: int | str, stem: str = "model"
) -> dict[str, str]:
    """Write tensors to `model.safetensors`, or to numbered shards with an index if they are larger than a shard may be.

    Args:
        tensors: on any device, of any strides; a storage that several share is written for each.
        directory: an existing directory.
        max_shard_size: in bytes, or as `"5GB"`. A single tensor that is larger gets a file of its own.
        stem: beginning of the files' names; loaders of Hugging Face checkpoints look for `"model"`.

    Returns:
        SHA-256 of each file by name.

    Raises:
        UsageError: `max_shard_size` is not a size.
        CheckpointError: a file cannot be written.
    """
    try:
        split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise UsageError(f"max_shard_size {max_shard_size!r}: {error}") from error
    hashes: dict[str, str] = {}
    try:
        for file, names in split.filename_to_tensors.items():
            save_file(separate({name: tensors[name] for name in names}), directory / file, metadata={"format": "pt"})
            hashes[file] = hash_file(directory / file)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (directory / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write weights to {directory}: {error}") from error
    return hashes


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each alone in its storage: safetensors refuses shared ones."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.numel() * own.element_size() or storage.data_ptr() in storages:
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_header(path: Path) -> str:
    """SHA-256 of a safetensors file's size and header: names, dtypes, shapes and places, not the weights themselves.

    Raises:
        CheckpointError: the file is missing or too short for its header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size:
                raise CheckpointError(f"{path} is truncated or not a safetensors file; copy it again")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the checkpoint again") from error
    return hashlib.sha256(f"{size} ".encode() + start + header).hexdigest()


def verify_headers(directory: Path, headers: Mapping[str, str]) -> None:
    """Check size and header of each weight file; what the weights are is not looked at.

    Args:
        directory: where the files are.
        headers: what `hash_header` gave when they were written, by name.

    Raises:
        CheckpointError: a file is missing, or has another size or header than when it was written.
    """
    for name, expected in headers.items():
        if hash_header(directory / name) != expected:
            raise CheckpointError(
                f"{directory / name} has another size or header than fxprune.json says; the file was changed, damaged "
                "or swapped with another: copy the checkpoint again, or load with verify_hash=False if the change was "
                "meant"
            )


def hash_dense_weights(directory: Path | None) -> str | None:
    """SHA-256 over names and hashes of the safetensors files of a directory; None if it has none.

    Files of the Hugging Face cache are links to blobs named by their hash, which is taken from the name.
    """
    files = sorted(directory.glob("*.safetensors")) if directory is not None else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        blob = path.resolve()
        named = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
        digest.update(f"{blob.name if named else hash_file(path)}  {path.name}\n".encode())
    return digest.hexdigest()


def verify_hashes(
    directory: Path,
    files: Mapping[str, str],
    otherwise: str = "or load with verify_hash=False if the change was meant",
) -> None:
    """Check the SHA-256 of each file.

    Args:
        directory: where the files are.
        files: SHA-256 by name.
        otherwise: what can be done but copying the checkpoint again, for the message.

    Raises:
        CheckpointError: a file is missing or has other content than when it was written.
    """
    for name, expected in files.items():
        path = directory / name
        try:
            found = hash_file(path)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} is missing; the directory is not a whole checkpoint, copy it again"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy the checkpoint again") from error
        if found != expected:
            raise CheckpointError(
                f"{path} has SHA-256 {found}, but fxprune.json says {expected}; the file was changed or damaged: copy "
                f"the checkpoint again, {otherwise}"
            )


def read_shapes(directory: Path, files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the files, read from their headers.

    Raises:
        CheckpointError: a file is missing or damaged, or two files hold a tensor of the same name.
    """
    return _read(directory, files, "cpu", lambda file, name: tuple(file.get_slice(name).get_shape()))


def read_tensors(
    directory: Path, files: Iterable[str], device: torch.device, dtype_of: Callable[[str, Tensor], torch.dtype]
) -> dict[str, Tensor]:
    """Read all tensors of the files.

    Args:
        directory: where the files are.
        files: their names.
        device: where the tensors shall be.
        dtype_of: gives the dtype that a tensor shall have.

    Raises:
        CheckpointError: as `read_shapes`.
    """

    def read(file: Any, name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        return tensor.to(dtype_of(name, tensor))

    return _read(directory, files, str(device), read)


def _read(directory: Path, files: Iterable[str], device: str, read: Callable[[Any, str], _T]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for name in files:
        path = directory / name
        try:
            with safe_open(path, framework="pt", device=device) as file:
                for tensor in file.keys():  # noqa: SIM118 - not a mapping, it has no __iter__
                    if tensor in found:
                        raise CheckpointError(f"{path}: {tensor} is in another file too; write the checkpoint again")
                    found[tensor] = read(file, tensor)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is missing, truncated or damaged ({error}); copy it again") from error
    return found
