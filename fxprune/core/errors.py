"""The error tree: every failure a user can meet has a type here.

A message says three things: what failed, in which module (qualified name), and what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ExportError",
    "FxpruneError",
    "NotFiniteError",
    "OutputError",
    "PlanError",
    "PostconditionError",
    "PreconditionError",
    "RegistryError",
    "TraceError",
    "TrainingError",
    "UnsupportedOpError",
    "UsageError",
    "VerificationError",
]


class FxpruneError(Exception):
    """Base of every error that fxprune raises on purpose."""


class UsageError(FxpruneError, ValueError):
    """An option has a value that no run could accept; the command line exits with 2."""


class TraceError(FxpruneError):
    """The model could not be traced to a graph."""


class UnsupportedOpError(FxpruneError):
    """An operator stands where the requested rewrite needs a rule for it and there is none."""


class PlanError(FxpruneError):
    """A plan is illegal, or no legal plan satisfies the request."""


class PreconditionError(FxpruneError):
    """A pass was given a program it cannot work on."""


class PostconditionError(FxpruneError):
    """A pass returned a program that breaks what the pass promises."""


class VerificationError(FxpruneError):
    """Two forms of a model that must compute the same do not."""


class CheckpointError(FxpruneError):
    """A checkpoint cannot be read or written."""


class ExportError(FxpruneError):
    """A program cannot be exported to the requested format."""


class CalibrationError(FxpruneError):
    """Calibration or evaluation text is missing, unreadable or too short."""


class TrainingError(FxpruneError):
    """Training diverged or ended without reaching its target."""


class NotFiniteError(CalibrationError, TrainingError):
    """A value of the model, or a gradient, left the range of its precision; the message names the module.

    Attributes:
        tokens: (samples, length) int64 that the model was run on, where what raises this knows them.
    """

    def __init__(self, message: str, tokens: Tensor | None = None) -> None:
        super().__init__(message)
        self.tokens = tokens


class OutputError(FxpruneError):
    """An output location cannot be used as asked."""


class RegistryError(FxpruneError):
    """A pass name is unknown, or two packages claim the same one."""
