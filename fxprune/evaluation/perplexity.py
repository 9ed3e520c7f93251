"""Perplexity of any form of a causal language model, with the definition written beside the figure.

Window length, text, tokenizer, and how rows were joined are part of a perplexity: two figures compare only if all four
agree. So a result carries its definition as a sentence, and the hash of the very tokens that were used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.progress import track

from fxprune.core.errors import CalibrationError, UsageError, VerificationError
from fxprune.models.loading import expand_user
from fxprune.runtimes.runners import scoring_products

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fxprune.runtimes.runners import Runner

__all__ = [
    "Joining",
    "PerplexityResult",
    "file_perplexity",
    "hash_tokens",
    "paragraphs",
    "perplexity",
    "read_text",
    "tokenise",
    "window_losses",
]

Joining = Literal["file", "paragraphs"]
"""How a text file becomes one string: as it is, or with `paragraphs`."""

_LARGEST_LOSS = 700.0  # exp of more is beyond a float; a model that knows nothing has log(vocabulary), about 11
_JOININGS = {
    "file": "the file's text as it is",
    "paragraphs": 'the file\'s lines, blank ones emptied, joined by "\\n\\n"',
}


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and everything needed to compare or repeat it.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood per predicted token, in nats.
        standard_error: of `nll`: the standard deviation of the windows' means over the square root of their number;
            None for a single window.
        windows: how many windows were used.
        tokens: how many tokens were predicted: windows * (window - 1).
        window: tokens per window.
        text: name of the text.
        dtype: of the logits that the model returned, such as `"bfloat16"`.
        runner: which form of the model it was.
        tokens_sha256: of the windows' tokens, as int64 little-endian.
        definition: how the figure is defined, as a sentence.
        losses: mean negative log-likelihood of each window, in nats, for paired tests.
    """

    perplexity: float
    nll: float
    standard_error: float | None
    windows: int
    tokens: int
    window: int
    text: str
    dtype: str
    runner: str
    tokens_sha256: str
    definition: str
    losses: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The figures for a report; what does not exist is absent, and so are the single windows."""
        figures = dataclasses.asdict(self)
        del figures["losses"]
        return {key: value for key, value in figures.items() if value is not None}


def read_text(path: str | Path) -> str:
    """Read a text file as UTF-8. Line ends stay as they are; a byte order mark is dropped.

    Raises:
        CalibrationError: the file is missing, is a directory, cannot be read, is not UTF-8 or holds white space only.
    """
    file = expand_user(path)
    try:
        text = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{file} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}; convert it "
            f"(for instance with iconv) or choose a text file"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read {file}: {error.strerror or error}; name a UTF-8 text file") from error
    if not text.strip():
        raise CalibrationError(f"{file} holds no text")
    return text


def paragraphs(text: str) -> str:
    r"""Join a text's lines by `"\n\n"`, blank lines emptied: how the GPTQ, SparseGPT and Wanda code joins WikiText."""
    return "\n\n".join(line if line.strip() else "" for line in text.split("\n"))


def tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokenise a text once, with no special tokens added.

    Returns:
        (tokens,) int64.
    """
    # verbose=False: no warning that the text is longer than the model's context, it is cut into windows afterwards.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def hash_tokens(tokens: Tensor) -> str:
    """SHA-256 of tokens as int64, little-endian, in row-major order: 64 hexadecimal digits."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def file_perplexity(
    runner: Runner,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    joining: Joining = "file",
    window: int = 512,
    max_windows: int | None = None,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> PerplexityResult:
    """Perplexity over a text file, tokenised once without special tokens.

    Args:
        runner: any form of the model.
        path: UTF-8 text.
        tokenizer: the model's own.
        joining: `"file"` takes the text as it is, `"paragraphs"` joins its lines as much of the literature does.
        window: see `perplexity`, as the rest.
        max_windows: see `perplexity`.
        batch_size: see `perplexity`.
        device: see `perplexity`.

    Raises:
        CalibrationError: the file cannot be used, or it is shorter than one window.
        UsageError: an option is out of range.
        VerificationError: the model returned numbers that are not finite.
    """
    if joining not in _JOININGS:
        raise UsageError(f"joining is {joining!r}; use {' or '.join(map(repr, _JOININGS))}")
    text = read_text(path)
    tokens = tokenise(paragraphs(text) if joining == "paragraphs" else text, tokenizer)
    return perplexity(
        runner,
        tokens,
        text=Path(path).name,
        source=f"{_JOININGS[joining]}, tokenised once with no special tokens",
        window=window,
        max_windows=max_windows,
        batch_size=batch_size,
        device=device,
    )


