"""Perplexity: the figure agrees with its definition, on any form of a model, and bad input is refused."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CalibrationError, UsageError, VerificationError
from fxprune.evaluation.perplexity import file_perplexity, hash_tokens, paragraphs, perplexity, read_text, tokenise
from fxprune.flows.benchmarking import Workload, run_bench
from fxprune.flows.comparison import run_comparison
from fxprune.flows.evaluation import Evaluation, run_evaluation
from fxprune.measure.forms import OpenForm, open_form
from fxprune.measure.opening import check_precision
from fxprune.runtimes.runners import EagerRunner, GraphRunner, Past
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


class TableRunner:
    """A bigram model: the logits are rows of a table, and there is no cache."""

    name = "table"

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.batches: list[tuple[int, ...]] = []

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Past | None,
    ) -> tuple[Tensor, Past]:
        assert past is None
        assert attention_mask.tolist() == torch.ones_like(input_ids).tolist()
        assert position_ids.tolist() == [list(range(input_ids.shape[1]))] * input_ids.shape[0]
        self.batches.append(tuple(input_ids.shape))
        return self.table[input_ids], []


def random_tokens(count: int) -> Tensor:
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.smoke
def test_a_bigram_table_worked_out_by_hand() -> None:
    # P(0|0) = 3/4, P(1|0) = 1/4, P(0|1) = P(1|1) = 1/2.
    runner = TableRunner(torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log())
    tokens = torch.tensor([0, 0, 1, 1, 0, 0, 1])  # windows 0 0 1 and 1 0 0; the last token is left over
    result = perplexity(runner, tokens, text="hand", window=3)
    first, second = -math.log(3 / 4 * 1 / 4) / 2, -math.log(1 / 2 * 3 / 4) / 2
    assert result.nll == pytest.approx((first + second) / 2, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp((first + second) / 2), rel=1e-6)
    # For two values the standard error of the mean is half their distance.
    assert result.standard_error == pytest.approx(abs(first - second) / 2, rel=1e-5)
    assert (result.windows, result.tokens, result.window, result.text) == (2, 4, 3, "hand")
    assert result.tokens_sha256 == hash_tokens(tokens[:6].reshape(2, 3))


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    result = perplexity(TableRunner(torch.zeros(50, 50)), random_tokens(64) % 50, text="uniform", window=8)
    assert result.perplexity == pytest.approx(50, rel=1e-5)
    assert result.standard_error == pytest.approx(0, abs=1e-6)


def test_eager_agrees_with_the_models_own_loss_for_any_batch_size(tiny_llama: LlamaForCausalLM) -> None:
    tokens = random_tokens(5 * 16 + 3)
    with torch.no_grad():
        losses = [tiny_llama(row[None], labels=row[None]).loss.item() for row in tokens[:80].reshape(5, 16)]
    expected = sum(losses) / 5
    for batch_size in (1, 2, 5, 64):
        result = perplexity(EagerRunner(tiny_llama), tokens, text="t", window=16, batch_size=batch_size)
        assert result.nll == pytest.approx(expected, rel=1e-5)
        assert result.standard_error == pytest.approx(torch.tensor(losses).std().item() / math.sqrt(5), rel=1e-3)
    assert result.dtype == "float32"
    assert result.runner == "eager"


def test_a_traced_graph_agrees_with_eager(tiny_llama: LlamaForCausalLM) -> None:
    program = trace(tiny_llama)
    runner = GraphRunner(program.graph_module, program.interface)
    for batch_size in (1, 3):
        ours, theirs = (
            perplexity(form, random_tokens(80), text="t", window=16, batch_size=batch_size)
            for form in (runner, EagerRunner(tiny_llama))
        )
        assert ours.nll == pytest.approx(theirs.nll, abs=1e-6)
        assert ours.tokens_sha256 == theirs.tokens_sha256
        assert ours.runner == "graph"


def test_batches_and_max_windows() -> None:
    runner = TableRunner(torch.zeros(97, 97))
    result = perplexity(runner, random_tokens(100), text="t", window=10, max_windows=7, batch_size=3)
    assert runner.batches == [(3, 10), (3, 10), (1, 10)]
    assert (result.windows, result.tokens) == (7, 63)
    assert "windows of 10 without overlap, the first 7 windows" in result.definition
    assert "mean over the 9 next-token predictions" in result.definition


def test_one_window_has_no_standard_error() -> None:
    result = perplexity(TableRunner(torch.zeros(97, 97)), random_tokens(10), text="t", window=10)
    assert result.standard_error is None
    assert "standard_error" not in result.as_dict()
    assert json.loads(json.dumps(result.as_dict()))["windows"] == 1


def test_low_precision_logits_are_summed_in_float32() -> None:
    table = torch.randn(97, 97, generator=torch.Generator().manual_seed(0)).bfloat16()
    low = perplexity(TableRunner(table), random_tokens(64), text="t", window=16)
    high = perplexity(TableRunner(table.float()), random_tokens(64), text="t", window=16)
    assert low.dtype == "bfloat16"
    assert low.nll == high.nll


def test_tokens_outside_the_vocabulary(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(CalibrationError, match="the largest is 97"):
        perplexity(EagerRunner(tiny_llama), torch.full((8,), 97), text="t", window=8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits(value: float) -> None:
    with pytest.raises(VerificationError, match="table, windows from 0 of t"):
        perplexity(TableRunner(torch.full((97, 97), value)), random_tokens(10), text="t", window=5)


def test_options_out_of_range_and_too_little_text() -> None:
    runner = TableRunner(torch.zeros(97, 97))
    for window, batch_size, max_windows in ((1, 1, 1), (2, 0, 1), (2, 1, 0)):
        with pytest.raises(UsageError):
            perplexity(
                runner, random_tokens(10), text="t", window=window, batch_size=batch_size, max_windows=max_windows
            )
    with pytest.raises(CalibrationError, match="9 tokens and one window needs 10"):
        perplexity(runner, random_tokens(9), text="t", window=10)
    assert runner.batches == []


def test_read_text(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes("\ufeffü\r\nb\n".encode())
    assert read_text(file) == "ü\r\nb\n"
    file.write_bytes(b"good \xff bad")
    with pytest.raises(CalibrationError, match="byte 0xff at offset 5"):
        read_text(file)
    file.write_text(" \n\n")
    with pytest.raises(CalibrationError, match="holds no text"):
        read_text(file)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CalibrationError, match="cannot read"):
            read_text(path)


def test_paragraphs() -> None:
    assert paragraphs(" \n = Title = \n \nA row . \n") == "\n\n = Title = \n\n\n\nA row . \n\n"


def test_file_perplexity_is_that_of_its_tokens(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "some.txt"
    file.write_text("a small graph computes \n \n what the masked graph does " * 4)
    runner = EagerRunner(tiny_llama)
    results = {}
    for joining, text in (("file", file.read_text()), ("paragraphs", paragraphs(file.read_text()))):
        results[joining] = file_perplexity(runner, file, tiny_tokenizer, joining=joining, window=8)  # type: ignore[arg-type]
        tokens = tokenise(text, tiny_tokenizer)
        assert tiny_tokenizer.bos_token_id not in tokens
        assert results[joining].nll == perplexity(runner, tokens, text="t", window=8).nll
        assert results[joining].text == "some.txt"
    assert results["file"].tokens_sha256 != results["paragraphs"].tokens_sha256
    assert results["file"].definition != results["paragraphs"].definition
    with pytest.raises(UsageError, match="joining"):
        file_perplexity(runner, file, tiny_tokenizer, joining="none")  # type: ignore[arg-type]


@pytest.mark.real_model
def test_the_known_figure_on_wikitext(real_model_dir: Path, shared_data: Path) -> None:
    loaded = load_model(real_model_dir)
    assert loaded.tokenizer is not None
    text = shared_data / "wikitext-2-raw" / "wiki.test.raw"
    result = file_perplexity(EagerRunner(loaded.model), text, loaded.tokenizer, max_windows=20)
    # 35.2 is what an independent loop over the model's own loss gives for this definition.
    assert result.perplexity == pytest.approx(35.21, abs=0.02)


def test_evaluation_runs_on_the_device_that_the_user_named(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def opened(where: str, *, dtype: str | None, device: str) -> OpenForm:
        asked.append(device)
        return open_form(where, dtype=dtype)

    def measured(*_: object, device: str, **__: object) -> None:
        asked.append(device)
        raise CalibrationError("enough")

    monkeypatch.setattr("fxprune.flows.evaluation.open_form", opened)
    monkeypatch.setattr("fxprune.flows.evaluation.file_perplexity", measured)
    (tmp_path / "text.txt").write_text("a text")
    what = Evaluation(ppl=[tmp_path / "text.txt"], device="meta", batch_size=1)
    with pytest.raises(CalibrationError, match="enough"):
        run_evaluation(str(tiny_llama_dir), what, Console(quiet=True), lambda _: None)
    assert asked == ["meta", "meta"]


def test_a_device_that_cannot_be_used_is_a_usage_error(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert next(open_form(str(tiny_llama_dir), device="meta").runner.model.parameters()).is_meta  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="device nowhere cannot be used here"):
        run_evaluation(str(tiny_llama_dir), Evaluation(tasks=["x"], device="nowhere"), Console(quiet=True), print)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UsageError, match="is an ONNX graph, which runs on the CPU here, not on meta"):
        open_form(str(tmp_path), device="meta")


def test_a_precision_that_no_form_is_loaded_in_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    text = tmp_path / "text.txt"
    text.write_text("words")
    graph, told = str(tmp_path), "has its precision in the file, so --dtype bfloat16"
    what = Evaluation(ppl=[text], dtype="bfloat16")
    with pytest.raises(UsageError, match=told):
        run_evaluation(graph, what, Console(quiet=True), print)
    with pytest.raises(UsageError, match=told):
        run_comparison([graph, str(tmp_path / "model.onnx")], what, print)
    with pytest.raises(UsageError, match=told):
        run_bench([graph, graph], Workload(dtype="bfloat16"), Console(quiet=True), print)
    check_precision([graph, str(tiny_llama_dir)], "bfloat16")  # the checkpoint is loaded in it
