"""What shall be measured of what a recipe makes, and what can be said about that before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxprune.calibration.text import check_records
from fxprune.core.errors import UsageError
from fxprune.core.precision import short_name
from fxprune.core.registry import resolve
from fxprune.evaluation.perplexity import read_text
from fxprune.flows.guard import check_guard
from fxprune.flows.slim_speed import speed_plan, timed_pass
from fxprune.models.loading import resolve_device, resolve_dtype
from fxprune.models.methods import require_language_model
from fxprune.structured.base import StructuredPass
from fxprune.weights.base import SparsePass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxprune.core.pass_base import Pass

__all__ = ["Wanted"]


@dataclass(frozen=True)
class Wanted:
    """What shall be measured.

    Attributes:
        ppl: texts for the perplexity: files, or `python` for Python's own language reference.
        windows: of 512 tokens per text.
        guard: the guard's second text: a file, `python`, or `none`.
        speed: whether to time the exported model even if no target speed-up asks for it.
        threads: of ONNX Runtime, where no latency table says it.
        repeats: timed repeats of each form; see `fxprune.flows.slim_speed.speed_plan`.
    """

    ppl: Sequence[str] = ()
    windows: int | None = None
    guard: str = "python"
    speed: bool = False
    threads: int = 1
    repeats: int | None = None

    def check(self, passes: Sequence[Pass], device: str) -> None:
        """Tell what is wrong before any work is done.

        Args:
            passes: those that change the model.
            device: where they run.

        Raises:
            CalibrationError: a text cannot be read, or it is not clear which field of calibration records to read.
            UsageError: speed is to be measured off the CPU, or the latency table or the mix is wrong.
        """
        for text in self.ppl:
            if text != "python":
                read_text(text)
        for step in passes:
            if isinstance(step, StructuredPass | SparsePass) and step.reads_text:
                check_records(step.calibration_spec())
        check_guard(self.guard)
        if self.times(passes):
            speed_plan(timed_pass(passes), self.threads, self.repeats)
            if resolve_device(device).type != "cpu":
                raise UsageError(f"speed is measured in ONNX Runtime on the CPU; leave --device {device} out")

    def check_class(self, step: Pass, model_class: type[Any], config: Any, dtype: str | None = None) -> None:
        """Tell what cannot be measured of a model's class, before it is loaded.

        Raises:
            UsageError: perplexity, a guard's text or a speed of decoding was asked for, and it is no language model.
        """
        asked = {
            "--ppl": bool(self.ppl),
            f"--guard {self.guard}": self.guard not in {"none", "python"},
            "--measure-speed": self.speed,
            "--target-speedup": getattr(step, "target_speedup", None) is not None,
        }
        held = getattr(config, "dtype", None) if dtype is None else resolve_dtype(dtype)
        if self.times([step]) and isinstance(held, torch.dtype):
            lacking = resolve("fxprune.exporters.ort_types:unsupported_operators")(held)
            if lacking:
                raise UsageError(
                    f"speed is measured in ONNX Runtime, which has no {short_name(held)} kernels for "
                    f"{', '.join(lacking)} on this CPU: give --dtype float32, or leave the speed out"
                )
        for what in (name for name, given in asked.items() if given):
            require_language_model(
                what,
                model_class,
                config,
                otherwise="leave it out (fxprune bench --decode 0 times forward passes of other models that read text)",
            )

    def times(self, passes: Sequence[Pass]) -> bool:
        """Whether speed is measured: it was asked for, or a target speed-up has to hold."""
        return self.speed or any(getattr(step, "target_speedup", None) is not None for step in passes)
