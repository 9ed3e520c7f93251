"""Calibration samples: the right tokens, the same for the same seed, and unusable text refused by name."""

from __future__ import annotations

import copy
import importlib.util
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, PreTrainedConfig

from fxprune.calibration.text import (
    CalibrationSpec,
    calibration_set,
    check_records,
    held_out_windows,
    sample_from_model,
)
from fxprune.core.errors import CalibrationError, UsageError
from fxprune.evaluation.perplexity import hash_tokens, tokenise
from fxprune.runtimes.runners import EagerRunner, Past

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

TEXT = "the small graph computes what the masked graph does, and heads are removed. "


class BigramRunner:
    """Logits that depend on the last token alone; checks what a cached decoding loop must hold to."""

    name = "bigram"

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        length = 0 if past is None else past[0].shape[2]
        assert input_ids.shape[1] == 1
        assert attention_mask.shape == (len(input_ids), length + 1)
        assert position_ids.tolist() == [[length]] * len(input_ids)
        return self.table[input_ids], [torch.zeros(len(input_ids), 1, length + 1, 1)]


def windows(text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[list[int]]:
    """All windows of a text, as lists that can be counted."""
    tokens = tokenise(text, tokenizer)
    return tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len).tolist()


def test_self_sampling_is_seeded_and_leaves_the_global_state_alone(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    runner = EagerRunner(tiny_llama)
    before = torch.random.get_rng_state()
    made = {
        (seed, batch): calibration_set(
            CalibrationSpec(samples=6, seq_len=12, seed=seed, batch_size=batch), tokenizer=tiny_tokenizer, runner=runner
        )
        for seed, batch in ((0, 6), (0, 4), (1, 6))
    }
    assert torch.equal(torch.random.get_rng_state(), before)
    tokens = made[0, 6].tokens
    assert tokens.shape == (6, 12)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == tiny_tokenizer.bos_token_id).all()
    assert len({tuple(row) for row in tokens.tolist()}) == 6
    assert torch.equal(tokens, made[0, 4].tokens)
    assert not torch.equal(tokens, made[1, 6].tokens)
    assert made[0, 6].description == {
        "source": "self",
        "samples": 6,
        "seq_len": 12,
        "tokens": 72,
        "seed": 0,
        "sha256": hash_tokens(tokens),
        "kind": "sampled from the model",
        "start": "bos_token_id 1",
        "temperature": 1.0,
        "begins": tiny_tokenizer.decode(tokens[0], skip_special_tokens=False),
    }


