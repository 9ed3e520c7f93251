"""How far a form that only approximates a model is from it: measured where equality cannot be asked for.

A quantized form is another function, so no rung of the ladder holds for it. What can be said is how much its
distributions differ from the model's on text that the model itself wrote, and how long greedy text stays the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import VerificationError
from fxprune.runtimes.runners import greedy, position_ids_from_mask

if TYPE_CHECKING:
    from torch import Tensor

    from fxprune.runtimes.runners import Runner

__all__ = ["Difference", "measure_difference"]


@dataclass(frozen=True)
class Difference:
    """The measured difference of two forms.

    Attributes:
        forms: which ones, such as `int4 - slim`.
        positions: tokens predicted, each after the same text in both forms.
        max_abs_difference: largest absolute difference of a logit.
        mean_abs_difference: mean absolute difference of the logits.
        mean_kl: mean over the positions of KL(reference || candidate), in nats.
        max_kl: its largest value.
        same_first_choice: share of positions where both have the same most likely token.
        greedy_tokens: tokens of the greedy texts that were compared.
        greedy_same: how many of them come before the first one that differs.
    """

    forms: str
    positions: int
    max_abs_difference: float
    mean_abs_difference: float
    mean_kl: float
    max_kl: float
    same_first_choice: float
    greedy_tokens: int
    greedy_same: int

    def to_json(self) -> dict[str, Any]:
        """The difference as JSON data."""
        return asdict(self)

    def describe(self) -> str:
        """The figures in a sentence."""
        return (
            f"{self.forms}: not expected to be equal; over {self.positions} positions KL {self.mean_kl:.4f} nats "
            f"(largest {self.max_kl:.3f}), logits differ by up to {self.max_abs_difference:.3g}, same first choice at "
            f"{self.same_first_choice:.1%}; greedy text the same for {self.greedy_same} of {self.greedy_tokens} tokens"
        )


@torch.no_grad()
def measure_difference(
    forms: str, reference: Runner, candidate: Runner, tokens: Tensor, *, prompt: int = 4, new_tokens: int = 24
) -> Difference:
    """Measure a form against the one it approximates.

    Args:
        forms: how the result calls them.
        reference: the form that is right by definition.
        candidate: the form that approximates it.
        tokens: (sequences, length) int64, best text of the reference; each position predicts after all before it.
        prompt: greedy texts go on after the first so many tokens of each sequence.
        new_tokens: tokens of each greedy text.

    Raises:
        VerificationError: the candidate's logits are not finite.
    """
    largest = total = 0.0
    divergences, agreed, count, same = [], 0, 0, 0
    for row in tokens.unbind():
        row = row.unsqueeze(0)  # noqa: PLW2901 - the same sequence, as a batch
        mask = torch.ones_like(row)
        positions = position_ids_from_mask(mask, row.shape[1])
        expected, given = (runner.step(row, mask, positions, None)[0].float() for runner in (reference, candidate))
        if not bool(given.isfinite().all()):
            raise VerificationError(f"{candidate.name} returned numbers that are not finite; it cannot be used")
        gap = (expected - given).abs()
        largest, total = max(largest, gap.max().item()), total + gap.mean().item() * row.shape[1]
        wanted, found = expected.log_softmax(-1), given.log_softmax(-1)
        divergences.append((wanted.exp() * (wanted - found)).sum(-1).clamp(min=0).flatten())
        agreed += int((expected.argmax(-1) == given.argmax(-1)).sum())
        count += row.shape[1]
        texts = [greedy(runner, row[:, :prompt], new_tokens)[0] for runner in (reference, candidate)]
        same += int((texts[0] == texts[1]).long().cumprod(0).sum())
    kl = torch.cat(divergences)
    return Difference(
        forms,
        count,
        largest,
        total / count,
        kl.mean().item(),
        kl.max().item(),
        agreed / count,
        len(tokens) * new_tokens,
        same,
    )
