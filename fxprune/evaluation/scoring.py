"""Log-likelihoods of continuations, from any form of a causal language model: what zero-shot tasks are made of.

Sequences are padded on the right, with positions from the mask: what a sequence shares a batch with changes its figures
by rounding at most. Only the logits that predict a continuation are computed, where the model can leave out the others.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import CalibrationError, VerificationError
from fxprune.core.progress import track
from fxprune.models.loading import max_positions
from fxprune.runtimes.batching import BatchSize, run_batches
from fxprune.runtimes.runners import EagerRunner, position_ids_from_mask, scoring_products

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fxprune.runtimes.runners import Runner

__all__ = ["Score", "Scorer", "context_length", "named_length"]

_LOGGER = logging.getLogger(__name__)
_ROWS = 1024  # rows of float32 log-probabilities at a time
_DEFAULT_LENGTH = 2048  # lm-eval's, for models that name no limit
_NO_LENGTH = 10**9  # tokenizers without a limit name a number far above this


@dataclass(frozen=True)
class Score:
    """What a model says about one continuation.

    Attributes:
        loglikelihood: sum of the log-probabilities of the continuation's tokens, in nats.
        greedy: whether each of its tokens is the most likely one after all that is before it.
        last_greedy: whether its last token is.
    """

    loglikelihood: float
    greedy: bool
    last_greedy: bool


def context_length(runner: Runner, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """The longest sequence of a model: as its configuration names it, else its tokenizer, else 2048."""
    config = getattr(getattr(runner, "model", None), "config", None)
    return (max_positions(config) if config is not None else None) or named_length(tokenizer)


def named_length(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The longest sequence that a tokenizer names, else 2048."""
    named = getattr(tokenizer, "model_max_length", None)
    return named if isinstance(named, int) and 0 < named < _NO_LENGTH else _DEFAULT_LENGTH


class Scorer:
    """Scores continuations with one model.

    Attributes:
        runner: any form of the model.
        device: where the runner wants its inputs.
        max_length: the most tokens of an input; longer ones lose tokens on the left.
        batch_size: sequences at once, see `fxprune.runtimes.batching.run_batches`.
        vocabulary: logits a token.
        dtype: of the logits, such as `"bfloat16"`.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_length: int,
        batch_size: BatchSize = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        """Run one token to learn the size and the type of the logits."""
        self.runner = runner
        self.device = torch.device(device)
        self.max_length = max_length
        self.batch_size = batch_size
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        logits = runner.step(token, torch.ones_like(token), token, None)[0]
        self.vocabulary = int(logits.shape[-1])
        self.dtype = str(logits.dtype).removeprefix("torch.")
        self._leaves_out = isinstance(runner, EagerRunner) and _has_logits_to_keep(runner.model)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, what: str = "scoring") -> list[Score]:
        """Score continuations of contexts.

        Continuations that need the same input, such as the single-token choices of one question, share a run.

        Args:
            pairs: tokens of the context and of the continuation, at least one each.
            what: label of the progress bar.

        Returns:
            A score for each pair, in their order.

        Raises:
            CalibrationError: a context or a continuation is empty, a continuation is longer than `max_length`, or a
                token is outside the model's vocabulary.
            UsageError: a batch does not fit in memory.
            VerificationError: the logits are not finite.
        """
        wanted: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        cut = 0
        for index, (context, continuation) in enumerate(pairs):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise CalibrationError(
                    f"request {index}: {len(context)} tokens of context and {len(continuation)} of continuation; each "
                    f"needs at least one, and the continuation at most the model's {self.max_length}"
                )
            inputs = (*context, *continuation)[:-1]
            cut += len(inputs) > self.max_length
            targets = wanted.setdefault(tuple(inputs[-self.max_length :]), {})
            targets.setdefault(tuple(continuation), []).append(index)
        if cut:
            _LOGGER.warning(
                "%d of %d sequences exceed %d tokens and lose their start", cut, len(pairs), self.max_length
            )
        with track(what, total=len(wanted)) as progress:
            made = run_batches(
                [(inputs, list(targets)) for inputs, targets in wanted.items()],
                self._score_batch,
                length=lambda item: len(item[0]),
                vocabulary=self.vocabulary,
                batch_size=self.batch_size,
                device=self.device,
                progress=progress,
            )
        scores: dict[int, Score] = {}
        for targets, found in zip(wanted.values(), made, strict=True):
            for indices, score in zip(targets.values(), found, strict=True):
                scores |= dict.fromkeys(indices, score)
        return [scores[index] for index in range(len(pairs))]

    @torch.no_grad()
    def _score_batch(self, batch: list[tuple[tuple[int, ...], list[tuple[int, ...]]]]) -> list[list[Score]]:
        """One run: for each input, a score for each of its continuations."""
        longest = max(len(inputs) for inputs, _ in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        rows: list[int] = []
        columns: list[int] = []
        labels: list[int] = []
        sizes: list[int] = []
        for row, (inputs, targets) in enumerate(batch):
            ids[row, : len(inputs)] = torch.tensor(inputs)
            mask[row, : len(inputs)] = 1
            for target in targets:
                rows += [row] * len(target)
                columns += range(len(inputs) - len(target), len(inputs))
                labels += target
                sizes.append(len(target))
        kept, at = torch.unique(torch.tensor(columns), return_inverse=True)
        logits = self._logits(ids, mask, kept)
        losses, hits = [], []
        place = torch.stack([torch.tensor(rows), at, torch.tensor(labels)]).to(logits.device)
        for row_part, column_part, label_part in torch.split(place, _ROWS, dim=1):
            part = logits[row_part, column_part]
            part = part if part.dtype == torch.float64 else part.float()
            losses.append(torch.nn.functional.cross_entropy(part, label_part, reduction="none").double())
            hits.append(part.argmax(-1) == label_part)
        loss, hit = torch.cat(losses).cpu(), torch.cat(hits).cpu()
        if not bool(loss.isfinite().all()):
            raise VerificationError(
                f"{self.runner.name}: the model's logits are not finite; try float32, or look for broken weights"
            )
        scores = (
            Score(-float(some.sum()), bool(right.all()), bool(right[-1]))
            for some, right in zip(torch.split(loss, sizes), torch.split(hit, sizes), strict=True)
        )
        return [[next(scores) for _ in targets] for _, targets in batch]

    def _logits(self, ids: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
        """Logits (batch, kept positions, vocabulary) of right-padded inputs (batch, length)."""
        inputs = {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
            "position_ids": position_ids_from_mask(mask, ids.shape[1]).contiguous().to(self.device),
        }
        kept = kept.to(self.device)
        try:
            with scoring_products(self.runner, self.device):
                if self._leaves_out:
                    assert isinstance(self.runner, EagerRunner)
                    output: Any = self.runner.model(**inputs, logits_to_keep=kept, use_cache=False)
                    logits: Tensor = output.logits
                    return logits
                logits = self.runner.step(**inputs, past=None)[0]
            return logits[:, kept.to(logits.device)]
        except IndexError as error:
            raise CalibrationError(
                f"{self.runner.name}: a token (the largest is {int(ids.max())}) or a position (up to "
                f"{ids.shape[1] - 1}) is outside the model's tables ({error}); use the model's own tokenizer, or a "
                f"smaller maximal length"
            ) from error


def _has_logits_to_keep(model: Any) -> bool:
    forward = getattr(model, "forward", None)
    return forward is not None and "logits_to_keep" in inspect.signature(forward).parameters
