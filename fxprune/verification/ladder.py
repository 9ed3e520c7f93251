"""The verification ladder: every form of a model must compute what the form before it does.

    eager = traced = lifted;  masked = eager with zeroed consumer columns;  slim = masked;  re-exported = slim;
    reloaded checkpoint = slim;  ONNX Runtime = slim;  greedy text of the deployed forms = greedy text of slim

Forms that differ by more than the tolerance of their dtype, and all in lower precision, are judged by
`fxprune.verification.rounding`.

Forms are compared as runners, over batch 1 and 2 x {prefill, several tokens on a past, one token, left padding}.
Logits at padding positions mean nothing and are left out. A model whose state does not fit into a graph (convolution,
linear attention, Mamba) is compared on whole sequences, and on a longer one; its own cache is in the rung about text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.core.errors import VerificationError
from fxprune.runtimes.runners import position_ids_from_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

    from fxprune.core.program import Interface
    from fxprune.runtimes.runners import Runner

__all__ = [
    "Rung",
    "answers",
    "at_least_float",
    "largest_difference",
    "reexported",
    "script_tokens",
    "tolerance_for",
]


@dataclass(frozen=True)
class Rung:
    """One comparison of the ladder.

    Attributes:
        rung: what was compared, such as `slim = masked`.
        max_abs_error: largest absolute difference of a logit over all cases.
        tolerance: what is allowed.
        passed: whether it holds.
        cases: how many comparisons were made.
        first_difference: qualified name of the first module whose output differs; empty when passed or unknown.
        detail: what else there is to say, such as the error in double precision.
    """

    rung: str
    max_abs_error: float
    tolerance: float
    passed: bool
    cases: int
    first_difference: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """The rung as JSON data."""
        return asdict(self)

    def require(self) -> Rung:
        """Return the rung if it holds.

        Raises:
            VerificationError: it does not.
        """
        if self.passed:
            return self
        where = f"; the first module that differs is {self.first_difference}" if self.first_difference else ""
        raise VerificationError(
            f"{self.rung} does not hold: max abs error {self.max_abs_error:.3g} > {self.tolerance:.3g}{where}. "
            "What went in is as it was; where the other form was written, `fxprune verify` on the two shows every case."
        )


def tolerance_for(dtype: torch.dtype, *, runtime: bool = False) -> float:
    """Allowed absolute difference of logits.

    Args:
        dtype: precision of the compared forms.
        runtime: whether one of them runs in another runtime, with its own kernels.

    Returns:
        1e-4 in float32 (1e-3 across runtimes); two hundred units of roundoff in lower precision.
    """
    if dtype in {torch.float32, torch.float64}:
        return 1e-3 if runtime else 1e-4
    return 200 * torch.finfo(dtype).eps


def _script(batch: int, padding: int, vocabulary: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Tokens of three steps (prefill 6, continue with 3, then 1) and the mask over all of them."""
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randint(0, vocabulary, (batch, length), generator=generator) for length in (6, 3, 1)]
    mask = torch.ones(batch, 10, dtype=torch.long)
    mask[0, :padding] = 0
    return steps, mask


def answers(runner: Runner, *, vocabulary: int, device: torch.device, longer: int = 0) -> list[Tensor]:
    """The logits of a form at all positions of all cases that are no padding, (positions, vocabulary) each.

    Args:
        runner: the form.
        vocabulary: ids are drawn below this.
        device: where the runner wants its inputs.
        longer: tokens of one more sequence, which is run first; none when 0.
    """
    found = []
    if longer:
        tokens = torch.randint(0, vocabulary, (1, longer), generator=torch.Generator().manual_seed(4)).to(device)
        positions = torch.arange(longer, device=device).unsqueeze(0)
        found.append(at_least_float(runner.step(tokens, torch.ones_like(tokens), positions, None)[0])[0])
    for parts, mask in _cases(vocabulary):
        past: Any = None
        seen = 0
        for part in parts:
            new = part.shape[1]
            seen += new
            so_far = mask[:, :seen].to(device)
            out, past = runner.step(part.to(device), so_far, position_ids_from_mask(so_far, new), past)
            found.append(at_least_float(out)[so_far[:, -new:].bool()])
    return found


def _cases(vocabulary: int) -> list[tuple[list[Tensor], Tensor]]:
    shapes = [(1, 0), (2, 0), (1, 2), (2, 2)]
    return [_script(batch, padding, vocabulary, seed) for seed, (batch, padding) in enumerate(shapes)]


def script_tokens(vocabulary: int, device: torch.device) -> Tensor:
    """The tokens that the forms are compared on, a sequence a row, (rows, 10) int64."""
    return torch.cat([torch.cat(tokens, dim=1) for tokens, _ in _cases(vocabulary)]).to(device)


def largest_difference(expected: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """The largest absolute difference of tensors in pairs; infinite where a NaN is."""
    errors = [(a - b).abs().max().item() for a, b in zip(expected, given, strict=True) if a.numel()]
    return max((error if error == error else float("inf") for error in errors), default=0.0)  # noqa: PLR0124 - NaN


def at_least_float(tensor: Tensor) -> Tensor:
    """Half precision as float32; float64 stays, or its own rounding to float32 would be compared."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reexported(graph_module: GraphModule, interface: Interface) -> GraphModule:
    """Export a flat graph again; shapes and metadata of the result are right by construction."""
    shapes = tuple(dict.fromkeys(interface.dynamic_axes[name], torch.export.Dim.AUTO) for name in interface.inputs)
    with torch.no_grad():
        exported = torch.export.export(
            graph_module, tuple(interface.example_inputs.values()), dynamic_shapes=shapes, strict=False
        )
    return exported.module(check_guards=False)
