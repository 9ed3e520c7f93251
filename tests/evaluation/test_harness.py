"""Log-likelihoods and greedy text for lm-eval's harness, against lm-eval's own model, in every form of a model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CalibrationError, CheckpointError, UsageError, VerificationError
from fxprune.evaluation.scoring import Scorer, context_length
from fxprune.runtimes.batching import BatchSize
from fxprune.runtimes.matmul import wide_products
from fxprune.runtimes.runners import EagerRunner, GraphRunner
from fxprune.tracing.trace import trace

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fxprune.evaluation.harness_model import RunnerLM

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

LINES = (
    "the compiler traces a model to a graph and finds which weights belong together",
    "heads and channels that matter least are removed, and what is left is smaller",
    "a small graph computes what the masked graph does",
    "numbers such as 1, 2 and 3 are words too. so is the end.",
    "what the compiler finds is a graph",
    "so is",
)
PAIRS = [
    *((line.rsplit(" ", 1)[0], " " + line.rsplit(" ", 1)[1]) for line in LINES),
    ("a question", " yes"),
    ("a question", " no, and a longer answer"),
    ("", "a text without a context"),
    ("<s>a context that begins", " as a sequence does"),
    ("spaces at the end of the context  ", "the words"),
    (LINES[0] * 3, " is longer than what the model sees"),
]


@pytest.fixture(scope="module")
def lively_llama() -> LlamaForCausalLM:
    """A random Llama whose greedy text depends on all of its prompt; with tied embeddings it would repeat a token."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, 0, ("t", index, 1)) for index, pair in enumerate(arguments)]


def ours(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, **options: Any) -> RunnerLM:
    return RunnerLM(EagerRunner(model), tokenizer, **options)


def theirs(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length)


# --- the model, against lm-eval's own ---------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
@pytest.mark.parametrize("max_length", [None, 24])
def test_loglikelihoods_are_those_of_lm_eval(
    lively_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    batch_size: BatchSize,
    max_length: int | None,
) -> None:
    requests = instances("loglikelihood", PAIRS)
    expected = theirs(lively_llama, tiny_tokenizer, max_length).loglikelihood(requests, disable_tqdm=True)
    model = ours(lively_llama, tiny_tokenizer, batch_size=batch_size, max_length=max_length)
    found = model.loglikelihood(requests)
    for (value, greedy), (other, other_greedy), pair in zip(found, expected, PAIRS, strict=True):
        assert value == pytest.approx(other, abs=1e-4), pair
        assert greedy == other_greedy
    assert len({round(value, 3) for value, _ in found}) > len(PAIRS) - 2  # they tell requests apart


def test_a_mixed_model_that_was_saved_and_loaded(mixed_dir: Path) -> None:
    """In lm-eval's own class, which opens the directory with transformers, and in ours."""
    loaded = load_model(mixed_dir)
    requests = instances("loglikelihood", PAIRS)
    opened = HFLM(pretrained=str(mixed_dir), batch_size=1, device="cpu", dtype="float32")
    expected = opened.loglikelihood(requests, disable_tqdm=True)
    assert loaded.tokenizer is not None
    found = RunnerLM(EagerRunner(loaded.model), loaded.tokenizer).loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_a_greedy_continuation_is_found_and_its_last_token(
    lively_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """A random model never is right by chance, so continuations are made from what it says."""
    context = tiny_tokenizer(LINES[0])["input_ids"]
    made = lively_llama.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, len(context) :].tolist()
    wrong = (made[0] + 1) % 90 + 4
    after = lively_llama(torch.tensor([[*context, wrong]])).logits[0, -1].argmax().item()
    scorer = Scorer(EagerRunner(lively_llama), max_length=128)
    right, late, early = scorer.score([(context, made), (context, [*made[:2], made[2] ^ 1]), (context, [wrong, after])])
    assert (right.greedy, right.last_greedy) == (True, True)
    assert (late.greedy, late.last_greedy) == (False, False)
    assert (early.greedy, early.last_greedy) == (False, True)


def test_rolling_loglikelihoods_are_those_of_lm_eval(
    lively_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    requests = instances("loglikelihood_rolling", [(line,) for line in LINES])
    for length in (128, 9):
        expected = theirs(lively_llama, tiny_tokenizer, length).loglikelihood_rolling(requests, disable_tqdm=True)
        model = ours(lively_llama, tiny_tokenizer, max_length=length, batch_size=4)
        assert model.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-4)