def test_sampling_follows_the_models_distribution() -> None:
    table = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 0.0], [1.0, 0.0, 0.0]])  # rows: unnormalised next-token weights
    tokens = sample_from_model(
        BigramRunner(table.log()), torch.zeros(400, dtype=torch.int64), 11, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.zeros(3, 3)
    for a, b in zip(tokens[:, :-1].flatten().tolist(), tokens[:, 1:].flatten().tolist(), strict=True):
        counts[a, b] += 1
    probabilities = table / table.sum(1, keepdim=True)
    assert ((counts == 0) == (table == 0)).all()  # what has probability 0 is never drawn
    deviation = (probabilities * (1 - probabilities) / counts.sum(1, keepdim=True)).sqrt()
    assert (((counts / counts.sum(1, keepdim=True)) - probabilities).abs() <= 4 * deviation).all()


def test_sampling_agrees_with_recomputing_without_a_cache(tiny_llama: LlamaForCausalLM) -> None:
    sharp = EagerRunner(tiny_llama)
    start = torch.arange(3)
    tokens = sample_from_model(sharp, start, 9, generator=torch.Generator().manual_seed(3), batch_size=2)
    uniform = torch.rand(3, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        cumulative = tiny_llama(tokens).logits.softmax(-1).double().cumsum(-1)
    for row in range(3):
        for position in range(1, 9):
            token = int(tokens[row, position])
            upper = float(cumulative[row, position - 1, token])
            lower = float(cumulative[row, position - 1, token - 1]) if token else 0.0
            assert lower - 1e-5 <= float(uniform[row, position]) <= upper + 1e-5


def test_where_self_sampling_starts(tiny_llama: LlamaForCausalLM) -> None:
    runner = EagerRunner(tiny_llama)
    spec = CalibrationSpec(samples=20, seq_len=2)
    cases: list[tuple[PreTrainedConfig, str]] = [
        (LlamaConfig(vocab_size=97, bos_token_id=5, eos_token_id=7), "bos_token_id 5"),
        (LlamaConfig(vocab_size=97, bos_token_id=None, eos_token_id=[7, 8]), "eos_token_id 7"),
        (LlamaConfig(vocab_size=97, bos_token_id=None, eos_token_id=None), "random tokens"),
    ]
    for config, start in cases:
        made = calibration_set(spec, runner=runner, config=config)
        assert made.description["start"] == start
        first = set(made.tokens[:, 0].tolist())
        assert first == {int(start.split()[-1])} if start != "random tokens" else len(first) > 5
    with pytest.raises(UsageError, match="tokenizer or its configuration"):
        calibration_set(spec, runner=runner)
    with pytest.raises(UsageError, match="needs the model"):
        calibration_set(spec, config=cases[0][0])


def test_broken_logits_are_refused() -> None:
    runner = BigramRunner(torch.full((3, 3), float("nan")))
    with pytest.raises(CalibrationError, match="bigram returned logits that are not finite"):
        sample_from_model(runner, torch.zeros(2, dtype=torch.int64), 3, generator=torch.Generator())


def test_a_text_file_is_cut_and_chosen_without_replacement(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "some.txt"
    file.write_text(" ".join(f"{TEXT}{number}" for number in range(30)))
    every = windows(file.read_text(), tiny_tokenizer, 10)
    spec = CalibrationSpec(source=str(file), samples=20, seq_len=10, seed=5)
    made = calibration_set(spec, tokenizer=tiny_tokenizer)
    chosen = made.tokens.tolist()
    assert made.tokens.shape == (20, 10)
    assert made.tokens.dtype == torch.int64
    assert all(chosen.count(window) <= every.count(window) for window in chosen)
    assert torch.equal(calibration_set(spec, tokenizer=tiny_tokenizer).tokens, made.tokens)
    other = CalibrationSpec(source=str(file), samples=20, seq_len=10, seed=6)
    assert not torch.equal(calibration_set(other, tokenizer=tiny_tokenizer).tokens, made.tokens)
    assert made.description["kind"] == "text file"
    assert made.description["sha256"] == hash_tokens(made.tokens)
    assert json.loads(json.dumps(made.description))["tokens"] == 200
    # With exactly as many windows as samples, each is there once.
    exact = CalibrationSpec(source=str(file), samples=len(every), seq_len=10)
    assert sorted(calibration_set(exact, tokenizer=tiny_tokenizer).tokens.tolist()) == sorted(every)


def test_jsonl_documents_are_joined_by_the_end_of_text_token(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "docs.jsonl"
    documents = ["the graph", "heads and channels", "numbers"]
    lines = [json.dumps({"id": "x", "text": text}) for text in documents]
    file.write_text("\n".join([lines[0], "", lines[1], json.dumps({"id": "y", "text": " "}), lines[2]]))
    pieces = [tokenise(text, tiny_tokenizer).tolist() for text in documents]
    total = sum(map(len, pieces)) + 2
    made = calibration_set(CalibrationSpec(source=str(file), samples=1, seq_len=total), tokenizer=tiny_tokenizer)
    found = made.tokens[0].tolist()
    assert found.count(tiny_tokenizer.eos_token_id) == 2
    split = "".join(chr(token) for token in found).split(chr(tiny_tokenizer.eos_token_id))
    assert sorted(split) == sorted("".join(map(chr, piece)) for piece in pieces)
    assert (made.description["kind"], made.description["field"]) == ("jsonl file", "text")
    assert made.description["documents_read"] == 3
    assert made.description["separator"] == "eos_token_id 2"


@pytest.mark.parametrize(
    "record",
    [
        {"id": "identity_00001", "page": "heads"},
        {"url": "https://example.com/a/b", "content": "heads"},
        {"page": "heads"},
        {"prompt": "heads", "chosen": "channels", "rejected": "numbers"},
        {"messages": [{"role": "user", "content": "a"}], "conversations": [{"from": "human", "value": "a"}]},
    ],
)
def test_a_field_is_never_guessed(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, record: dict[str, object]
) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text(json.dumps(record) + "\n")
    fields = ", ".join(repr(name) for name in record)
    spec = CalibrationSpec(source=str(file), samples=1, seq_len=4)
    for read in (lambda: check_records(spec), lambda: calibration_set(spec, tokenizer=tiny_tokenizer)):
        with pytest.raises(CalibrationError, match=rf"line 1: which of the fields {fields} to read.*--text-field"):
            read()


def test_a_named_field_is_read(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"url": "a/b", "page": "heads", "text": "channels"}, {"url": "c", "page": "a small graph", "text": "words"}]
    file = write_rows(tmp_path / "docs.jsonl", rows)
    length = sum(len(tokenise(row["page"], tiny_tokenizer)) for row in rows) + 1
    made = calibration_set(CalibrationSpec(str(file), 1, length, text_field="page"), tokenizer=tiny_tokenizer)
    assert sorted(text.strip() for text in made.description["begins"].split("</s>")) == ["a small graph", "heads"]
    assert (made.description["field"], made.description["format"]) == ("page", "plain text")
    with pytest.raises(CalibrationError, match=r"line 1: there is no field 'pages'; the record has 'url', 'page'"):
        calibration_set(CalibrationSpec(str(file), 1, 4, text_field="pages"), tokenizer=tiny_tokenizer)
    plain = tmp_path / "plain.txt"
    plain.write_text(TEXT)
    with pytest.raises(UsageError, match="read as plain text: leave it out"):
        calibration_set(CalibrationSpec(str(plain), 1, 4, text_field="page"), tokenizer=tiny_tokenizer)


def test_only_as_many_documents_are_read_as_the_pool_needs(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": f"{TEXT} {number}"}) + "\n" for number in range(1000)))
    made = calibration_set(CalibrationSpec(source=str(file), samples=2, seq_len=16), tokenizer=tiny_tokenizer)
    assert made.description["documents_read"] < 1000
    assert made.description["tokens_read"] >= 4 * 2 * 16


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("short.txt", b"the graph", r"has \d+ tokens in 1 documents.* 4 samples of 8 tokens need 32"),
        ("empty.txt", b" \n", "holds no text"),
        ("latin.txt", b"caf\xe9 " * 99, "offset 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("bad.jsonl", b'{"text": "a"}\n{"page": "b"}\n', "line 2: no text in field 'text'"),
        ("bad.jsonl", b'{"text": 3}\n', "line 1: no text"),
        ("bad.jsonl", b'["a"]\n', "line 1: no text"),
        ("bad.jsonl", b'{"text": ""}\n', "empty in every record"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "offset 13"),
        ("list.json", b"[]", "jsonl"),
        ("list.json", b'{"text": "a"}\n{"text": "b"}', r"not JSON.*\.jsonl"),
        ("list.json", b'[{"text": "a"}, {"text": null}]', "record 2: no text in field 'text': it holds nothing"),
        ("bad.jsonl", b"{}\n", "line 1: no text: expected an object with fields, got an empty one"),
    ],
)
def test_unusable_text(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=match):
        calibration_set(CalibrationSpec(source=str(tmp_path / name), samples=4, seq_len=8), tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("source", ["/nowhere/text", "missing.txt", "missing.jsonl", "a/b/c", "no such"])
def test_missing_files(tiny_tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        calibration_set(CalibrationSpec(source=source), tokenizer=tiny_tokenizer)


@pytest.mark.smoke
def test_a_data_set_directory_streams(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for split, word in (("train", "heads"), ("test", "channels")):
        rows = [json.dumps({"id": "n", "text": f"{word} are removed {number}"}) for number in range(40)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join([json.dumps({"id": "e", "text": ""}), *rows]))
    for source, word in ((tmp_path, "heads"), (f"{tmp_path}:default:test", "channels")):
        spec = CalibrationSpec(source=str(source), samples=5, seq_len=8)
        made = calibration_set(spec, tokenizer=tiny_tokenizer)
        assert made.tokens.shape == (5, 8)
        assert word in tiny_tokenizer.decode(made.tokens.flatten())
        assert made.description["field"] == "text"
        assert torch.equal(calibration_set(spec, tokenizer=tiny_tokenizer).tokens, made.tokens)
    assert (made.description["configuration"], made.description["split"]) == ("default", "test")
    for source in (f"{tmp_path}:other", f"{tmp_path}:default:other"):
        with pytest.raises(CalibrationError, match="other"):
            calibration_set(CalibrationSpec(source=source), tokenizer=tiny_tokenizer)
    with pytest.raises(CalibrationError, match="need"):
        calibration_set(CalibrationSpec(source=str(tmp_path)), tokenizer=tiny_tokenizer)


def test_a_data_set_without_text(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"label": 1}\n')
    with pytest.raises(CalibrationError, match="fields 'label' to read is not clear"):
        calibration_set(CalibrationSpec(source=str(tmp_path)), tokenizer=tiny_tokenizer)


def test_a_hub_data_set_that_cannot_be_had(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match=r"'nobody/nothing' \(configuration small, split train\)"):
        calibration_set(CalibrationSpec(source="nobody/nothing:small"), tokenizer=tiny_tokenizer)


def test_the_missing_package_is_named(tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CalibrationError, match=r"fxprune\[datasets\]"):
        calibration_set(CalibrationSpec(source="some/data"), tokenizer=tiny_tokenizer)


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"seq_len": 1}, {"batch_size": 0}, {"seed": -1}, {"source": ""}, {"text_field": "page"}]
)
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        CalibrationSpec(**options)  # type: ignore[arg-type]


def test_the_models_limits_are_checked(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "some.txt"
    file.write_text(TEXT * 20)
    with pytest.raises(UsageError, match="129 is longer than the model's 128 positions"):
        calibration_set(
            CalibrationSpec(source=str(file), seq_len=129), tokenizer=tiny_tokenizer, config=tiny_llama.config
        )
    with pytest.raises(CalibrationError, match="vocabulary of 9;"):
        calibration_set(
            CalibrationSpec(source=str(file), samples=2, seq_len=50),
            tokenizer=tiny_tokenizer,
            config=LlamaConfig(vocab_size=9),
        )
    with pytest.raises(UsageError, match="tokenizer"):
        calibration_set(CalibrationSpec(source=str(file), seq_len=8), config=tiny_llama.config)


# ---- chats -----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m['role']) }}{% endif %}{{ m['role'] }} {{ m['content'] }}{{ eos_token }}"
    "{% endfor %}"
)
SAID = ("which heads matter", "those that are left")
PARTS = [[{"type": "text", "text": text}] for text in SAID]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with a chat template that begins with `<s>` and ends what everybody says with `</s>`."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(asked: Any, answered: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"messages": turns(*SAID), "source": "somewhere"}, "messages"),
        ({"prompt": SAID[0], "messages": turns(*PARTS)}, "messages"),
        (
            {"id": "x", "conversations": [{"from": "human", "value": SAID[0]}, {"from": "gpt", "value": SAID[1]}]},
            "conversations",
        ),
        ({"conversations": {"from": ["human", "gpt"], "value": list(SAID)}}, "conversations"),
        ({"messages": [{**turn, "name": None} for turn in turns(*SAID)]}, "messages"),
        ({"prompt": SAID[0], "completion": SAID[1]}, "prompt, completion"),
        ({"prompt": turns(*SAID)[:1], "completion": turns(*SAID)[1:]}, "prompt, completion"),
        ({"prompt": SAID[0], "response": SAID[1]}, "prompt, response"),
        ({"instruction": SAID[0], "input": "", "output": SAID[1]}, "instruction, output, input"),
        ({"instruction": SAID[0], "response": SAID[1], "category": "qa"}, "instruction, response"),
    ],
)
def test_chats_go_through_the_template(
    chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, record: dict[str, Any], field: str
) -> None:
    """Two conversations, whole, each with its own special tokens: one that begins it, and one end between them."""
    once = chat_tokenizer.apply_chat_template(turns(*SAID), tokenize=True, return_dict=False)
    assert once.count(1) == 1
    assert once.count(2) == 2
    file = write_rows(tmp_path / "chats.jsonl", [record, record])
    made = calibration_set(CalibrationSpec(str(file), 1, 2 * len(once)), tokenizer=chat_tokenizer)
    assert made.tokens.tolist() == [once + once]
    assert (made.description["field"], made.description["documents_read"]) == (field, 2)
    assert made.description["format"] == "chats, written by the tokenizer's chat template"
    assert made.description["begins"] == chat_tokenizer.decode(once + once)[:200]
    assert made.description["begins"].startswith("<s>")


def test_a_text_to_the_question_is_part_of_it(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"instruction": "which", "context": "heads and words", "response": "words"}]
    file = write_rows(tmp_path / "dolly.jsonl", rows)
    made = calibration_set(CalibrationSpec(str(file), 1, 20), tokenizer=chat_tokenizer)
    expected = chat_tokenizer.apply_chat_template(turns("which\n\nheads and words", "words"), return_dict=False)
    assert made.tokens[0].tolist() == expected[:20]
    file = write_rows(tmp_path / "dolly.json", [])
    file.write_text(json.dumps(rows))
    listed = calibration_set(CalibrationSpec(str(file), 1, 20), tokenizer=chat_tokenizer)
    assert torch.equal(listed.tokens, made.tokens)
    assert listed.description["kind"] == "json file"


