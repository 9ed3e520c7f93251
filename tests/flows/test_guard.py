"""The guard: windows that calibration did not use, and a warning only where texts really part ways."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from fxprune.calibration.text import CalibrationSpec, calibration_set, held_out_windows
from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CalibrationError, UsageError
from fxprune.core.stopwatch import Stopwatch
from fxprune.evaluation.perplexity import perplexity
from fxprune.flows.guard import LARGE, Guard, Rise, parting
from fxprune.runtimes.runners import GraphRunner

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from fxprune.core.program import Program


@pytest.fixture(scope="module")
def program(tiny_llama_dir: Path) -> Program:
    return front_end(load_model(str(tiny_llama_dir)), Stopwatch())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers, so that no two windows are alike."""
    path = tmp_path_factory.mktemp("guard") / "numbers.txt"
    path.write_text(" ".join(f"{n * n % 7919} so is {n}" for n in range(400)))
    return path


def rows(tokens: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tokens.tolist()}


def test_held_out_windows_are_no_calibration_windows(text: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    spec = CalibrationSpec(str(text), samples=10, seq_len=16)
    used = calibration_set(spec, tokenizer=tiny_tokenizer).tokens
    held = held_out_windows(spec, 6, 16, tokenizer=tiny_tokenizer)
    assert held.shape == (6, 16)
    assert len(rows(held)) == 6
    assert rows(used).isdisjoint(rows(held))
    assert torch.equal(held_out_windows(spec, 6, 9, tokenizer=tiny_tokenizer), held[:, :9])
    with pytest.raises(UsageError, match="1 window of 2 to 16 tokens"):
        held_out_windows(spec, 6, 17, tokenizer=tiny_tokenizer)


def test_a_text_that_calibration_uses_up_leaves_nothing(text: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    short = text.with_name("short.txt")
    short.write_text(text.read_text()[:400])
    tokens = len(tiny_tokenizer(short.read_text(), add_special_tokens=False)["input_ids"])
    spec = CalibrationSpec(str(short), samples=tokens // 16 - 1, seq_len=16)
    assert held_out_windows(spec, 6, 16, tokenizer=tiny_tokenizer).shape == (1, 16)


def test_text_from_the_model_is_sampled_anew(program: Program, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    runner = GraphRunner(program.graph_module, program.interface)
    spec = CalibrationSpec("self", samples=4, seq_len=12)
    used = calibration_set(spec, tokenizer=tiny_tokenizer, runner=runner).tokens
    held = held_out_windows(spec, 4, 6, tokenizer=tiny_tokenizer, runner=runner)
    assert held.shape == (4, 6)
    assert rows(used[:, :6]).isdisjoint(rows(held))


def test_a_rise_is_the_mean_of_paired_differences() -> None:
    rise = Rise.of([1.0, 2.0, 4.0], [1.5, 2.0, 5.0])
    assert rise.mean == pytest.approx(0.5)
    assert rise.standard_error == pytest.approx(0.5 / math.sqrt(3))  # differences 0.5, 0, 1: deviation 0.5
    assert Rise.of([1.0], [2.0]).standard_error is None


@pytest.mark.parametrize(
    ("unlike", "error", "apart"),
    [
        (0.1 + 2 * LARGE, 0.05, True),
        (0.1 + 0.9 * LARGE, 0.01, False),  # sure, but small
        (0.1 + 2 * LARGE, 0.2, False),  # large, but chance would do
        (0.1 - 2 * LARGE, 0.01, False),  # the different text suffers less
    ],
)
def test_texts_part_ways_when_the_difference_is_large_and_sure(unlike: float, error: float, apart: bool) -> None:
    difference, spread, warned = parting(Rise(0.1, 0.01), Rise(unlike, error))
    assert warned is apart
    assert difference == pytest.approx(unlike - 0.1)
    assert spread == pytest.approx(math.hypot(0.01, error))


def test_one_window_never_warns() -> None:
    assert parting(Rise(0.0, None), Rise(5.0, 0.1)) == (5.0, None, False)


def test_the_guard_measures_both_texts_of_both_forms(program: Program, text: Path) -> None:
    spec = CalibrationSpec(str(text), samples=10, seq_len=16)
    guard = Guard(program, spec, "python", windows=3, forward_dtype=None)
    assert [len(one.tokens) for one in guard.texts] == [3, 3]
    same = guard.judge(program)
    assert same["difference"] == 0
    assert "warning" not in same
    assert [entry["rise"] for entry in same["texts"]] == [0, 0]
    runner = GraphRunner(program.graph_module, program.interface)
    for entry, one in zip(same["texts"], guard.texts, strict=True):
        own = perplexity(runner, one.tokens.reshape(-1), text="own", window=16)
        assert entry["dense"] == pytest.approx(own.perplexity)
        assert entry["tokens_sha256"] == own.tokens_sha256


def test_a_model_that_forgot_everything_else_is_warned_of(program: Program, text: Path) -> None:
    """The output projection loses the tokens that only the different text has."""
    guard = Guard(program, CalibrationSpec(str(text), samples=10, seq_len=16), "python", windows=4)
    like, unlike = (one.tokens for one in guard.texts)
    forgotten = sorted(set(unlike.flatten().tolist()) - set(like.flatten().tolist()))
    assert forgotten

    class Forgetful(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs = list(program.graph_module(*inputs))
            place = program.interface.outputs.index("logits")
            outputs[place] = outputs[place].clone()
            outputs[place][..., forgotten] -= 4
            return tuple(outputs)

    section = guard.judge(program.replace(graph_module=Forgetful()))  # type: ignore[arg-type]  # it is called alike
    assert section["difference"] > LARGE
    assert "use more calibration text" in section["warning"]
    assert f"{section['difference']:.2f}" in section["warning"]


def test_a_guard_without_windows_left_says_so(
    program: Program, text: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tokens = len(tiny_tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    guard = Guard(program, CalibrationSpec(str(text), samples=tokens // 16, seq_len=16), str(text), windows=2)
    section = guard.judge(program)
    assert "nothing like it is left" in section["note"]
    assert [entry["role"] for entry in section["texts"]] == ["different"]
    assert "difference" not in section


def test_a_second_text_that_is_too_short_is_refused(program: Program, text: Path) -> None:
    short = text.with_name("word.txt")
    short.write_text("so")
    with pytest.raises(CalibrationError, match="--guard .*word.txt has . tokens, one window needs 16"):
        Guard(program, CalibrationSpec(str(text), samples=4, seq_len=16), str(short))