@pytest.mark.smoke
def test_greedy_text_is_that_of_lm_eval(
    lively_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    model = theirs(lively_llama, tiny_tokenizer)
    free = model.generate_until(instances("generate_until", [(line, options) for line in LINES]), disable_tqdm=True)
    stop = next(text[3:5] for text in free if len(text) > 6)  # something that the model says
    stopped = options | {"until": [stop]}
    requests = instances("generate_until", [(line, o) for o in (options, stopped) for line in LINES])
    expected = model.generate_until(requests, disable_tqdm=True)
    assert ours(lively_llama, tiny_tokenizer, batch_size=4).generate_until(requests) == expected
    assert expected[: len(LINES)] != expected[len(LINES) :]
    assert any(expected)


def test_a_long_prompt_loses_its_start(lively_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    requests = instances("generate_until", [(line, {"max_gen_toks": 12}) for line in LINES])
    expected = theirs(lively_llama, tiny_tokenizer, 20).generate_until(requests, disable_tqdm=True)
    assert ours(lively_llama, tiny_tokenizer, max_length=20).generate_until(requests) == expected
    assert expected != theirs(lively_llama, tiny_tokenizer).generate_until(requests, disable_tqdm=True)


def test_sampling_is_refused(lively_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = ours(lively_llama, tiny_tokenizer)
    for options in ({"do_sample": True, "temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(UsageError, match="other than greedy"):
            model.generate_until(instances("generate_until", [("a", options)]))
    with pytest.raises(UsageError, match="leave no room"):
        model.generate_until(instances("generate_until", [("a", {"max_gen_toks": 128})]))


# --- every form of a model ------------------------------------------------------------------------------------------


def test_a_traced_graph_scores_as_the_model(
    lively_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    program = trace(lively_llama)
    runner = GraphRunner(program.graph_module, program.interface)
    requests = instances("loglikelihood", PAIRS)
    expected = ours(lively_llama, tiny_tokenizer).loglikelihood(requests)
    found = RunnerLM(runner, tiny_tokenizer, batch_size=5, max_length=128).loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    texts = instances("generate_until", [(line, {"max_gen_toks": 6}) for line in LINES])
    assert RunnerLM(runner, tiny_tokenizer, batch_size=5, max_length=128).generate_until(texts) == ours(
        lively_llama, tiny_tokenizer
    ).generate_until(texts)


@pytest.mark.smoke
def test_an_onnx_graph_scores_as_the_model() -> None:
    from fxprune.exporters.ort import OrtRunner
    from tests.onnx_models import exported, llama

    _, export = exported("llama")
    pairs = [([5, 9, 11, 7], [3, 4]), ([8], [2]), ([1, 2, 3, 4, 5, 6], [7, 8, 9]), ([1, 2, 3, 4, 5, 6], [7, 8, 10])]
    expected = Scorer(EagerRunner(llama()), max_length=64).score(pairs)
    found = Scorer(OrtRunner(export.path, threads=1), max_length=64, batch_size=3).score(pairs)
    for one, other in zip(found, expected, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-4)
        assert (one.greedy, one.last_greedy) == (other.greedy, other.last_greedy)


def test_only_the_logits_that_are_needed_are_computed(tiny_llama: LlamaForCausalLM) -> None:
    rows: list[int] = []
    handle = tiny_llama.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[1]))
    try:
        scorer = Scorer(EagerRunner(tiny_llama), max_length=128, batch_size=2)
        scorer.score([(range(4, 40), [5, 6]), (range(4, 39), [7]), (range(50, 90), [3])])
    finally:
        handle.remove()
    # the token that tells the vocabulary; position 39 of the longest with 35 and 36 of the next; position 34
    assert rows == [1, 3, 1]


def test_like_inputs_run_once(tiny_llama: LlamaForCausalLM) -> None:
    sizes: list[int] = []
    handle = tiny_llama.lm_head.register_forward_hook(lambda *call: sizes.append(call[2].shape[0]))
    try:
        scorer = Scorer(EagerRunner(tiny_llama), max_length=128)
        scores = scorer.score([([4, 5, 6], [choice]) for choice in (7, 8, 9)] + [([4, 5], [6, 8])])
    finally:
        handle.remove()
    assert sizes == [1, 1]
    logits = tiny_llama(torch.tensor([[4, 5, 6]])).logits[0].log_softmax(-1)
    assert [score.loglikelihood for score in scores[:3]] == pytest.approx(logits[2, 7:10].tolist(), abs=1e-5)
    assert scores[3].loglikelihood == pytest.approx((logits[1, 6] + logits[2, 8]).item(), abs=1e-5)


def test_bfloat16_is_scored_in_float32(tiny_llama: LlamaForCausalLM) -> None:
    model = copy.deepcopy(tiny_llama).to(torch.bfloat16)
    scorer = Scorer(EagerRunner(model), max_length=128)
    assert scorer.dtype == "bfloat16"
    (score,) = scorer.score([([4, 5, 6], [7])])
    with torch.no_grad(), wide_products():
        logits = model(torch.tensor([[4, 5, 6]])).logits[0, -1]
    assert score.loglikelihood == pytest.approx(logits.float().log_softmax(-1)[7].item(), abs=1e-6)
    assert score.loglikelihood != logits.log_softmax(-1)[7].item()


def test_the_length_of_a_model(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    program = trace(tiny_llama)
    graph = GraphRunner(program.graph_module, program.interface)
    assert context_length(EagerRunner(tiny_llama), tiny_tokenizer) == 128
    assert context_length(graph, tiny_tokenizer) == 2048
    tiny_tokenizer.model_max_length, before = 77, tiny_tokenizer.model_max_length
    try:
        assert context_length(graph, tiny_tokenizer) == 77
    finally:
        tiny_tokenizer.model_max_length = before


def test_what_cannot_be_scored(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    scorer = Scorer(EagerRunner(tiny_llama), max_length=8)
    pairs: list[tuple[list[int], list[int]]] = [([], [4]), ([4], []), ([4], [*range(4, 20)])]
    for pair in pairs:
        with pytest.raises(CalibrationError, match="request 1: "):
            scorer.score([([4], [5]), pair])
    with pytest.raises(CalibrationError, match="the largest is 500"):
        scorer.score([([500], [4])])
    broken = copy.deepcopy(tiny_llama)
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(VerificationError, match="not finite"):
        Scorer(EagerRunner(broken), max_length=8).score([([4, 5], [6])])
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        ours(tiny_llama, endless)
