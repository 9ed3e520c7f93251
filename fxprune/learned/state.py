"""The state of a training on disk: safetensors and JSON, no pickle; what is resumed goes on bit by bit.

DIR/state.json               settings, step, which files belong to it; written last, whole or not at all
DIR/state-000050.safetensors gates, multipliers, adapters, the optimizer's moments, random numbers
DIR/teacher-000012.safetensors  one snapshot of gates and adapters each, written once
DIR/log.jsonl                a line of figures for every step
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fxprune.core.errors import CheckpointError, OutputError
from fxprune.core.output import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from fxprune.learned.teachers import Teachers

__all__ = ["StateDirectory", "load_optimizer", "optimizer_tensors", "teacher_tensors"]

FORMAT = "fxprune l0 training 1"
_GATES, _ADAPTERS = "gates/", "adapters/"


class StateDirectory:
    """Where a training is kept.

    Args:
        path: the directory; it is made when something is written.
        settings: what the training follows from, JSON data; another training with other settings is refused.

    Raises:
        OutputError: the path is a file, or holds something else.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path).expanduser()
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; name a directory for the state of the training")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "state.json").is_file():
            foreign = [one.name for one in self.path.iterdir() if not _own(one.name)]
            if foreign:
                raise OutputError(f"{self.path} holds {foreign[0]}, which is no state of a training; name another one")

    @property
    def log(self) -> Path:
        """The log."""
        return self.path / "log.jsonl"

    def read(self) -> dict[str, Any] | None:
        """What was saved last; None in a new directory.

        Raises:
            CheckpointError: it cannot be read, or was made with other settings.
        """
        file = self.path / "state.json"
        if not file.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); remove {self.path} to start anew") from error
        if found.get("format") != FORMAT:
            raise CheckpointError(f"{file}: not written as {FORMAT!r}; remove {self.path} to start anew")
        before, now = found["settings"], self.settings
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if changed:
            said = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed[:4])
            raise CheckpointError(
                f"{self.path} holds a training with other settings ({said}): resume with the settings of the first "
                "run, or name another directory to start anew (--restart on the command line)"
            )
        return found

    def clear(self) -> None:
        """Remove the training, so that the next one starts anew; other files stay."""
        if not self.path.is_dir():
            return
        if self.log.is_file():  # else TensorBoard's files are of something else
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        # The state first: without it the rest counts for nothing.
        for file in sorted(self.path.iterdir(), key=lambda one: one.name != "state.json"):
            if file.is_file() and _own(file.name):
                file.unlink()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one of the files.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            return dict(load_file(self.path / name))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path / name}: cannot be read ({error}); remove {self.path} to start anew"
            ) from error

    def write(self, step: int, tensors: Mapping[str, Tensor], teachers: Teachers | None, **facts: Any) -> None:
        """Save a state; the one before stays whole until this one is.

        Args:
            step: steps that are done.
            tensors: by name.
            teachers: their snapshots are saved beside, each once.
            **facts: further JSON data.

        Raises:
            OutputError: it cannot be written.
        """
        name = f"state-{step:06d}.safetensors"
        listed = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for snapshot in [] if teachers is None else [teachers.intact, *teachers.snapshots]:
                file = f"teacher-{snapshot.step:06d}.safetensors"
                if snapshot is not (teachers and teachers.intact):
                    listed.append({"file": file, "sparsity": snapshot.sparsity, "step": snapshot.step})
                else:
                    file = "teacher-intact.safetensors"
                if not (self.path / file).is_file():
                    self._put(file, teacher_tensors(snapshot.gates, snapshot.adapters))
            self._put(name, tensors)
            write_json(
                self.path / "state.json",
                {
                    "format": FORMAT,
                    "step": step,
                    "tensors": name,
                    "teachers": listed,
                    "settings": self.settings,
                    **facts,
                },
            )
            kept = {name, "teacher-intact.safetensors", *(one["file"] for one in listed)}
            for old in self.path.glob("*.safetensors"):
                if old.name not in kept and _own(old.name):
                    old.unlink()
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{self.path}: the state of the training cannot be written: {error}; the one before is whole"
            ) from error

    def _put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        temporary = self.path / f".{name}.tmp"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        os.replace(temporary, self.path / name)  # noqa: PTH105 - what Path.replace does

    def load_teachers(self, found: Mapping[str, Any], teachers: Teachers) -> None:
        """Bring the teachers back that a state names."""
        snapshots = [{**_parts(self.tensors("teacher-intact.safetensors")), "sparsity": 0.0, "step": 0}]
        snapshots += [
            {**_parts(self.tensors(one["file"])), "sparsity": one["sparsity"], "step": one["step"]}
            for one in found["teachers"]
        ]
        teachers.load_state_dict({"options": teachers.state_dict()["options"], "snapshots": snapshots})


def _own(name: str) -> bool:
    return name.lstrip(".").startswith(("state-", "teacher-")) or name in {"state.json", "log.jsonl", "tensorboard"}


def teacher_tensors(gates: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates and adapters as the tensors of one file."""
    return {f"{_GATES}{name}": value for name, value in gates.items()} | {
        f"{_ADAPTERS}{name}": value for name, value in adapters.items()
    }


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {
        part[:-1]: {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
        for part in (_GATES, _ADAPTERS)
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The moments of an optimizer by the names of its parameters."""
    found = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    return found


def load_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, moment, name = key.split("/", 2)
            parameter = named[name]
            # Step counts stay on the CPU, as torch makes them.
            there = value.clone() if moment == "step" else value.to(parameter.device, copy=True)
            optimizer.state[parameter][moment] = there
