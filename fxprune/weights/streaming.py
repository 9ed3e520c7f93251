"""Streaming: a model that does not fit in memory is pruned from its safetensors shards into new ones, block by block.

    shards of the dense model ─ read one block's tensors ─ calibrate, solve ─ one new shard ─ next block
                                                 └ activations at the block's end ─ file ─ resume from here

The graph is traced on the meta device; parameters get values when the engine reaches them and lose them at the end of
their block. Progress lies in a directory beside the output: the new shards so far, the activations at the last
block's end, and `progress.json`. A run that was interrupted goes on there and gives the same bits.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxprune.checkpoints.checkpoint import load_skeleton
from fxprune.core.errors import CheckpointError, OutputError
from fxprune.core.output import swap, write_json
from fxprune.core.registry import resolve
from fxprune.models.manifest import Manifest, SourceRecord, versions, write_manifest
from fxprune.models.shard_reader import read_tensor
from fxprune.models.shards import hash_dense_weights, hash_file, read_shapes
from fxprune.models.skeleton import state_shapes
from fxprune.tracing.lifted import parameter_of
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.weight_masks import masks_of_state, write_masks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch.fx import GraphModule

    from fxprune.calibration.activation_store import ActivationStore
    from fxprune.core.program import Event
    from fxprune.models.stored_weights import StoredWeights

__all__ = ["StreamingOutput", "StreamingWeights"]

_PROGRESS = "progress.json"
_ACTIVATIONS = "activations-{stage}.safetensors"
_FREE_MARGIN = 1 << 26
_GO_ON = "make room and run the same command again, it goes on after the last finished block"


@dataclass
class StreamingOutput:
    """The directory that a streaming run writes, beside the one it becomes at the end.

    Attributes:
        target: where the checkpoint shall be.
        stored: the dense checkpoint.
        fingerprint: of everything that decides the result; a run goes on only with its own.
    """

    target: Path
    stored: StoredWeights
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
        try:
            write_json(self.staging / _PROGRESS, self.progress)
        except OutputError as error:
            raise CheckpointError(f"{error}; {_GO_ON}") from error

    def finish(self, event: Event, source: str, *, overwrite: bool, masks: Mapping[str, Tensor] | None = None) -> None:
        """Copy what no block touched, write index, configuration and manifest, and give the directory its name.

        Args:
            event: what was done, for the manifest's history.
            source: the dense model, as the user gave it.
            overwrite: whether an earlier output may be replaced.
            masks: of weights that were removed before and that no block touched, by the model's parameters.

        Raises:
            CheckpointError: the disk is full, or the checkpoint does not fit its own configuration; the same command
                goes on.
            OutputError: the target cannot be replaced; the same command goes on.
        """
        for name in self.stored.names:  # one at a time: the embedding may be the largest tensor of the model
            if name not in self.progress["tensors"]:
                self._record({name: self.stored.read(name)})
                self._write_progress()
        places = self.progress["tensors"]
        files = sorted(set(places.values()))
        index = {"metadata": {"total_size": self._size(files)}, "weight_map": dict(sorted(places.items()))}
        directory = self.stored.directory
        try:
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.staging / "model.safetensors.index.json").write_text(text, encoding="utf-8")
            for path in directory.iterdir():
                if path.is_file() and not _is_weights(path.name):
                    shutil.copy2(path, self.staging / path.name)
            self._name_class()
            write_masks(self.staging, masks or {}, part=0)
            write_manifest(
                self.staging,
                Manifest(
                    kind="uniform",
                    reason="",
                    source=SourceRecord(name=source, sha256=hash_dense_weights(directory)),
                    versions=versions(),
                    plan={},
                    history=(event.to_json(),),
                    config_overrides={},
                    layer_overrides={},
                    parameters={},
                    added_biases=(),
                    zero_biases=(),
                    files={name: self.progress["files"][name] for name in files},
                ),
            )
            resolve("fxprune.exporters.model_card:write_model_card")(self.staging, source=directory)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.staging}: {error}; {_GO_ON}") from error
        self._prove(files)
        swap(self.staging, self.target, overwrite=overwrite)
        for leftover in (_PROGRESS, self.progress.get("activations")):  # only now: until here they are needed to go on
            if leftover is not None:
                (self.target / leftover).unlink(missing_ok=True)

    def _name_class(self) -> None:
        """Let the configuration name the class that was pruned: the names of the weights are those of this class."""
        path = self.staging / "config.json"
        config = json.loads(path.read_bytes())
        if config.get("architectures") != [self.stored.architecture]:
            write_json(path, config | {"architectures": [self.stored.architecture]})

    def _prove(self, files: Sequence[str]) -> None:
        """The model that configuration and manifest describe has the tensors that were written, and no others."""
        wanted, written = state_shapes(load_skeleton(self.staging)), read_shapes(self.staging, files)
        if wrong := sorted(n for n in wanted.keys() | written.keys() if wanted.get(n) != written.get(n)):
            raise CheckpointError(
                f"{wrong[0]} ({len(wrong)} such tensors): config.json describes {wanted.get(wrong[0])}, and "
                f"{written.get(wrong[0])} was written; the configuration and the weights of {self.stored.directory} do "
                "not belong together"
            )

    def _size(self, files: Sequence[str]) -> int:
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
    return name.endswith(_WEIGHTS) or name in {"report.json", "report.html", "report.md", "fxprune.json"}


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
        device: where the values go.
        masks: of what was solved, by projection; those of a finished block are taken out.
        figures: gives the figures of what was solved since the last call, JSON-able.
        batch_size: gives the batch size that the run has.
    """

    def __init__(
        self,
        root: GraphModule,
        output: StreamingOutput,
        values: Mapping[str, Tensor],
        device: torch.device,
        *,
        masks: dict[str, Tensor],
        figures: Callable[[], Sequence[Any]],
        batch_size: Callable[[], int],
    ) -> None:
        self.root = root
        self.output = output
        self.values = values
        self.device = device
        self.masks = masks
        self.figures = figures
        self.batch_size = batch_size
        self._loaded: dict[str, Tensor] = {}
        self._touched: list[tuple[nn.Module, str, Tensor]] = []
        self._solved: list[str] = []
        self._written: set[str] = set()

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
        name, turned = parameter_of(owner, name)
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
        key = self.output.stored.key(name)
        if key not in self._loaded:
            place = self.output.location(key)
            tensor = self.output.stored.read(key) if place is None else read_tensor(place, key)
            self._loaded[key] = tensor.to(self.device)
        return self._loaded[key]

    def end_block(self, next_stage: int, store: ActivationStore) -> None:
        """Write what was solved, forget all values, keep what the next block starts from."""
        tensors: dict[str, Tensor] = {}
        for name in dict.fromkeys(self._solved):
            module = get_attribute(self.root, name)
            weight = module.weight.detach()
            original, turned = parameter_of(module, f"{name}.weight")
            key = self.output.stored.key(original)
            tensors[key] = (weight.t() if turned else weight).to(self.output.stored.dtype(key))
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
