"""The numerous teachers of progressive distillation: earlier states of the student itself.

    sparsity 0    1%    2%    ...                               target
             |     |     |      teacher  <----- gap ----->  student            stage 1: the teacher follows the student
             |     |     |  teachers  <--------------------------             stage 2: back from weak to strong,
          intact                                                                       ending with the intact model

Li et al. 2024, "NutePrune: efficient progressive pruning with numerous teachers for large language models". A teacher
is the values of the gates and the adapters (LoRA) at some sparsity; the weights are one and the same for all, so it
takes little memory, and to switch copies none: gates get values, adapters get tensors.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

__all__ = ["Snapshot", "Teachers", "worn"]

_SLACK = 1e-9


@dataclass(frozen=True)
class Snapshot:
    """A state of the student.

    Attributes:
        sparsity: it had, a share from 0 to 1.
        gates: values of the gates by group, (units,) on the CPU.
        adapters: trained tensors beside the weights, by name, on the CPU; none where masks alone are learned.
        step: of training.
    """

    sparsity: float
    gates: Mapping[str, Tensor]
    adapters: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(t.numel() * t.element_size() for t in (*self.gates.values(), *self.adapters.values()))


class Teachers:
    """Snapshots by sparsity, and which of them teaches.

    Args:
        intact: the state in which the model is the original one: gates of one, adapters as they were made (a LoRA adds
            nothing then). It is copied, and never thinned out.
        interval: sparsity from one snapshot to the next.
        gap: by how much the teacher is denser than the student.
        limit_bytes: the most that all snapshots may take; None for any amount. Beyond it those are dropped whose
            neighbours are nearest to each other, so that the rest stay evenly spread; the first and the last stay.

    Raises:
        UsageError: interval, gap or limit make no sense.
    """

    def __init__(
        self,
        intact: Snapshot,
        *,
        interval: float = 0.01,
        gap: float = 0.1,
        limit_bytes: int | None = None,
    ) -> None:
        if not 0 < interval < 1:
            raise UsageError(f"the interval of teachers must lie between 0 and 1, got {interval}")
        if not 0 < gap < 1:
            raise UsageError(f"the gap between teacher and student must lie between 0 and 1, got {gap}")
        self.interval = interval
        self.gap = gap
        self.limit_bytes = limit_bytes
        self.intact = Snapshot(0.0, _copied(intact.gates), _copied(intact.adapters), intact.step)
        self.snapshots: list[Snapshot] = []
        if limit_bytes is not None and 3 * self.intact.bytes > limit_bytes:
            raise UsageError(
                f"teachers may take {limit_bytes:,} bytes, but one takes {self.intact.bytes:,}, and the intact, the "
                f"first and the last are always kept: allow {3 * self.intact.bytes:,} bytes or more"
            )

    @property
    def bytes(self) -> int:
        """What all of them take in main memory."""
        return self.intact.bytes + sum(snapshot.bytes for snapshot in self.snapshots)

    # ---- stage 1 ---------------------------------------------------------------------------------------------------

    def is_due(self, sparsity: float) -> bool:
        """Whether the student has passed the next multiple of the interval since the last snapshot.

        Raises:
            UsageError: the sparsity is not a number.
        """
        if not math.isfinite(sparsity):
            raise UsageError("the student's sparsity is not a number; training has diverged, use an earlier state")
        last = self.snapshots[-1].sparsity if self.snapshots else 0.0
        return self._mark(sparsity) > self._mark(last)

    def _mark(self, sparsity: float) -> int:
        return math.floor(sparsity / self.interval + _SLACK)

    def record(self, snapshot: Snapshot) -> bool:
        """Keep a copy of a snapshot on the CPU, if one `is_due`; whether it was kept."""
        if not self.is_due(snapshot.sparsity):
            return False
        self.snapshots.append(
            Snapshot(snapshot.sparsity, _copied(snapshot.gates), _copied(snapshot.adapters), snapshot.step)
        )
        self._thin()
        return True

    def _thin(self) -> None:
        while self.limit_bytes is not None and self.bytes > self.limit_bytes and len(self.snapshots) > 2:
            spans = [
                after.sparsity - before.sparsity
                for before, after in zip(self.snapshots, self.snapshots[2:], strict=False)
            ]
            # Of equal ones the oldest: the student is farther from it than from the others.
            self.snapshots.pop(1 + min(range(len(spans)), key=lambda index: (round(spans[index], 9), index)))

    def while_pruning(self, sparsity: float) -> Snapshot:
        """The teacher of stage 1: the one nearest to `gap` denser than a student of this sparsity, never a sparser one.

        It is the intact model until the student is far enough.
        """
        wanted = sparsity - self.gap
        known = [self.intact, *(s for s in self.snapshots if s.sparsity <= sparsity - _SLACK)]
        return min(known, key=lambda s: (abs(s.sparsity - wanted), s.sparsity))

    # ---- stage 2 ---------------------------------------------------------------------------------------------------

    def afterwards(self, progress: float, sparsity: float) -> Snapshot:
        """The teacher of stage 2: from the one that stage 1 ended with, back to the intact model.

        Each teaches for an equal share of the stage.

        Args:
            progress: share of the stage that is done, from 0 to 1.
            sparsity: the final one.

        Raises:
            UsageError: progress is not in [0, 1].
        """
        if not 0 <= progress <= 1:
            raise UsageError(f"the progress of a stage must lie in [0, 1], got {progress}")
        weakest = self.while_pruning(sparsity)
        line = [self.intact, *(s for s in self.snapshots if s.sparsity <= weakest.sparsity)]
        line.sort(key=lambda s: -s.sparsity)
        return line[min(len(line) - 1, math.floor(progress * len(line) + _SLACK))]

    # ---- resuming --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: plain data and tensors, which are not copied."""
        options = {"interval": self.interval, "gap": self.gap, "limit_bytes": self.limit_bytes}
        snapshots = [
            {"sparsity": s.sparsity, "step": s.step, "gates": dict(s.gates), "adapters": dict(s.adapters)}
            for s in (self.intact, *self.snapshots)
        ]
        return {"options": options, "snapshots": snapshots}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it was made with other options, or for other gates or adapters.
        """
        own = self.state_dict()
        if state["options"] != own["options"]:
            raise CheckpointError(
                f"the teachers were saved with {dict(state['options'])}, now they have {own['options']}: resume with "
                "the settings of the first run, or start anew"
            )
        found = [Snapshot(s["sparsity"], s["gates"], s["adapters"], s["step"]) for s in state["snapshots"]]
        for snapshot in found:
            if _shapes(snapshot) != _shapes(self.intact):
                raise CheckpointError("the teachers were saved for other gates or adapters: resume with the same model")
        self.intact, *self.snapshots = found


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _shapes(snapshot: Snapshot) -> list[dict[str, tuple[int, ...]]]:
    return [
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (snapshot.gates, snapshot.adapters)
    ]


@contextmanager
def worn(snapshot: Snapshot, adapters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Let a model be one of its teachers, as long as the context lasts, without gradients.

    The adapters' parameters get the snapshot's tensors for their data and then their own data back; on the CPU nothing
    is copied at all, on another device the snapshot's tensors are. Run the teacher before the student, or outside of
    any graph of the student that checkpointing would run again.

    Args:
        snapshot: the teacher.
        adapters: the model's parameters of the names that the snapshot has.

    Yields:
        The values of the gates on the adapters' device (on the CPU without adapters), for `ProgramGates.applied`.

    Raises:
        CheckpointError: the adapters are others than those of the snapshot.
    """
    if {name: tuple(p.shape) for name, p in adapters.items()} != _shapes(snapshot)[1]:
        raise CheckpointError("the adapters are others than those that the teacher was made with; load the same LoRA")
    before = {name: parameter.data for name, parameter in adapters.items()}
    device = next((p.device for p in adapters.values()), torch.device("cpu"))
    try:
        for name, parameter in adapters.items():
            parameter.data = snapshot.adapters[name].to(parameter.device, parameter.dtype)
        with torch.no_grad():
            yield {name: value.to(device) for name, value in snapshot.gates.items()}
    finally:
        for name, parameter in adapters.items():
            parameter.data = before[name]
