"""Tasks of lm-eval's harness: their data, their figures and errors of them, and the command that runs them."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CalibrationError, UsageError
from fxprune.evaluation.harness import TaskResult, evaluate_tasks, standard_error
from fxprune.evaluation.harness_tasks import TASK_FILES, load_tasks
from fxprune.runtimes.runners import EagerRunner
from tests.commands import run_command

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

SENTENCES = (
    "the compiler traces a model to a graph",
    "heads and channels that matter least are removed",
    "a small graph computes what the masked graph does",
    "what is left is smaller",
    "numbers such as one and two are words",
)
QUESTIONS = [
    {
        "id": str(index),
        "question": f"what does the {subject} do?",
        "choices": {"text": ["it is", "a graph", "what the compiler finds"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[index % 3],
    }
    for index, subject in enumerate(("compiler", "graph", "model", "channel"))
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a few rows for three tasks; what `datasets` keeps of them stays out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    folder = tmp_path / "data"
    write_lines(folder / TASK_FILES["lambada_openai"]["test"], [{"text": text} for text in SENTENCES])
    write_lines(folder / TASK_FILES["arc_easy"]["test"], QUESTIONS)
    write_lines(folder / TASK_FILES["wikitext"]["test"], [{"page": text} for text in SENTENCES])
    return folder


def run(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, names: list[Any], data: Path, **options: Any
) -> list[TaskResult]:
    return evaluate_tasks(EagerRunner(model), tokenizer, names, data, **options)


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_figures_are_those_of_lm_eval_with_its_own_model(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, data: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ready = load_tasks(["lambada_openai", "arc_easy", "wikitext"], data)
    model = HFLM(pretrained=tiny_llama, tokenizer=tiny_tokenizer, batch_size=1)
    expected = simple_evaluate(
        model=model,
        tasks=[one.task for one in ready],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert expected is not None
    compared = 0
    for result in run(tiny_llama, tiny_tokenizer, ready, data, batch_size=2):
        figures = expected["results"][result.task]
        for metric in result.metrics:
            name = {"last_word_accuracy": "acc"}.get(metric.name, metric.name)
            if metric.name != "last_token_accuracy":
                assert metric.value == pytest.approx(figures[f"{name},none"], rel=1e-4), metric.name
                compared += 1
        assert result.version == str(expected["versions"][result.task])
    assert compared == 2 + 2 + 3


def test_last_word_and_last_token_are_two_figures(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, data: Path
) -> None:
    """Documents whose last words the model says whole, says the end of, or misses."""
    (plain,) = run(tiny_llama, tiny_tokenizer, ["lambada_openai"], data)
    assert plain["last_word_accuracy"].value == 0  # a random model is never right about these
    texts = [*SENTENCES, *_said(tiny_llama, tiny_tokenizer)]
    write_lines(data / TASK_FILES["lambada_openai"]["test"], [{"text": text} for text in texts])
    (result,) = run(tiny_llama, tiny_tokenizer, ["lambada_openai"], data, batch_size=3)
    words, tokens, losses = zip(*(_by_hand(tiny_llama, tiny_tokenizer, text) for text in texts), strict=True)
    assert result["last_word_accuracy"].value == pytest.approx(statistics.fmean(words))
    assert result["last_token_accuracy"].value == pytest.approx(statistics.fmean(tokens))
    assert 0 < statistics.fmean(words) < statistics.fmean(tokens) < 1
    assert result["perplexity"].value == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-4)
    for name, hits in (("last_word_accuracy", words), ("last_token_accuracy", tokens)):
        expected = statistics.stdev(map(float, hits)) / math.sqrt(len(hits))
        assert result[name].standard_error == pytest.approx(expected)
    assert result["perplexity"].standard_error
    assert [metric.higher_is_better for metric in result.metrics] == [False, True, True]


def _by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[bool, bool, float]:
    """Last word right, last token right, and the last word's loss, one document at a time."""
    context, word = text.rsplit(" ", 1)
    tokens = tokenizer(f"{context} {word}")["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    logits = model(torch.tensor([tokens])).logits[0, start - 1 : -1].log_softmax(-1)
    target = torch.tensor(tokens[start:])
    hits = logits.argmax(-1) == target
    return bool(hits.all()), bool(hits[-1]), -logits.gather(1, target[:, None]).sum().item()


def _said(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that end as the model would: by a whole word, and by no more than the last token of one.

    With tied embeddings a random model likes to repeat the token before.
    """
    found: dict[tuple[bool, bool], str] = {}
    for sentence in SENTENCES:
        for word in (sentence.rsplit(" ", 1)[1], *(f"is{letter * 3}" for letter in "abcdefghilmnoprstuwy")):
            whole, last, _ = _by_hand(model, tokenizer, f"{sentence} {word}")
            if last:
                found.setdefault((whole, last), f"{sentence} {word}")
            if len(found) == 2:
                return list(found.values())
    raise AssertionError(f"no such texts: {found}")


def test_the_standard_error_of_a_perplexity_is_that_of_first_order() -> None:
    """exp(-mean) of many items: the perplexity times the standard error of the mean; resampling knows it to 3%."""
    from lm_eval.api.metrics import mean, perplexity

    items = (-2 + 0.7 * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).tolist()
    error = statistics.stdev(items) / math.sqrt(len(items))
    assert standard_error(items, perplexity) == pytest.approx(perplexity(items) * error, rel=0.1)
    assert standard_error(items, mean) == standard_error(items, None) == pytest.approx(error, rel=1e-12)


def test_a_result_says_what_repeats_it(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, data: Path
) -> None:
    import hashlib
    from importlib.metadata import version

    (result,) = run(tiny_llama, tiny_tokenizer, ["lambada_openai"], data, limit=3, max_length=64)
    assert (result.documents, result.available, result.limit, result.max_length) == (3, 5, 3, 64)
    assert (result.dtype, result.num_fewshot, result.dataset) == ("float32", 0, "json")
    assert result.lm_eval_version == version("lm_eval")
    file = data / TASK_FILES["lambada_openai"]["test"]
    assert [(f.split, f.path, f.sha256) for f in result.files] == [
        ("test", str(file), hashlib.sha256(file.read_bytes()).hexdigest())
    ]
    (whole,) = run(tiny_llama, tiny_tokenizer, ["lambada_openai"], data)
    (again,) = run(tiny_llama, tiny_tokenizer, ["lambada_openai"], data, limit=3, max_length=64)
    assert whole.documents_sha256 != result.documents_sha256 == again.documents_sha256
    assert again.metrics == result.metrics
    assert json.loads(json.dumps(result.as_dict()))["metrics"][0]["name"] == "perplexity"


def test_a_single_document_has_no_standard_error(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, data: Path
) -> None:
    (result,) = run(tiny_llama, tiny_tokenizer, ["lambada_openai"], data, limit=1)
    assert {metric.standard_error for metric in result.metrics} == {None}
    with pytest.raises(KeyError):
        result["acc"]


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_table_beside_the_data_overrides_and_extends(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, data: Path
) -> None:
    write_lines(data / "mine.jsonl", [{"text": text} for text in SENTENCES[:2]])
    write_lines(data / "cut.jsonl", QUESTIONS[:3])
    table = {"lambada_openai": {"test": "mine.jsonl"}, "arc_challenge": {"test": "cut.jsonl"}}
    (data / "tasks.yaml").write_text(yaml.safe_dump(table))
    results = run(tiny_llama, tiny_tokenizer, ["lambada_openai", "arc_challenge", "arc_easy"], data)
    assert [(result.task, result.documents) for result in results] == [
        ("lambada_openai", 2),
        ("arc_challenge", 3),
        ("arc_easy", 4),
    ]


@pytest.mark.parametrize("table", ["[lambada_openai]", "lambada_openai: mine.jsonl", "lambada_openai: {test: 3}", "{"])
def test_a_damaged_table_is_told(data: Path, table: str) -> None:
    (data / "tasks.yaml").write_text(table)
    with pytest.raises(CalibrationError, match=r"tasks\.yaml"):
        load_tasks(["lambada_openai"], data)


def test_data_that_is_missing_or_wrong(data: Path) -> None:
    with pytest.raises(CalibrationError, match=r"winogrande.*missing: .*validation\.jsonl"):
        load_tasks(["winogrande"], data)
    with pytest.raises(CalibrationError, match="is not a directory"):
        load_tasks(["lambada_openai"], data / "lambada" / "lambada_test.jsonl")
    with pytest.raises(CalibrationError, match=r"no files for task 'hellaswag'.*tasks\.yaml can name them"):
        load_tasks(["hellaswag"], data)
    (data / "tasks.yaml").write_text("arc_easy: {validation: zero_shot/arc/ARC-Easy/test.jsonl}")
    with pytest.raises(CalibrationError, match="needs its split 'test', but its files are for validation"):
        load_tasks(["arc_easy"], data)
    write_lines(data / TASK_FILES["lambada_openai"]["test"], [{"sentence": "no field text"}])
    with pytest.raises(
        CalibrationError, match=r"'lambada_openai' cannot use .*lambada_test\.jsonl.*compare its fields"
    ):
        load_tasks(["lambada_openai"], data)
    (data / TASK_FILES["lambada_openai"]["test"]).write_text("no JSON\n")
    with pytest.raises(CalibrationError, match=r"'lambada_openai' cannot use .*lambada_test\.jsonl"):
        load_tasks(["lambada_openai"], data)


def test_a_task_with_examples_needs_their_split(data: Path) -> None:
    write_lines(data / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    (data / "tasks.yaml").write_text("gsm8k: {test: gsm8k.jsonl}")
    with pytest.raises(CalibrationError, match="'gsm8k' needs its split 'train'"):
        load_tasks(["gsm8k"], data)


def test_tasks_that_are_not_there(data: Path) -> None:
    with pytest.raises(UsageError, match="no task 'lambada_opena'; did you mean 'lambada_openai'"):
        load_tasks(["lambada_opena"])
    with pytest.raises(UsageError, match="'ai2_arc' is a group or a tag"):
        load_tasks(["ai2_arc"], data)
    with pytest.raises(UsageError, match="named twice"):
        load_tasks(["arc_easy", "arc_easy"], data)


def test_without_the_hub_the_way_out_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"'lambada_openai' cannot be read from the hub.*--data"):
        load_tasks(["lambada_openai"])


def test_without_lm_eval_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(CalibrationError, match=r'pip install "fxprune\[eval\]"'):
        load_tasks(["lambada_openai"])


@pytest.mark.parametrize("options", [{"limit": 0}, {"max_length": 1}, {"batch_size": 0}])
def test_options_out_of_range(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, data: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="at least|below"):
        run(tiny_llama, tiny_tokenizer, ["lambada_openai"], data, **options)


@pytest.mark.parametrize(
    ("task", "documents"),
    [
        ("lambada_openai", 5153),
        ("wikitext", 62),
        ("arc_easy", 2376),
        ("arc_challenge", 1172),
        ("openbookqa", 500),
        ("winogrande", 1267),
    ],
)
def test_the_table_fits_the_shared_data(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    shared_data: Path,
    task: str,
    documents: int,
) -> None:
    (result,) = run(tiny_llama, tiny_tokenizer, [task], shared_data, limit=2)
    assert (result.documents, result.available) == (2, documents)
    assert all(math.isfinite(metric.value) for metric in result.metrics)


def test_every_task_of_the_table_is_tried() -> None:
    tried = test_the_table_fits_the_shared_data.pytestmark[0].args[1]
    assert {task for task, _ in tried} == set(TASK_FILES)


@pytest.mark.real_model
def test_the_known_figure_on_lambada(real_model_dir: Path, shared_data: Path) -> None:
    loaded = load_model(real_model_dir, dtype="bfloat16")
    assert loaded.tokenizer is not None
    runner = EagerRunner(loaded.model)
    (result,) = evaluate_tasks(runner, loaded.tokenizer, ["lambada_openai"], shared_data, limit=64)
    assert result["last_word_accuracy"].value == pytest.approx(20 / 64, abs=1.5 / 64)  # one may flip with the rounding
    assert result["perplexity"].value == pytest.approx(60.7, abs=1.5)


# --- the command ------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run `fxprune eval` in this process; returns exit status, standard output, standard error."""
    return run_command(monkeypatch, capsys, "eval", *args)


def test_the_command_shows_and_writes_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_llama_dir: Path, data: Path
) -> None:
    text, figures = data / "text.txt", data / "eval.json"
    text.write_text("a small graph computes what the masked graph does " * 20)
    status, out, err = command(
        monkeypatch, capsys, tiny_llama_dir, "--ppl", text, "--window", 16, "--windows", 4,
        "--tasks", "lambada_openai,arc_easy", "--data", data, "--limit", 4, "--dtype", "bfloat16", "--json", figures,
    )  # fmt: skip
    assert status == 0, err
    assert "%|" not in err  # no bars where nobody watches
    written = json.loads(figures.read_text())
    assert [(task["task"], task["documents"], task["dtype"]) for task in written["tasks"]] == [
        ("lambada_openai", 4, "bfloat16"),
        ("arc_easy", 4, "bfloat16"),
    ]
    assert written["perplexity"][0]["windows"] == 4
    for task in written["tasks"]:
        for metric in task["metrics"]:
            assert metric["name"] in out
            digits = 3 if metric["value"] <= 1 else 2
            assert f"{metric['value']:.{digits}f} ± {metric['standard_error']:.{digits}f}" in out


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ((), 2, "nothing to measure"),
        (("--tasks", "arc_easy", "--limit", 0), 2, "--limit"),
        (("--tasks", "arc_easy", "--batch-size", "many"), 2, "neither `auto` nor"),
        (("--tasks", "lambada_opena"), 2, "did you mean 'lambada_openai'"),
        (("--tasks", "arc_easy"), 1, "--data"),
        (("--ppl", "missing.txt"), 1, "missing.txt"),
    ],
)
def test_what_the_command_refuses_before_it_loads_a_model(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[object, ...],
    status: int,
    message: str,
) -> None:
    found, _, err = command(monkeypatch, capsys, "no/such/model", *args)
    assert found == status
    assert message in err


def test_data_without_tasks_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    text = data / "text.txt"
    text.write_text("some words")
    status, _, err = command(monkeypatch, capsys, "no/such/model", "--ppl", text, "--data", data)
    assert status == 2
    assert "--tasks" in err
