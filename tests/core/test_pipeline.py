"""Pipelines: YAML is validated as a whole before anything runs, and every pass tells the truth about what it did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import nn

from fxprune.core import registry
from fxprune.core.errors import PostconditionError, RegistryError, UsageError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.pipeline import Pipeline, build_pass, load_pipeline
from fxprune.passes.channel import ChannelPrune
from fxprune.passes.slim import Slim
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.core.program import Program


class Note(Pass):
    """Adds a result; used to see what ran."""

    name: ClassVar[str] = "note"
    ran: ClassVar[list[str]] = []

    def __init__(self, *, text: str = "hello", times: int = 1, flag: bool = False) -> None:
        self.text, self.times, self.flag = text, times, flag

    def call(self, program: Program) -> PassResult:
        self.ran.append(self.text)
        return PassResult(program.with_results(note=self.text * self.times), modified=True, details={"text": self.text})


class Idle(Pass):
    """Changes nothing."""

    name = "idle"

    def call(self, program: Program) -> PassResult:
        return PassResult(program, modified=False)


@pytest.fixture
def program() -> Program:
    return trace(nn.Linear(3, 2), example_inputs=(torch.ones(2, 3),))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PASSES", dict(registry._PASSES))
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    registry.register_pass("note", Note)
    registry.register_pass("idle", Idle)
    monkeypatch.setattr(Note, "ran", [])


def yaml_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_becomes_passes_with_their_options(tmp_path: Path) -> None:
    channel = "channel: {ratio: 0.2, samples: 4, uniform: true, reconstruct: bias}"
    text = f"passes:\n  - lift_linears\n  - {channel}\n  - slim:\n"
    pipeline = Pipeline.from_yaml(yaml_file(tmp_path, text))
    assert [step.name for step in pipeline.passes] == ["lift_linears", "channel", "slim"]
    prune = pipeline.passes[1]
    assert isinstance(prune, ChannelPrune)
    assert isinstance(pipeline.passes[2], Slim)
    options = prune.options()
    assert (options["ratio"], options["samples"], options["uniform"]) == (0.2, 4, True)
    assert (options["reconstruct"], options["biases"]) == ("bias", False)


def test_passes_run_in_order_and_each_writes_its_entry_of_the_history(program: Program) -> None:
    seen: list[str] = []
    steps = [Note(text="a"), Idle(), Note(text="b", times=2)]
    result = Pipeline(steps, on_pass=lambda step: seen.append(step.name))(program)
    assert seen == ["note", "idle", "note"]
    assert result.modified
    assert result.program.results["note"] == "bb"
    history = [(event.name, event.modified) for event in result.program.history]
    assert history == [("note", True), ("idle", False), ("note", True)]
    last = result.program.history[-1]
    assert last.options == {"text": "b", "times": 2, "flag": False}
    assert last.details == {"text": "b"}
    assert last.seconds >= 0


def test_a_pipeline_is_a_pass(program: Program) -> None:
    inner = Pipeline([Note(text="x"), Note(text="y")])
    result = Pipeline([inner, Idle()])(program)
    assert [event.name for event in result.program.history] == ["note", "note", "idle"]
    assert inner.options() == {"passes": ["note", "note"]}
    assert not Pipeline([Idle(), Pipeline([Idle()])])(program).modified


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["lift_linear"], "unknown pass 'lift_linear'; did you mean 'lift_linears'?"),
        (["zzz"], "unknown pass 'zzz'; known passes: alps, channel,"),
        ([{"channel": {"ration": 0.1}}], "pipeline: channel: unknown option 'ration'; did you mean 'ratio'?"),
        ([{"note": {"zzz": 1}}], "pipeline: note: unknown option 'zzz'; it takes text, times, flag"),
        ([{"slim": {"a": 1}}], "pipeline: slim: unknown option 'a'; it takes no options"),
        ([{"channel": {"ratio": "much"}}], "pipeline: channel: option ratio: Input should be a valid number"),
        ([{"channel": {"ratio": 0.1, "samples": 1.5}}], "option samples: Input should be a valid integer"),
        ([{"wanda": {"pattern": 124}}], "pipeline: wanda: option pattern: Input should be a valid string, not 124"),
        ([{"channel": {"ratio": [0.1, "much"]}}], "pipeline: channel: option ratio.1: Input should be a valid number"),
        ([{"channel": None}], "channel needs one target, of ratio, target_params"),
        ([{"save": None}], "pipeline: save: option out: Field required"),
        ([{"channel": {"ratio": 1.5}}], "ratio must lie between 0 and 1, got 1.5"),
        ([{"channel": [0.1]}], "options of pass 'channel' (entry 1) must be a mapping"),
        ([{"slim": {}, "note": {}}], "entry 1 must be a pass name or a mapping with one pass name"),
        ([3], "entry 1 must be a pass name"),
        ([], "expected a list of passes"),
        ({"steps": []}, "expected a list of passes under the key 'passes'"),
        (None, "expected a list of passes"),
    ],
)
def test_a_wrong_pipeline_is_refused_with_what_is_wrong(data: Any, message: str) -> None:
    with pytest.raises((UsageError, RegistryError)) as caught:
        load_pipeline(data)
    assert message in str(caught.value)


def test_a_pattern_without_quotes_is_a_number_to_yaml(tmp_path: Path) -> None:
    for options, pattern in (("pattern: 2:4", "2:4"), ("per_module: {'*.q_proj': 4:8}", "4:8")):
        with pytest.raises(UsageError, match=f"YAML reads {pattern} without quotes .*write '{pattern}' with quotes"):
            Pipeline.from_yaml(yaml_file(tmp_path, f"passes: [{{wanda: {{{options}}}}}]"))
    quoted = Pipeline.from_yaml(yaml_file(tmp_path, "passes: [{wanda: {pattern: '2:4'}}]")).passes[0]
    assert quoted.options()["pattern"] == "2:4"
    with pytest.raises(UsageError, match="valid string$"):
        load_pipeline([{"wanda": {"pattern": 24}}])  # no such text in base 60


def test_nothing_is_built_or_run_before_everything_is_valid(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    original = Note.__init__

    def counting(self: Note, *, text: str = "hello", times: int = 1, flag: bool = False) -> None:
        built.append(text)
        original(self, text=text, times=times, flag=flag)

    monkeypatch.setattr(Note, "__init__", counting)
    with pytest.raises(UsageError, match="times"):
        Pipeline(load_pipeline([{"note": {"text": "first"}}, {"note": {"times": "many"}}]))(program)
    assert (built, Note.ran) == ([], [])
    Pipeline(load_pipeline([{"note": {"text": "first"}}]))(program)
    assert (built, Note.ran) == (["first"], ["first"])


@pytest.mark.parametrize("text", ["passes: [a, {", "\x00"])
def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"pipeline\.yaml: cannot be read as YAML"):
        Pipeline.from_yaml(yaml_file(tmp_path, text))
    with pytest.raises(UsageError, match="cannot be read"):
        Pipeline.from_yaml(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match=r"pipeline\.yaml: expected a list"):
        Pipeline.from_yaml(yaml_file(tmp_path, "just text"))


def test_a_yaml_file_cannot_name_python_objects(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "passes: [!!python/object/apply:os.getcwd []]")
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        Pipeline.from_yaml(path)


def test_one_pass_is_built_by_name() -> None:
    step = build_pass("note", {"times": "3"})
    assert isinstance(step, Note)
    assert step.times == 3
    assert repr(step) == "Note(text='hello', times=3, flag=False)"


class Liar(Idle):
    """Says the opposite of what it does."""

    def __init__(self, *, changes: bool) -> None:
        self.changes = changes

    def call(self, program: Program) -> PassResult:
        return PassResult(program.replace() if self.changes else program, modified=not self.changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (True, "reports modified=False but returned another program"),
        (False, "reports modified=True but returned the same"),
    ],
)
def test_modified_must_tell_the_truth(program: Program, changes: bool, message: str) -> None:
    with pytest.raises(PostconditionError, match=message):
        Liar(changes=changes)(program)


def test_requires_runs_before_and_ensures_after(program: Program) -> None:
    order: list[str] = []

    class Ordered(Note):
        def requires(self, program: Program) -> None:
            order.append(f"requires {len(program.results)}")

        def ensures(self, before: Program, after: Program) -> None:
            order.append(f"ensures {len(before.results)} {len(after.results)}")
            raise PostconditionError("broken")

    with pytest.raises(PostconditionError, match="broken"):
        Pipeline([Ordered()])(program)
    assert order == ["requires 0", "ensures 0 1"]
    assert Note.ran == ["hello"]
    assert not program.history
