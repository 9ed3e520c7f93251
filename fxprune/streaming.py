"""Streaming: a model that does not fit in memory is pruned from its safetensors shards into new ones, block by block.

    shards of the dense model ─ read one block's tensors ─ calibrate, solve ─ one new shard ─ next block
                                                 └ activations at the block's end ─ file ─ resume from here

The graph is traced on the meta device; parameters get values when the engine reaches them and lose them at the end of
their block. Progress lies in a directory beside the output: the new shards so far, the activations at the last
block's end, and `progress.json`. A run that was interrupted goes on there and gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxprune.channels import get_attribute
from fxprune.errors import CheckpointError, OutputError
from fxprune.lifted import origin_of
from fxprune.loading import weight_files
from fxprune.output import swap
from fxprune.shards import hash_file
from fxprune.weight_masks import masks_of_state, write_masks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch.fx import GraphModule

    from fxprune.activation_store import ActivationStore

__all__ = ["ShardReader", "StreamingOutput", "StreamingWeights"]

_PROGRESS = "progress.json"
_ACTIVATIONS = "activations-{stage}.safetensors"
_FREE_MARGIN = 1 << 26
_GO_ON = "make room and run the same command again, it goes on after the last finished block"


class ShardReader:
    """Reads single tensors of a checkpoint's safetensors files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = weight_files(directory)
        self.where: dict[str, Path] = {}
        for path in self.files:
            with _opened(path) as file:
                self.where |= dict.fromkeys(file.keys(), path)

    def read(self, name: str) -> Tensor:
        """A tensor in its own memory, on the CPU.

        Raises:
            CheckpointError: no file has it, or its file is damaged.
        """
        if name not in self.where:
            raise CheckpointError(f"{self.directory} has no tensor {name!r}")
        return _read(self.where[name], name)

    def read_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, by reading one element of it."""
        with _opened(self.where[name]) as file:
            piece = file.get_slice(name)
            empty: Tensor = piece[:0] if piece.get_shape() else file.get_tensor(name)
            return empty.dtype

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and headers of the files: what they hold, short of the numbers themselves."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
                digest.update(file.read(length))
        return digest.hexdigest()


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, truncated or damaged ({error}); copy it again") from error


def _read(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}); copy the file again") from error
        return tensor.clone()  # the mapping of the file goes with the handle


@dataclass
class StreamingOutput:
    """The directory that a streaming run writes, beside the one it becomes at the end.

    Attributes:
        target: where the checkpoint shall be.
        reader: the dense checkpoint.
        fingerprint: of everything that decides the result; a run goes on only with its own.
    """

    target: Path
    reader: ShardReader
    fingerprint: str
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def staging(self) -> Path:
        """Where the unfinished checkpoint lies."""
        return self.target.with_name(f".{self.target.name}.streaming")

    def open(self, *, restart: bool = False) -> None:
        """Start, or find what an interrupted run left.

        Raises:
            OutputError: there is unfinished work of another run, or the directory cannot be written.
            CheckpointError: a shard of the unfinished work is missing or damaged.
        """
        file = self.staging / _PROGRESS
        if self.staging.exists() and (restart or not file.is_file()):
            shutil.rmtree(self.staging)
        if file.is_file():
            self.progress = json.loads(file.read_bytes())
            if self.progress.get("fingerprint") != self.fingerprint:
                raise OutputError(
                    f"{self.staging} holds unfinished work with other options or another model; finish that run, or "
                    f"start over with restart"
                )
            for name, expected in self.progress["files"].items():
                path = self.staging / name
                if not path.is_file() or hash_file(path) != expected:
                    raise CheckpointError(
                        f"{path} is missing or was changed since it was written; start over with restart"
                    )
            self._remove_leftovers()
            return
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {self.staging}: {error}") from error
        self.progress = {"fingerprint": self.fingerprint, "next_stage": 0, "files": {}, "tensors": {}, "figures": []}

    def _remove_leftovers(self) -> None:
        """What a killed run had not recorded yet."""
        for path in self.staging.iterdir():
            if path.name not in {_PROGRESS, *self.progress["files"]}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def next_stage(self) -> int:
        """Where to go on."""
        return int(self.progress["next_stage"])

    def restored(self) -> dict[str, list[Any]]:
        """What the store held at the end of the last finished block."""
        name = self.progress.get("activations")
        if name is None:
            return {}
        found: dict[str, dict[int, Any]] = {}
        for key, tensor in load_file(self.staging / name).items():
            value, _, batch = key.rpartition("@")
            found.setdefault(value, {})[int(batch)] = tensor.clone()  # aligned as it was, and not a mapped file
        for key, number in self.progress.get("numbers", {}).items():
            value, _, batch = key.rpartition("@")
            found.setdefault(value, {})[int(batch)] = number
        return {value: [batches[index] for index in sorted(batches)] for value, batches in found.items()}

    def location(self, name: str) -> Path | None:
        """The new shard that holds a tensor; None while only the dense checkpoint does."""
        file = self.progress["tensors"].get(name)
        return None if file is None else self.staging / file

    def finish_block(
        self,
        tensors: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        next_stage: int,
        store: ActivationStore,
        *,
        figures: Sequence[Any],
        batch_size: int,
    ) -> None:
        """Write a block's tensors and the activations at its end; from here an interrupted run goes on.

        Raises:
            CheckpointError: the disk is full; what was finished before is whole.
        """
        files = self.progress["files"]
        if tensors:
            self._record(tensors)
            masks_file = write_masks(self.staging, masks, part=len(files))
            if masks_file is not None:
                files[masks_file] = hash_file(self.staging / masks_file)
        kept, numbers = _flat(store)
        activations = _ACTIVATIONS.format(stage=next_stage)
        self._save(kept, activations)
        before = self.progress.get("activations")
        files.pop(before, None)
        files[activations] = hash_file(self.staging / activations)
        self.progress |= {
            "next_stage": next_stage,
            "batch_size": batch_size,
            "activations": activations,
            "numbers": numbers,
            "figures": [*self.progress["figures"], *figures],
        }
        self._write_progress()
        if before is not None and before != activations:
            (self.staging / before).unlink(missing_ok=True)

    def _save(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Write a file whole or not at all."""
        path = self.staging / f"{name}.partial"
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        try:
            _require_room(self.staging, size)
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path, {"format": "pt"})
            path.replace(self.staging / name)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write {self.staging / name}: {error}; {_GO_ON}") from error

    def _write_progress(self) -> None:
        path = self.staging / f"{_PROGRESS}.partial"
        try:
            path.write_text(json.dumps(self.progress, indent=1, sort_keys=True), encoding="utf-8")
            path.replace(self.staging / _PROGRESS)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.staging / _PROGRESS}: {error}; {_GO_ON}") from error

    def finish(self, *, overwrite: bool) -> None:
        """Copy what no block touched, write the index, and give the directory its name.

        Raises:
            CheckpointError: the disk is full; the same command goes on.
            OutputError: the target cannot be replaced; the same command goes on.
        """
        for name in self.reader.where:  # one at a time: the embedding may be the largest tensor of the model
            if name not in self.progress["tensors"]:
                self._record({name: self.reader.read(name)})
                self._write_progress()
        places = self.progress["tensors"]
        index = {
            "metadata": {"total_size": self._size(set(places.values()))},
            "weight_map": dict(sorted(places.items())),
        }
        try:
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.staging / "model.safetensors.index.json").write_text(text, encoding="utf-8")
            for path in self.reader.directory.iterdir():
                if path.is_file() and not _is_weights(path.name):
                    shutil.copy2(path, self.staging / path.name)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.staging}: {error}; {_GO_ON}") from error
        swap(self.staging, self.target, overwrite=overwrite)
        for leftover in (_PROGRESS, self.progress.get("activations")):  # only now: until here they are needed to go on
            if leftover is not None:
                (self.target / leftover).unlink(missing_ok=True)

    def _size(self, files: set[str]) -> int:
        return sum((self.staging / file).stat().st_size for file in files)

    def _record(self, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard and take it into the progress."""
        name = f"model-{sum(file.startswith('model-') for file in self.progress['files']) + 1:05d}.safetensors"
        self._save(tensors, name)
        self.progress["files"][name] = hash_file(self.staging / name)
        self.progress["tensors"] |= dict.fromkeys(tensors, name)


def _require_room(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size + _FREE_MARGIN:
        raise OSError(f"{size:,} bytes are needed and {free:,} are free")


_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".data")


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS) or name in {"report.json", "report.html", "fxprune.json"}


def _flat(store: ActivationStore) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name in store.names():
        for batch, value in enumerate(store.all_of(name)):
            (tensors if isinstance(value, Tensor) else numbers)[f"{name}@{batch}"] = value
    return tensors, numbers


class StreamingWeights:
    """Gives meta parameters of graph pieces their values, and takes them away at the end of a block.

    Args:
        root: the graph on the meta device, whose projections are its own.
        output: where new tensors go; what is already there is read from there.
        values: tensors that no checkpoint holds, by name (rotary frequencies).
        names: for every parameter of the graph, its name in the checkpoint.
        device: where the values go.
    """

    def __init__(
        self,
        root: GraphModule,
        output: StreamingOutput,
        values: Mapping[str, Tensor],
        names: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self.root = root
        self.output = output
        self.values = values
        self.names = names
        self.device = device
        self.figures: Callable[[], Sequence[Any]] = tuple
        self.masks: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._touched: list[tuple[nn.Module, str, Tensor]] = []
        self._solved: list[str] = []
        self._written: set[str] = set()
        self.batch_size: Callable[[], int] = int

    def enter(self, module: GraphModule) -> None:
        """Give every meta parameter and buffer of a piece of the graph its value."""
        for owner_name, owner in module.named_modules():
            for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
                if tensor is not None and tensor.is_meta:
                    self._fill(owner, leaf, f"{owner_name}.{leaf}".lstrip("."))

    def solving(self, linears: Sequence[str]) -> None:
        """Bring in the weights that are about to be solved."""
        for name in linears:
            module = get_attribute(self.root, name)
            for leaf, tensor in module._parameters.items():
                if tensor is not None and tensor.is_meta:
                    self._fill(module, leaf, f"{name}.{leaf}")
            if name not in self._written:  # a layer that is called again was solved at its first call
                self._solved.append(name)

    def _fill(self, owner: nn.Module, leaf: str, name: str) -> None:
        origin = origin_of(owner)
        turned = False
        if origin is not None:
            name = origin.weight if leaf == "weight" else origin.bias
            turned = leaf == "weight" and origin.transposed and isinstance(owner, nn.Linear)
        value = self._value(name)
        old = owner._parameters.get(leaf)
        meta = owner._buffers[leaf] if old is None else old
        assert meta is not None
        shown = value.t() if turned else value
        if shown.shape != meta.shape:
            raise CheckpointError(
                f"{name} is {tuple(shown.shape)} in the shards where the model class wants {tuple(meta.shape)}; "
                "config.json and the weights do not belong together"
            )
        shown = shown.to(meta.dtype) if shown.is_floating_point() else shown
        self._touched.append((owner, leaf, meta))
        if old is None:
            owner._buffers[leaf] = shown
        else:
            owner._parameters[leaf] = nn.Parameter(shown, requires_grad=False)

    def _value(self, name: str) -> Tensor:
        if name in self.values:
            return self.values[name].to(self.device)
        stored = self.names.get(name, name)
        if stored not in self._loaded:
            place = self.output.location(stored)
            tensor = self.output.reader.read(stored) if place is None else _read(place, stored)
            self._loaded[stored] = tensor.to(self.device)
        return self._loaded[stored]

    def end_block(self, next_stage: int, store: ActivationStore) -> None:
        """Write what was solved, forget all values, keep what the next block starts from."""
        tensors: dict[str, Tensor] = {}
        for name in dict.fromkeys(self._solved):
            module = get_attribute(self.root, name)
            origin = origin_of(module)
            weight = module.weight.detach()
            stored = f"{name}.weight" if origin is None else origin.weight
            turned = origin is not None and origin.transposed and isinstance(module, nn.Linear)
            key = self.names.get(stored, stored)
            tensors[key] = (weight.t() if turned else weight).to(self.output.reader.read_dtype(key))
        solved = {name: self.masks.pop(name) for name in dict.fromkeys(self._solved) if name in self.masks}
        masks = masks_of_state(self.root, solved)
        self.output.finish_block(
            tensors, masks, next_stage, store, figures=self.figures(), batch_size=self.batch_size()
        )
        self._written.update(self._solved)
        for owner, leaf, meta in reversed(self._touched):
            if isinstance(meta, nn.Parameter):
                owner._parameters[leaf] = meta
            else:
                owner._buffers[leaf] = meta
        self._touched.clear()
        self._loaded.clear()
        self._solved.clear()

    @staticmethod
    def checkpoint_names(root: GraphModule) -> dict[str, str]:
        """For every parameter of a lifted projection, the parameter of the model that it stands for."""
        found: dict[str, str] = {}
        for name, module in root.named_modules():
            origin = origin_of(module)
            if origin is not None:
                found |= {f"{name}.weight": origin.weight, f"{name}.bias": origin.bias}
        return found

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Which of these parameters no file holds under their name."""
        return [n for n in names if n not in self.values and self.names.get(n, n) not in self.output.reader.where]
