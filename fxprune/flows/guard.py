"""The guard: does pruning hurt text that is unlike the calibration text more than text that is like it?

    calibration source ─ windows that calibration did not use ─┐
                                                               ├─ rise of the log-perplexity, dense to pruned
    another text ──────────────────────────────────────────────┘

Pruning and reconstruction learn from the calibration text, so they can overfit to its domain, and perplexity on text
like it does not show that. The guard warns when the log-perplexity rises on the other text by `LARGE` nats more than on
the first, and this difference is larger than `STANDARD_ERRORS` of its standard errors, which come from the paired
differences of the windows. Windows are short: a token's loss needs some context, and more windows tell more.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxprune.calibration.text import CalibrationSpec, held_out_windows
from fxprune.core.errors import CalibrationError, UsageError
from fxprune.evaluation.perplexity import hash_tokens, read_text, tokenise, window_losses
from fxprune.flows.quality import text_of_python
from fxprune.models.loading import expand_user, max_positions
from fxprune.runtimes.runners import GraphRunner
from fxprune.weights.base import dtype_of, forward_precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fxprune.core.program import Form, Program

__all__ = ["LARGE", "STANDARD_ERRORS", "Guard", "GuardText", "Rise", "check_guard", "parting"]

LARGE = 0.15
"""Nats by which the rises must differ: a perplexity that grows by another sixth."""
STANDARD_ERRORS = 2.0
_WINDOWS = 8
_LENGTH = 128
_AT_ONCE = 4
_CHARACTERS_A_TOKEN = 12
"""More than a token has in any text worth the name: so much of a long text is tokenised at first."""
ADVICE = (
    "the calibration text does not stand for all that the model should still do: use more calibration text "
    "(--samples) or more varied text (--calibration FILE), or keep more of the heads (--option keep='*attn*=0.8')"
)


@dataclass(frozen=True)
class GuardText:
    """Windows of a text.

    Attributes:
        role: `calibration` or `different`.
        text: name.
        source: how it came about, as a sentence.
        tokens: (windows, length) int64.
    """

    role: str
    text: str
    source: str
    tokens: Tensor


@dataclass(frozen=True)
class Rise:
    """By how much the log-perplexity rises.

    Attributes:
        mean: nats, over the windows.
        standard_error: of the mean, from the windows' paired differences; None for a single window.
    """

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, dense: Sequence[float], slim: Sequence[float]) -> Rise:
        """From the windows' mean losses in nats, as many of each."""
        differences = [after - before for before, after in zip(dense, slim, strict=True)]
        many = len(differences) > 1
        return cls(
            statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences)) if many else None
        )


def parting(like: Rise, unlike: Rise) -> tuple[float, float | None, bool]:
    """How far two rises part.

    Args:
        like: on text like the calibration text.
        unlike: on the different text.

    Returns:
        Difference in nats (above 0: the different text suffers more), its standard error (None when it is not known),
        and whether that is more than chance and more than `LARGE`.
    """
    difference = unlike.mean - like.mean
    if like.standard_error is None or unlike.standard_error is None:
        return difference, None, False
    error = math.hypot(like.standard_error, unlike.standard_error)
    return difference, error, difference > LARGE and difference > STANDARD_ERRORS * error


def check_guard(second: str) -> None:
    """Raise `CalibrationError` unless the second text is `none`, `python` or a readable file."""
    if second not in {"none", "python"}:
        read_text(second)