def perplexity(
    runner: Runner,
    tokens: Tensor,
    *,
    text: str,
    source: str = "the tokens as given",
    window: int = 512,
    max_windows: int | None = None,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> PerplexityResult:
    """Perplexity over tokens that are cut into windows without overlap; what is left at the end is not used.

    Each window stands alone: the model sees nothing before it, and its window - 1 predictions count alike. One batch of
    logits is held at a time, and one window of them in float32.

    Args:
        runner: any form of the model: eager, traced graph, ONNX Runtime.
        tokens: (tokens,) integers.
        text: name of the text, for the result.
        source: how the tokens came about, for the definition.
        window: tokens per window, at least 2.
        max_windows: use the first so many windows; all when None.
        batch_size: windows per call of the runner.
        device: where the runner wants its inputs.

    Raises:
        CalibrationError: there are fewer tokens than one window, or a token is outside the model's vocabulary.
        UsageError: an option is out of range.
        VerificationError: the model returned numbers that are not finite.
    """
    if window < 2 or batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise UsageError(
            f"perplexity needs window >= 2, batch_size >= 1 and max_windows >= 1; got {window}, {batch_size} and "
            f"{max_windows}"
        )
    if tokens.numel() < window:
        raise CalibrationError(
            f"{text} has {tokens.numel()} tokens and one window needs {window}; use a longer text or a shorter window"
        )
    windows = tokens[: tokens.numel() // window * window].to(torch.int64).reshape(-1, window)[:max_windows]
    losses, dtype = window_losses(runner, windows, text=text, batch_size=batch_size, device=device)
    nll = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - nll) ** 2 for loss in losses) / max(len(losses) - 1, 1)
    return PerplexityResult(
        perplexity=math.exp(nll),
        nll=nll,
        standard_error=math.sqrt(variance / len(losses)) if len(losses) > 1 else None,
        windows=len(losses),
        tokens=len(losses) * (window - 1),
        window=window,
        text=text,
        dtype=dtype,
        runner=runner.name,
        tokens_sha256=hash_tokens(windows),
        definition=(
            f"{text}: {source}; cut into windows of {window} without overlap, the first {len(losses)} windows; mean "
            f"over the {window - 1} next-token predictions of each, log-softmax in float32; perplexity is exp(mean)"
        ),
        losses=tuple(losses),
    )


def window_losses(
    runner: Runner, windows: Tensor, *, text: str, batch_size: int = 1, device: torch.device | str = "cpu"
) -> tuple[list[float], str]:
    """Mean negative log-likelihood of each window's next-token predictions, in nats, and the logits' dtype.

    Args:
        runner: any form of the model.
        windows: (windows, window) integers.
        text: name of the text, for messages.
        batch_size: windows per call of the runner.
        device: where the runner wants its inputs.

    Raises:
        CalibrationError: a token is outside the model's vocabulary.
        VerificationError: the model returned numbers that are not finite.
    """
    batches = track(
        torch.split(windows, batch_size),
        f"perplexity of {runner.name}",
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    losses: list[float] = []
    dtype = ""
    for batch in batches:
        inputs = batch.to(device)
        positions = torch.arange(batch.shape[1], device=inputs.device).expand_as(inputs).contiguous()
        where = f"{runner.name}, windows from {len(losses)} of {text}"
        try:
            with scoring_products(runner, device):
                logits = runner.step(inputs, torch.ones_like(inputs), positions, None)[0]
            losses += _window_losses(logits, inputs)
        except IndexError as error:
            raise CalibrationError(
                f"{where}: a token (the largest is {int(batch.max())}) or a position (up to {batch.shape[1] - 1}) is "
                f"outside the model's tables ({error}); use the model's own tokenizer, or a shorter window"
            ) from error
        if not all(loss < _LARGEST_LOSS for loss in losses):  # false for NaN as well
            raise VerificationError(
                f"{where}: the model's logits are not finite, or its loss is above {_LARGEST_LOSS} nats; try float32, "
                f"or look for broken weights"
            )
        dtype = str(logits.dtype).removeprefix("torch.")
    return losses, dtype


def _window_losses(logits: Tensor, inputs: Tensor) -> list[float]:
    """Mean negative log-likelihood of each window of a batch, from logits (batch, window, vocabulary)."""
    return [
        torch.nn.functional.cross_entropy(row[:-1].float(), labels[1:].to(row.device)).item()
        for row, labels in zip(logits, inputs, strict=True)
    ]
