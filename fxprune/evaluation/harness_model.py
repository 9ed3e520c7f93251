"""Any runner as a model of lm-eval's harness (https://github.com/EleutherAI/lm-evaluation-harness).

`RunnerLM` answers the harness's three kinds of requests: log-likelihood of a continuation, of a whole text, and greedy
text. It needs the package `lm-eval`; `fxprune.evaluation.harness` imports this module only when tasks are run.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fxprune.core.errors import CheckpointError, UsageError
from fxprune.core.progress import track
from fxprune.evaluation.scoring import Scorer, context_length
from fxprune.runtimes.batching import BatchSize, run_batches
from fxprune.runtimes.runners import position_ids_from_mask

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fxprune.evaluation.scoring import Score
    from fxprune.runtimes.runners import Runner

__all__ = ["RunnerLM"]

_NEW_TOKENS = 256  # where a task names no number, as lm-eval's own models


class RunnerLM(TemplateLM):  # type: ignore[misc] # lm-eval has no type information
    """A runner and its tokenizer, as lm-eval sees a model; it can be given to `lm_eval.simple_evaluate`, too.

    Tokenisation and the split into context and continuation are lm-eval's own, so its `hf` model on the same checkpoint
    gives the same figures, but for this: log-softmax is in float32 whatever the model's precision.

    Attributes:
        tokenizer: the model's own.
        scorer: what scores continuations.
        last_token: for each request scored last, by task, document and number in the document: whether the last token
            of the continuation is the most likely one after all that is before it.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: BatchSize = "auto",
        max_length: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Wrap a runner.

        Args:
            runner: any form of the model.
            tokenizer: the model's own.
            batch_size: sequences at once, see `fxprune.runtimes.batching.run_batches`.
            max_length: the most tokens of a sequence; the model's own limit when None.
            device: where the runner wants its inputs.

        Raises:
            CheckpointError: the tokenizer has no end-of-sequence token.
        """
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise CheckpointError(f"{runner.name}: the tokenizer has no end-of-sequence token, which tasks need")
        length = max_length or context_length(runner, tokenizer)
        self._device = torch.device(device)
        self.tokenizer = tokenizer
        self.scorer = Scorer(runner, max_length=length, batch_size=batch_size, device=device)
        self.last_token: dict[tuple[str | None, int | None, int], bool] = {}
        self._scores: list[Score] = []

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the beginning-of-sequence token, else the end of one."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        """The most tokens of a sequence."""
        return self.scorer.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise; special tokens are the tokenizer's choice unless the text begins with one already."""
        del kwargs
        if add_special_tokens is None:
            begins = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            chosen = {"add_special_tokens": False} if begins else {}
        else:
            chosen = {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **chosen)["input_ids"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score a continuation after a context, for each request; `last_token` is filled on the way."""
        del disable_tqdm  # our own bar shows on terminals only
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        self.last_token = {
            (request.task_name, request.doc_id, request.idx): score.last_greedy
            for request, score in zip(requests, self._scores, strict=True)
        }
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        self._scores = self.scorer.score([request[1:] for request in requests], what="continuations")
        return [(score.loglikelihood, score.greedy) for score in self._scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, in windows of `max_length` where they are longer; each token counts once."""
        del disable_tqdm
        pairs, owners = [], []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, score in zip(owners, self.scorer.score(pairs, what="windows of texts"), strict=True):
            totals[index] += score.loglikelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy text until a stop sequence.

        Raises:
            UsageError: a request asks for sampling, or its text has no room in the model.
        """
        del disable_tqdm
        made: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        with track("texts", total=len(requests)) as progress:
            for options, indices in alike.items():
                texts = self._generate([requests[index].args[0] for index in indices], json.loads(options))
                made |= dict(zip(indices, texts, strict=True))
                progress(len(made))
        return [made[index] for index in range(len(requests))]

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        """Continue contexts that share their options."""
        chosen = dict(normalize_gen_kwargs(options, _NEW_TOKENS))
        if chosen.get("do_sample") or chosen.get("num_beams", 1) != 1:
            raise UsageError(f"generation options {options} ask for other than greedy text, which is all there is")
        new_tokens = int(chosen["max_gen_toks"])
        room = self.max_length - new_tokens
        if room < 1:
            raise UsageError(f"{new_tokens} new tokens leave no room for a prompt in {self.max_length} tokens")
        stops = handle_stop_sequences(chosen["until"], eos=self.tokenizer.decode(self.eot_token_id))
        tokens = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]

        def work(batch: list[list[int]]) -> list[str]:
            return self._greedy(batch, new_tokens, stops)

        return run_batches(
            tokens,
            work,
            length=len,
            vocabulary=self.scorer.vocabulary,
            batch_size=self.scorer.batch_size,
            device=self._device,
        )

    def _greedy(self, batch: list[list[int]], new_tokens: int, stops: list[str]) -> list[str]:
        """Continue prompts on the cache, padded on the left, until each has met a stop."""
        longest = max(len(tokens) for tokens in batch)
        ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens in batch], device=self._device)
        mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in batch]).to(ids)
        made: list[list[int]] = [[] for _ in batch]
        open_rows = set(range(len(batch)))
        past: list[Tensor] | None = None
        for _ in range(new_tokens):
            positions = position_ids_from_mask(mask, ids.shape[1]).contiguous()
            logits, past = self.scorer.runner.step(ids, mask, positions, past)
            ids = logits[:, -1].argmax(-1, keepdim=True).to(mask)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            for row in sorted(open_rows):
                made[row].append(int(ids[row]))
                text = self.tokenizer.decode(made[row])
                if any(stop and stop in text for stop in stops):  # the end-of-sequence token is one of them
                    open_rows.discard(row)
            if not open_rows:
                break
        return [
            postprocess_generated_text(self.tokenizer.decode(tokens, skip_special_tokens=True), stops, None)
            for tokens in made
        ]
