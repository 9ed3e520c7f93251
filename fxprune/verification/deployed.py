"""Deployed forms of a causal language model: what a file gives must be what the slim graph gives, logits and text.

slim ─┬─ reloaded checkpoint
├─ ONNX Runtime
└─ onnxruntime-genai (its text, and its tokenizer)
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import PreconditionError, VerificationError
from fxprune.core.precision import is_low
from fxprune.core.registry import resolve
from fxprune.runtimes.runners import EagerRunner
from fxprune.verification.ladder import Rung
from fxprune.verification.rounding import ROUNDINGS
from fxprune.verification.text import compare_greedy, same_text

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fxprune.runtimes.runners import Runner
    from fxprune.verification.language_model import LanguageModelLadder

__all__ = ["DeployedForms"]


@dataclass
class DeployedForms:
    """The rungs of deployed forms; what users must know is added to the warnings of the ladder of the graph forms."""

    ladder: LanguageModelLadder

    def climb(self, *, checkpoint: Path | str | None, onnx: Path | str | None, genai: Path | str | None) -> list[Rung]:
        """The rungs of the forms that there are; options as those of `fxprune.passes.verify.Verify`.

        Raises:
            VerificationError: one does not hold.
        """
        rungs: list[Rung] = []
        if checkpoint is not None:
            load: Any = resolve("fxprune.checkpoints.checkpoint:load")
            model = load(checkpoint, device=str(self.ladder.device))
            rungs += self._deployed(
                "reloaded checkpoint",
                self.ladder.eager(model, "reloaded"),
                EagerRunner(model, "reloaded, with its cache"),
            )
            del model
            gc.collect()
        if onnx is not None:
            runner: Any = resolve("fxprune.exporters.ort:OrtRunner")
            rungs += self._deployed("ONNX Runtime", runner(onnx, name="onnxruntime"))
        if genai is not None:
            rungs += self._text_maker(resolve("fxprune.exporters.genai:GenaiRunner")(genai))
        return rungs

    def _deployed(self, name: str, runner: Runner, writer: Runner | None = None) -> list[Rung]:
        """Rungs of a deployed form: its logits, and the text that it (or `writer`, the same form) makes."""
        prompt = torch.arange(5, 13, device=self.ladder.device).unsqueeze(0) % self.ladder.vocabulary
        rungs = [self.ladder.rung(f"{name} = slim", self.ladder.slim, runner, (self.ladder.current,))]
        title = f"greedy text of {name} = slim"
        tokens = (
            12 if self.ladder.program.interface.fixed_length is None else self.ladder.program.interface.fixed_length - 8
        )
        if tokens < 1:
            return [
                *rungs,
                Rung(title, 0.0, 0.0, passed=True, cases=0, detail="not climbed: the graph is for fewer tokens"),
            ]
        why_not = self._unlike_itself(prompt, tokens) if writer is not None else ""
        if why_not:
            return [*rungs, Rung(title, 0.0, 0.0, passed=True, cases=0, detail=f"not climbed: {why_not}")]
        found = compare_greedy(title, self.ladder.slim, writer or runner, prompt, min(tokens, 12), tie=self._tie())
        return [*rungs, found.require()]

    def _unlike_itself(self, prompt: Tensor, tokens: int) -> str:
        """Why the original model's own cache is nothing to hold a checkpoint to; empty if it is."""
        if self.ladder.program.interface.cache and not self.ladder.forgetful:
            return ""
        original = self.ladder.program.references["eager"].module
        runners = EagerRunner(original, "without its cache", cache=False), EagerRunner(original, "with its cache")
        try:
            same = compare_greedy("text", *runners, prompt, min(tokens, 12), tie=self._tie())
        except PreconditionError as error:
            return f"the original model does not run with its cache ({error})"
        return "" if same.passed else "the original model itself writes another text with its cache than without"

    def _tie(self) -> float:
        """In half precision, two forms may each be off by what rounding does; in single precision nothing is a tie."""
        if not is_low(self.ladder.dtype):
            return 0.0
        return 2 * ROUNDINGS * self.ladder.own_rounding(self.ladder.current, torch.float32)

    def _text_maker(self, genai: Any) -> list[Rung]:
        """Rungs of onnxruntime-genai: its text after two prompts, and the tokens of its tokenizer."""
        rungs = []
        for length in (8, 1):
            prompt = torch.arange(5, 5 + length, device=self.ladder.device).unsqueeze(0) % self.ladder.vocabulary
            name = f"greedy text of onnxruntime-genai = slim, after {length} token{'s' if length > 1 else ''}"
            rungs.append(same_text(name, self.ladder.slim, genai, prompt, tie=self._tie()).require())
        source = self.ladder.program.source
        if source is not None and source.tokenizer is not None:
            rungs += self._tokenizer_rungs(genai, source.tokenizer)
        return rungs

    def _tokenizer_rungs(self, genai: Any, tokenizer: Any) -> list[Rung]:
        """Whether the runtime's tokenizer reads and writes as the model's; what users must know is in `warnings`."""
        found = resolve("fxprune.exporters.genai_tokenizer:compare_tokenizers")(genai, tokenizer)
        self.ladder.warnings += found.warnings
        rungs = []
        for name, verb, differ, cases, detail in (
            ("tokens of onnxruntime-genai = tokenizer's", "tokenise", found.texts, found.encoded, found.warnings),
            ("text of onnxruntime-genai's tokens = tokenizer's", "decode", found.tokens, found.decoded, ()),
        ):
            rungs.append(Rung(name, len(differ), 0.0, not differ, cases, detail="; ".join(detail)))
            if differ:
                said = "; ".join(f"{what}: {how}" for what, how in list(differ.items())[:1])
                raise VerificationError(
                    f"onnxruntime-genai does not {verb} like the model's tokenizer: {said}. Its text would be "
                    f"another's: use --to onnx, and {verb} with transformers"
                )
        return rungs