def test_a_named_field_may_hold_a_chat(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": "heads", "chosen": turns(*SAID), "rejected": turns("no", "no")}]
    file = write_rows(tmp_path / "preferred.jsonl", rows)
    once = chat_tokenizer.apply_chat_template(turns(*SAID), return_dict=False)
    made = calibration_set(CalibrationSpec(str(file), 1, len(once), text_field="chosen"), tokenizer=chat_tokenizer)
    assert made.tokens.tolist() == [once]
    assert made.description["field"] == "chosen"


def test_chats_that_a_template_wants_in_parts(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Templates of models that see pictures read lists of parts alone: a text they would drop without a word."""
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": turns(*SAID)}])
    made = calibration_set(CalibrationSpec(str(file), 1, 16), tokenizer=chat_tokenizer)
    assert made.description["begins"].startswith("user which heads")


def test_a_tokenizer_without_a_chat_template(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": turns(*SAID)}])
    with pytest.raises(CalibrationError, match=r"field messages.*no chat template.*plain text.*--text-field"):
        calibration_set(CalibrationSpec(str(file), 1, 4), tokenizer=tiny_tokenizer)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"messages": []}, "line 2, field 'messages': no messages"),
        ({"messages": "heads"}, "line 2, field 'messages': no messages: expected a list of them, got str"),
        ({"text": "heads"}, "line 2, field 'messages': no messages"),
        ({"messages": [{"role": "user"}]}, "message 1: there is no 'content'; it has 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1, 'content': expected a text or .*got int"),
        ({"messages": [{"role": 3, "content": "a"}]}, "message 1: its role is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part is of type 'image'"),
        ({"messages": ["heads"]}, "message 1: no text: expected an object"),
        ({"messages": [{"speaker": "a", "says": "b"}]}, "it has 'speaker', 'says', neither role and content nor"),
        ({"messages": [{"from": "narrator", "value": "b"}]}, "from 'narrator' is unknown; there are system"),
        ({"messages": {"role": ["user", "assistant"], "content": ["a"]}}, "not of one length"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "line 2: .*template refuses it: no role critic"),
    ],
)
def test_chats_that_cannot_be_read(
    chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, record: dict[str, Any], match: str
) -> None:
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": turns(*SAID)}, record])
    with pytest.raises(CalibrationError, match=match):
        calibration_set(CalibrationSpec(str(file), 1, 40), tokenizer=chat_tokenizer)


def test_pairs_that_vary(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A question without an answer says nothing that a model should say; an answer of another kind is refused."""
    rows = [{"prompt": SAID[0], "completion": SAID[1]}, {"prompt": "heads", "completion": ""}]
    once = chat_tokenizer.apply_chat_template(turns(*SAID), return_dict=False)
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    made = calibration_set(CalibrationSpec(str(file), 1, len(once)), tokenizer=chat_tokenizer)
    assert made.description["documents_read"] == 1
    assert made.tokens.tolist() == [once]
    for changed, match in (({"completion": 3}, "it holds int"), ({"answer": "a"}, "the record has 'prompt', 'answer'")):
        file = write_rows(tmp_path / "pairs.jsonl", [rows[0], {"prompt": "heads", **changed}])
        with pytest.raises(CalibrationError, match=f"line 2: no text in field 'completion': {match}"):
            calibration_set(CalibrationSpec(str(file), 1, 4), tokenizer=chat_tokenizer)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_chats_of_a_data_set(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, form: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"id": f"row {number}", "messages": turns(f"word {number}", SAID[1])} for number in range(30)]
    folder = tmp_path / "set"
    folder.mkdir()
    if form == "jsonl":
        write_rows(folder / "train.jsonl", rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    sources = [folder] if form == "jsonl" else [folder, folder / "train.parquet"]
    for source in sources:
        made = calibration_set(CalibrationSpec(str(source), 4, 24), tokenizer=chat_tokenizer)
        text = chat_tokenizer.decode(made.tokens.flatten())
        assert "</s><s> user word" in text
        assert "row" not in text
        assert made.description["field"] == "messages"
        named = CalibrationSpec(str(source), 4, 8, text_field="id")
        assert "row" in chat_tokenizer.decode(calibration_set(named, tokenizer=chat_tokenizer).tokens[0])


def test_held_out_windows_are_of_the_same_chats(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"id": str(number), "messages": turns(f"word {number}", SAID[1])} for number in range(40)]
    spec = CalibrationSpec(str(write_rows(tmp_path / "chats.jsonl", rows)), samples=4, seq_len=24)
    used = calibration_set(spec, tokenizer=chat_tokenizer).tokens
    held_out = held_out_windows(spec, 4, 24, tokenizer=chat_tokenizer)
    assert "<s> user word" in chat_tokenizer.decode(held_out.flatten())
    assert not {tuple(row) for row in used.tolist()} & {tuple(row) for row in held_out.tolist()}


def test_instructions_as_the_default_model_reads_them(real_model_dir: Path, tmp_path: Path) -> None:
    """With the template's own tokens, the system prompt that it adds, and nothing before or twice."""
    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    rows = [
        {"instruction": "Name a city.", "category": "open_qa", "input": "", "output": f"City {n}."} for n in range(9)
    ]
    file = tmp_path / "instructions.json"
    file.write_text(json.dumps(rows))
    made = calibration_set(CalibrationSpec(str(file), 1, 9 * 35), tokenizer=tokenizer)
    text = tokenizer.decode(made.tokens[0])
    chats = [tokenizer.apply_chat_template(turns("Name a city.", row["output"]), tokenize=False) for row in rows]
    pieces = text.split("<|im_start|>system\n")
    assert pieces[0] == ""
    assert len(pieces) > 5
    for piece in pieces[1:-1]:
        assert f"<|im_start|>system\n{piece}".removesuffix("<|im_end|>") in chats
    assert made.description["begins"].startswith("<|im_start|>system\n")
    assert "<|im_start|>user\nName a city.<|im_end|>" in made.description["begins"]
