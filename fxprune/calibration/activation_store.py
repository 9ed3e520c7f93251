"""Boundary activations of all calibration samples, within a budget of memory.

Values live on the device they were computed on while that fits, then in main memory, then in memory-mapped files. Where
a value lives is decided when its first batch arrives; a value is one tensor per batch of samples.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from fxprune.core.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

__all__ = ["ActivationStore"]


class ActivationStore:
    """Values by name and batch.

    Args:
        batches: how many batches every value has.
        device: where values are computed and handed out.
        device_budget: bytes that may stay on the device, if that is not the CPU.
        memory_budget: bytes that may stay in main memory; None for no limit.
        directory: where the memory-mapped files go; a temporary directory by default.
    """

    def __init__(
        self,
        batches: int,
        *,
        device: torch.device | str = "cpu",
        device_budget: int = 0,
        memory_budget: int | None = None,
        directory: Path | None = None,
    ) -> None:
        self.batches = batches
        self.device = torch.device(device)
        self.budgets = {"device": 0 if self.device.type == "cpu" else device_budget, "memory": memory_budget}
        self.used = {"device": 0, "memory": 0, "file": 0}
        self._reserved = {"device": 0, "memory": 0, "file": 0}  # for values whose batches are still to come
        self._sizes: dict[str, int] = {}
        self.peak = dict(self.used)
        self._where: dict[str, str] = {}
        self._values: dict[str, list[Any]] = {}
        self._parent = directory
        self._directory: Path | None = None
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._values.clear()
        self._where.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def names(self) -> tuple[str, ...]:
        """Names of the values that are kept."""
        return tuple(self._values)

    def put(self, name: str, batch: int, value: Any) -> None:
        """Keep one batch of a value.

        Raises:
            CalibrationError: the disk is full.
        """
        if name not in self._values:
            self._values[name] = [None] * self.batches
            self._sizes[name] = _bytes(value) * self.batches
            self._where[name] = self._place(self._sizes[name])
            self._reserved[self._where[name]] += self._sizes[name]
        if not isinstance(value, Tensor):  # a length
            self._values[name][batch] = value
            return
        where = self._where[name]
        if where == "memory":
            value = value.detach().to("cpu")
        elif where == "file":
            value = self._mapped(value.detach())
        self._values[name][batch] = value
        self.used[where] += _bytes(value)
        self.peak[where] = max(self.peak[where], self.used[where])

    def get(self, name: str, batch: int) -> Any:
        """One batch of a value, on the device."""
        value = self._values[name][batch]
        return value.to(self.device) if isinstance(value, Tensor) else value

    def all_of(self, name: str) -> list[Any]:
        """Every batch of a value, wherever it lives."""
        return list(self._values[name])

    def drop(self, names: Iterable[str], batch: int) -> None:
        """Forget one batch of some values; names that are not kept are passed over."""
        for name in names:
            if name in self._values:
                self.used[self._where[name]] -= _bytes(self._values[name][batch])
                self._values[name][batch] = None
                if all(value is None for value in self._values[name]):
                    self._reserved[self._where[name]] -= self._sizes[name]
                    del self._values[name], self._where[name], self._sizes[name]

    def _place(self, size: int) -> str:
        for where in ("device", "memory"):
            budget = self.budgets[where]
            if budget is None or self._reserved[where] + size <= budget:
                return where
        return "file"

    def _mapped(self, value: Tensor) -> Tensor:
        """A copy of a tensor in a memory-mapped file."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="fxprune-activations-", dir=self._parent))
        self._count += 1
        path = self._directory / f"{self._count}.bin"
        size = value.numel() * value.element_size()
        try:
            # Reserved, not only sized: a full disk must fail here and not as a bus error on the first write.
            with path.open("wb") as file:
                file.write(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            raw = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
            path.unlink()  # the mapping lives on; nothing is left behind if the process is killed
        except (OSError, RuntimeError) as error:
            raise CalibrationError(
                f"activations do not fit: cannot write {size:,} bytes to {path.parent} ({error}); use fewer samples, a "
                f"larger memory budget, or another directory"
            ) from error
        return raw.view(value.dtype).reshape(value.shape)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
