"""Kept loss signals: the same bits as collected ones, for the same calibration only, and never half-written."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from fxprune.calibration import kept_signals
from fxprune.calibration.kept_signals import kept_loss_signals
from fxprune.calibration.loss_signals import GroupSignals, collect_loss_signals
from fxprune.core.errors import CheckpointError, OutputError, UsageError
from fxprune.core.pipeline import build_pass
from fxprune.tracing.nodes import get_attribute
from tests.families import located

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fxprune.core.program import Program

SMALL: dict[str, Any] = {"samples": 12, "seq_len": 12, "round_to": 4}
LEARNED: dict[str, Any] = {"held_out": 4, "steps": 5, "batch": 2, "start_samples": 4, "fit_samples": 8, "lora_rank": 2}


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(seed))


def own() -> Program:
    """A program that may be changed: what `located` gives is every test's."""
    found: Program = located.__wrapped__("llama")
    return found


def equal(one: Mapping[str, GroupSignals], other: Mapping[str, GroupSignals], *, grams: bool = True) -> bool:
    """Whether all numbers are the same bits."""
    for name, mine in one.items():
        its = other[name]
        assert (mine.taylor is None) == (its.taylor is None)
        pairs = [(mine.gradients, its.gradients)]
        if mine.taylor is not None and its.taylor is not None:
            pairs.append((mine.taylor, its.taylor))
        for part in ("inputs", "outputs", "means") if grams else ("means",):
            mine_of, its_of = getattr(mine, part), getattr(its, part)
            assert set(mine_of) == set(its_of)
            pairs += [(mine_of[key], its_of[key]) for key in mine_of]
        if mine.tokens != its.tokens or not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
            return False
    return one.keys() == other.keys()


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that signals are collected."""
    found: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        found.append(len(arguments[2]))
        return collect_loss_signals(*arguments, **options)

    monkeypatch.setattr(kept_signals, "collect_loss_signals", counted)
    return found


@pytest.mark.parametrize("taylor", [False, True])
def test_what_is_read_is_what_was_collected(tmp_path: Path, collections: list[int], taylor: bool) -> None:
    program = located("llama")
    how: dict[str, Any] = {"labels": "mixed", "taylor": taylor, "forward_dtype": torch.bfloat16, "seed": 1}
    done: list[int] = []
    wanted = collect_loss_signals(program, program.groups, tokens(), **how)
    first = kept_loss_signals(tmp_path / "deep" / "er", program, program.groups, tokens(), **how)
    again = kept_loss_signals(tmp_path / "deep" / "er", program, program.groups, tokens(), on_batch=done.append, **how)
    assert (first[1], again[1], collections, done) == (False, True, [4], [4])
    assert equal(wanted, first[0])
    assert equal(wanted, again[0])
    scores, read = kept_loss_signals(tmp_path / "deep" / "er", program, program.groups, tokens(), grams=False, **how)
    assert read
    assert equal(scores, wanted, grams=False)
    assert not any(one.inputs or one.outputs for one in scores.values())


def test_scores_alone_do_not_serve_where_moments_are_asked_for(tmp_path: Path, collections: list[int]) -> None:
    program = located("llama")
    kept_loss_signals(tmp_path, program, program.groups, tokens(), grams=False)
    full, read = kept_loss_signals(tmp_path, program, program.groups, tokens())
    assert not read
    assert all(one.inputs for one in full.values())
    assert len(collections) == 2
    assert {file.name.split(".")[1] for file in tmp_path.iterdir()} == {"scores", "grams"}


def test_layers_that_share_their_weights_are_written_once_for_each(tmp_path: Path, collections: list[int]) -> None:
    program = own()
    shared = program.graph_module.get_submodule("model.layers.0.mlp.down_proj")
    get_attribute(program.graph_module, "model.layers.1.mlp").down_proj = shared
    wanted, _ = kept_loss_signals(tmp_path, program, program.groups, tokens())
    read, was_read = kept_loss_signals(tmp_path, program, program.groups, tokens())
    one, other = (wanted[f"model.layers.{layer}.mlp"].inputs for layer in (0, 1))
    assert [value.data_ptr() for value in one.values()] == [value.data_ptr() for value in other.values()]
    assert was_read
    assert equal(wanted, read)
    assert collections == [4]


def test_nothing_else_is_served(tmp_path: Path, collections: list[int]) -> None:
    program = located("llama")
    how: dict[str, Any] = {"labels": "mixed", "grams": False}
    kept_loss_signals(tmp_path, program, program.groups, tokens(), **how)
    moved = own()
    with torch.no_grad():
        next(moved.graph_module.parameters()).view(-1)[7] += 1e-3
    others: list[tuple[Program, Any, Tensor, dict[str, Any]]] = [
        (program, program.groups, tokens(1), how),
        (program, program.groups[1:], tokens(), how),
        (program, program.groups, tokens(), {**how, "seed": 1}),
        (program, program.groups, tokens(), {**how, "labels": "sampled"}),
        (program, program.groups, tokens(), {**how, "taylor": True}),
        (program, program.groups, tokens(), {**how, "forward_dtype": torch.bfloat16}),
        (moved, moved.groups, tokens(), how),
    ]
    for model, groups, text, options in others:
        assert kept_loss_signals(tmp_path, model, groups, text, **options)[1] is False
    assert len(collections) == len(others) + 1
    # The seed is of labels that are drawn.
    kept_loss_signals(tmp_path, program, program.groups, tokens(), labels="data", seed=0, grams=False)
    assert kept_loss_signals(tmp_path, program, program.groups, tokens(), labels="data", seed=5, grams=False)[1]


def test_what_cannot_be_used_is_told(tmp_path: Path, collections: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    program = located("llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot keep loss signals in .*file"):
        kept_loss_signals(tmp_path / "file", program, program.groups, tokens())
    assert not collections  # before any work

    def full(*arguments: Any, **options: Any) -> None:
        del options
        arguments[1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kept_signals, "save_file", full)
        with pytest.raises(OutputError, match="No space left"):
            kept_loss_signals(tmp_path / "signals", program, program.groups, tokens())
    assert list((tmp_path / "signals").iterdir()) == []
    kept_loss_signals(tmp_path / "signals", program, program.groups, tokens())
    (file,) = (tmp_path / "signals").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"grams\.safetensors.*remove the file"):
        kept_loss_signals(tmp_path / "signals", program, program.groups, tokens())


@pytest.mark.parametrize("method", ["channel", "fisher", "taylor"])
def test_another_budget_needs_no_second_calibration(tmp_path: Path, collections: list[int], method: str) -> None:
    program = located("llama")
    kept: dict[str, Any] = {**SMALL, "signals": str(tmp_path)}
    build_pass(method, {**kept, "ratio": 0.2})(program)
    read = build_pass(method, {**kept, "ratio": 0.4})(program).program
    assert len(collections) == 1
    assert read.results["structured"]["signals_read_from"] == str(tmp_path)
    plain = build_pass(method, {**SMALL, "ratio": 0.4})(program).program
    assert plain.plan == read.plan
    assert "signals_read_from" not in plain.results["structured"]
    for (name, one), other in zip(
        plain.graph_module.state_dict().items(), read.graph_module.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_learned_pruning_reads_them_for_its_start_and_its_fit(tmp_path: Path, collections: list[int]) -> None:
    program = located("llama")
    kept: dict[str, Any] = {**SMALL, **LEARNED, "signals": str(tmp_path)}
    first = build_pass("l0", {**kept, "ratio": 0.2})(program).program
    assert collections == [4, 8]
    assert "signals_read_from" not in first.results["structured"]
    ablation = {**kept, "ratio": 0.4, "reconstruct": "none", "distillation": "plain"}
    assert "signals_read_from" in build_pass("l0", ablation)(program).program.results["structured"]  # of the start
    read = build_pass("l0", {**kept, "ratio": 0.4})(program).program
    masks = build_pass("l0", {**kept, "ratio": 0.4, "lora_rank": 0})(program).program
    assert collections == [4, 8]  # masks alone leave the weights as they were
    for one in (read, masks):
        assert one.results["structured"]["signals_read_from"] == str(tmp_path)
    assert build_pass("l0", {**SMALL, **LEARNED, "ratio": 0.4})(program).program.plan == read.plan


def test_methods_without_such_gradients_refuse_the_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="flap reads no gradients of the loss"):
        build_pass("flap", {"ratio": 0.2, "signals": str(tmp_path)})
    idle = {"ratio": 0.2, "signals": str(tmp_path), "warm_start": False, "reconstruct": "none"}
    with pytest.raises(UsageError, match=r"signals=.* has no part"):
        build_pass("l0", {**SMALL, **LEARNED, **idle})
    assert not list(tmp_path.iterdir())


def test_facts_of_groups_tell_their_units_apart() -> None:
    program = located("llama")
    group = program.groups[-1]
    first, *rest = group.slices
    turned = dataclasses.replace(first, indices=first.indices[::-1].copy())
    other = dataclasses.replace(group, slices=(turned, *rest))
    assert kept_signals._facts_of(group) == kept_signals._facts_of(dataclasses.replace(group))
    assert kept_signals._facts_of(group) != kept_signals._facts_of(other)
