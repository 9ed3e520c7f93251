"""The rungs about text: a deployed form must write what the slim graph writes.

A runtime that chooses its tokens itself (onnxruntime-genai) is compared by the text it makes. In half precision two
correct forms may choose differently where the two best tokens are a tie: such a place is looked up in the reference,
and the rung says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from fxprune.runtimes.runners import greedy, position_ids_from_mask
from fxprune.verification.ladder import Rung

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fxprune.runtimes.runners import Runner

__all__ = ["TextMaker", "compare_greedy", "same_text"]


class TextMaker(Protocol):
    """A runtime that makes text itself.

    Attributes:
        ends: tokens after which it stops.
    """

    ends: tuple[int, ...]

    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        """Greedy text after (1, prompt): (1, up to `new_tokens`) int64, the end-of-text token included."""
        ...


def same_text(
    rung: str, reference: Runner, maker: TextMaker, prompt: Tensor, new_tokens: int = 12, *, tie: float = 0.0
) -> Rung:
    """Compare the text of a runtime with the reference's greedy text, up to an end-of-text token.

    Args:
        rung: name of the comparison.
        reference: the form that is right by definition.
        maker: the runtime.
        prompt: (1, length) int64.
        new_tokens: how many tokens to add at most.
        tie: difference of two logits below which either token may be chosen; 0 for none.

    Returns:
        The rung; the error is the share of tokens from the first that differs on.
    """
    expected = greedy(reference, prompt, new_tokens)[0].tolist()
    end = next((index for index, token in enumerate(expected) if token in maker.ends), len(expected) - 1)
    given = maker.generate(prompt.cpu(), new_tokens)[0].tolist()
    return _judge(rung, reference, prompt, (expected[: end + 1], given), tie)


def compare_greedy(
    rung: str, reference: Runner, candidate: Runner, prompt: Tensor, new_tokens: int = 12, *, tie: float = 0.0
) -> Rung:
    """Compare the greedy texts of two forms, see `same_text`."""
    expected, given = (greedy(runner, prompt, new_tokens)[0].tolist() for runner in (reference, candidate))
    return _judge(rung, reference, prompt, (expected, given), tie)


def _judge(
    rung: str, reference: Runner, prompt: Tensor, texts: tuple[Sequence[int], Sequence[int]], tie: float
) -> Rung:
    expected, given = texts
    longest = max(len(expected), len(given))
    same = next((i for i in range(longest) if expected[i : i + 1] != given[i : i + 1]), longest)
    error = 1 - same / longest
    if same == longest or same >= min(len(expected), len(given)) or not tie:
        return Rung(rung, error, 0.0, same == longest, 1)
    gap = _gap(reference, prompt, expected[:same], (expected[same], given[same]))
    detail = f"token {same} of {longest}: the reference's logits of the two choices differ by {gap:.3g}"
    return Rung(rung, 0.0 if gap <= tie else error, 0.0, gap <= tie, 1, detail=detail)


@torch.no_grad()
def _gap(reference: Runner, prompt: Tensor, text: Sequence[int], choices: tuple[int, int]) -> float:
    """How much less the reference likes the second choice after the prompt and the text."""
    tokens = torch.cat([prompt, prompt.new_tensor([list(text)])], dim=1) if text else prompt
    mask = torch.ones_like(tokens)
    logits, _ = reference.step(tokens, mask, position_ids_from_mask(mask, tokens.shape[1]), None)
    first, second = (float(logits[0, -1, token]) for token in choices)
    return first - second
