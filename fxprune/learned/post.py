"""Post fine-tuning: LoRA alone, masks as they were decided, on instructions or on the calibration text.

{"instruction": ..., "input": ..., "output": ...}  ─ prompt and answer ─ windows of tokens ─ LoRA
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxprune.calibration.distillation import token_kl
from fxprune.calibration.loss_scale import backward
from fxprune.core.errors import CalibrationError, NotFiniteError
from fxprune.core.schedule import cosine
from fxprune.evaluation.perplexity import read_text
from fxprune.learned.log import TrainingLog
from fxprune.learned.teachers import worn
from fxprune.learned.training import batch_of, next_token_loss
from fxprune.models.loading import expand_user

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fxprune.learned.model import GatedModel
    from fxprune.learned.options import PostLoss
    from fxprune.learned.teachers import Snapshot

__all__ = ["Instructions", "fine_tune", "read_instructions"]

_ANSWERS = ("output", "response", "completion", "answer")
_QUESTIONS = ("instruction", "prompt", "question")
_CONTEXTS = ("input", "context")
_MOST = 100_000
"""Records of a hub data set that are read at most."""


@dataclass(frozen=True)
class Instructions:
    """Text in windows.

    Attributes:
        tokens: (windows, length) int64.
        answers: (windows, length) bool: tokens of answers, which are to be predicted; some behind the first of each.
        records: how many there were.
    """

    tokens: Tensor
    answers: Tensor
    records: int


def read_instructions(source: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Instructions:
    """Read an instruction set; records are shuffled, joined, and cut into windows, of which those without answers go.

    Args:
        source: a `.json` file with a list of records, a `.jsonl` file with one a line, or the hub id of a data set.
            A record has `instruction`, `input` (may be empty or absent) and `output` (other usual names are known).
        tokenizer: its chat template is used where it has one.
        length: of a window.
        seed: of the order.

    Raises:
        CalibrationError: it cannot be read, a record lacks a field, or there is not one window with an answer.
    """
    records = list(_records(source))
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens: list[int] = []
    answers: list[bool] = []
    for index in order:
        prompt, answer = _pair(records[index], f"{source}, record {index + 1}")
        asked, said = _tokens(tokenizer, prompt, answer)
        tokens += asked + said
        answers += [False] * len(asked) + [True] * len(said)
    windows = len(tokens) // length
    if not windows:
        raise CalibrationError(f"{source}: {len(tokens)} tokens do not fill one window of {length}")
    shape = (windows, length)
    cut = windows * length
    text, marked = torch.tensor(tokens[:cut]).reshape(shape), torch.tensor(answers[:cut]).reshape(shape)
    useful = marked[:, 1:].any(1)  # a long prompt fills windows in which there is nothing to predict
    if not bool(useful.any()):
        raise CalibrationError(f"{source}: no window of {length} tokens has an answer; use a larger seq_len")
    return Instructions(text[useful], marked[useful], len(records))


def _records(source: str) -> Iterable[Mapping[str, Any]]:
    path = expand_user(source)
    if not path.is_file():
        if Path(source).suffix.lower() in {".json", ".jsonl"}:
            raise CalibrationError(f"instruction set {source} does not exist")
        return _data_set(source)
    text = read_text(path)
    try:
        if path.suffix.lower() == ".jsonl":
            found: Any = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            found = json.loads(text)
    except ValueError as error:
        raise CalibrationError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, list) or not found:
        raise CalibrationError(f"{path}: expected a list of records with instruction, input and output")
    return found


def _data_set(name: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise CalibrationError(
            f'instruction set {name}: there is no such file, and data sets need pip install "fxprune[datasets]"'
        ) from error
    failures = (OSError, ValueError, RuntimeError, KeyError, TypeError, datasets.exceptions.DatasetsError)
    try:
        return list(datasets.load_dataset(name, split="train", streaming=True).take(_MOST))
    except failures as error:
        raise CalibrationError(f"instruction set {name!r} cannot be read: {error}") from error


def _pair(record: Any, where: str) -> tuple[str, str]:
    def text(names: tuple[str, ...]) -> str | None:
        found = (record.get(name) for name in names) if isinstance(record, dict) else ()
        return next((value for value in found if isinstance(value, str)), None)

    question, answer = text(_QUESTIONS), text(_ANSWERS)
    if question is None or answer is None:
        raise CalibrationError(f"{where}: no text in {'instruction' if question is None else 'output'}")
    context = text(_CONTEXTS)
    return (f"{question}\n\n{context}" if context else question), answer


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Prompt and answer as a chat where the tokenizer has a template, with the headings of Alpaca otherwise."""
    if getattr(tokenizer, "chat_template", None):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    else:
        asked = f"### Instruction:\n{prompt}\n\n### Response:\n"
    end = tokenizer.eos_token or ""
    first, second = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (asked, answer + end))
    return list(first), list(second)


def fine_tune(
    model: GatedModel,
    values: Mapping[str, Tensor],
    tokens: Tensor,
    answers: Tensor | None,
    intact: Snapshot,
    *,
    steps: int,
    batch: int,
    lr: float,
    loss: PostLoss,
    seed: int,
) -> list[dict[str, Any]]:
    """Train the adapters with fixed gates.

    Args:
        model: it is changed.
        values: of the gates.
        tokens: (windows, length) int64 on the model's device.
        answers: (windows, length) bool, what is to be predicted; None for every token.
        intact: the teacher of `distil`.
        steps: how many.
        batch: windows a step.
        lr: learning rate at its highest.
        loss: `lm` predicts the next tokens of the answers, `distil` what the intact model says there.
        seed: of the order.

    Returns:
        The log, a row a step.

    Raises:
        TrainingError: the loss is not finite.
    """
    adapters = list(model.adapters.values())
    optimizer = torch.optim.AdamW(adapters, lr=lr, weight_decay=0.0)
    index = torch.arange(len(tokens), device=tokens.device)
    with TrainingLog(None, steps, what="fine-tuning") as log, model.frozen(), model.gates.applied(values):
        for step in range(steps):
            chosen = batch_of(index, step, min(batch, len(tokens)), seed)
            part = tokens[chosen]
            mask = None if answers is None else answers[chosen]
            wanted = None
            if loss == "distil":
                with torch.no_grad(), worn(intact, model.adapters) as before:
                    on = {name: value.to(model.device) for name, value in before.items()}
                    with model.gates.applied(on):
                        wanted, _ = model(part)
            with model.as_refit():
                logits, _ = model(part)
                if wanted is None:
                    found = next_token_loss(logits, part, mask)
                else:
                    # What predicts an answer's token stands one place before it.
                    ahead = None if mask is None else torch.cat([mask[:, 1:], mask[:, :1] & False], 1)
                    found = token_kl(logits, wanted, ahead)
                optimizer.zero_grad()
                finite = backward(found, adapters, model.dtype, part.numel())
            if not (finite and math.isfinite(float(found.detach()))):
                raise NotFiniteError(
                    f"fine-tuning diverged in step {step}: the loss or its gradient is not finite; lower post_lr, or "
                    "load the model in bfloat16 or float32",
                    part,
                )
            norm = float(torch.nn.utils.clip_grad_norm_(adapters, 1.0))
            optimizer.param_groups[0]["lr"] = lr * cosine(step, steps)
            optimizer.step()
            log.add(step, {"loss": float(found.detach()), "gradient_norm": norm})
    return log.rows