class Guard:
    """Measures pruned models; the texts and the dense model's losses are made once.

    Args:
        program: the dense, located program; a causal language model with a cache.
        spec: of the calibration samples.
        second: a file, or `python` for Python's own language reference.
        windows: of each text.
        length: tokens of a window; fewer where the calibration samples or the model's positions are shorter.
        forward_dtype: precision of the products of both forms; `auto` is bfloat16 where the machine is faster in it.

    Raises:
        CalibrationError: a text cannot be read or is too short.
    """

    def __init__(
        self,
        program: Program,
        spec: CalibrationSpec,
        second: str = "python",
        *,
        windows: int = _WINDOWS,
        length: int = _LENGTH,
        forward_dtype: str | None = "auto",
    ) -> None:
        start = time.perf_counter()
        assert program.source is not None
        if program.source.tokenizer is None:
            raise UsageError("the guard reads text, which needs the model's tokenizer; use --guard none")
        limit = max_positions(program.source.config)
        self._dense = _runner(program.references["lifted"], "dense")
        self._device = next(program.graph_module.parameters()).device
        self._precision = forward_precision(forward_dtype, dtype_of(program), self._device)
        length = min(length, spec.seq_len, limit or length)
        if spec.source == "self" and length >= 4:  # a token of all windows costs a step: as many tokens in fewer steps
            windows, length = 2 * windows, length // 2
        like = held_out_windows(
            spec,
            windows,
            length,
            tokenizer=program.source.tokenizer,
            runner=self._dense,
            config=program.source.config,
            device=self._device,
        )
        own = "newly sampled from the model" if spec.source == "self" else "windows that calibration did not use"
        file = expand_user(spec.source)
        self.texts = [
            GuardText("calibration", file.name if file.is_file() else spec.source, own, like),
            _second_text(second, program.source.tokenizer, windows, length),
        ]
        self._losses = [self._measure(self._dense, text) for text in self.texts]
        self.seconds = time.perf_counter() - start

    def _measure(self, runner: GraphRunner, text: GuardText) -> list[float]:
        if not len(text.tokens):
            return []
        dtype = self._precision
        with torch.autocast(self._device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return window_losses(runner, text.tokens, text=text.text, batch_size=_AT_ONCE, device=self._device)[0]

    def judge(self, program: Program) -> dict[str, Any]:
        """Measure a slim program.

        Returns:
            The report's `guard` section. `warning` is in it when the texts part ways; `note` when that cannot be said.

        Raises:
            VerificationError: the pruned model's logits are not finite.
        """
        start = time.perf_counter()
        runner = GraphRunner(program.graph_module, program.interface, "slim")
        entries: list[dict[str, Any]] = []
        rises: list[Rise] = []
        for text, dense in zip(self.texts, self._losses, strict=True):
            if not dense:
                continue
            slim = self._measure(runner, text)
            rises.append(Rise.of(dense, slim))
            entries.append(_entry(text, dense, slim, rises[-1]))
        section: dict[str, Any] = {"texts": entries, "limit": LARGE, "standard_errors": STANDARD_ERRORS}
        if self._precision is not None:
            section["products_in"] = str(self._precision).removeprefix("torch.")
        if len(rises) < 2:
            section["note"] = (
                "calibration used all windows of its text, so nothing like it is left to compare with: use a longer "
                "text, or fewer samples"
            )
        else:
            difference, error, apart = parting(*rises)
            section |= {"difference": difference} | ({} if error is None else {"difference_stderr": error})
            if apart:
                section["warning"] = _warning(self.texts[1].text, rises, difference, error)
            elif error is None:
                section["note"] = "one window of a text has no standard error: use a longer text to be told more"
        return section | {"seconds": self.seconds + time.perf_counter() - start}


def _runner(form: Form, name: str) -> GraphRunner:
    assert isinstance(form.module, torch.fx.GraphModule)
    return GraphRunner(form.module, form.interface, name)


def _second_text(second: str, tokenizer: Any, windows: int, length: int) -> GuardText:
    """The first windows of the different text."""
    if second == "python":
        name, text, source = "python-reference", text_of_python(), "Python's language reference, topics in order"
    else:
        name, text, source = second.replace("\\", "/").rpartition("/")[2], read_text(second), "the file's beginning"
    needed = windows * length
    tokens = tokenise(text[: needed * _CHARACTERS_A_TOKEN], tokenizer)
    if len(tokens) < needed:
        tokens = tokenise(text, tokenizer)
    found = min(windows, len(tokens) // length)
    if not found:
        raise CalibrationError(
            f"--guard {second} has {len(tokens)} tokens, one window needs {length}: use a longer text, or --guard none"
        )
    return GuardText("different", name, source, tokens[: found * length].reshape(found, length))


def _entry(text: GuardText, dense: Sequence[float], slim: Sequence[float], rise: Rise) -> dict[str, Any]:
    entry = {
        "role": text.role,
        "text": text.text,
        "source": text.source,
        "windows": len(text.tokens),
        "window": text.tokens.shape[1],
        "tokens_sha256": hash_tokens(text.tokens),
        "dense": math.exp(statistics.fmean(dense)),
        "slim": math.exp(statistics.fmean(slim)),
        "rise": rise.mean,
    }
    return entry | ({} if rise.standard_error is None else {"rise_stderr": rise.standard_error})


def _warning(name: str, rises: Sequence[Rise], difference: float, error: float | None) -> str:
    like, unlike = rises
    return (
        f"log-perplexity rises by {unlike.mean:.2f} nats on {name}, but by {like.mean:.2f} on text like the "
        f"calibration text: {difference:.2f} ± {error:.2f} more; {ADVICE}"
    )
