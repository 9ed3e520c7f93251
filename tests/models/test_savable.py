"""What is asked before the work: wrapped models, classes without a checkpoint, outputs that are inputs, groups."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from fxprune.channels.front_end import LOCATE
from fxprune.checkpoints.savable import without_unsavable
from fxprune.core.errors import FxpruneError, OutputError, PreconditionError, TraceError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.flows.exporting import ExportRequest, run_export
from fxprune.flows.recipe import Destination
from fxprune.flows.steps import carry_out, prune_program
from fxprune.tracing.trace import trace
from tests.commands import done

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from fxprune.core.program import Program

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def llama(cls: type[LlamaForCausalLM] = LlamaForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    return cls(LlamaConfig(**SIZES)).eval()


def located(model: nn.Module) -> Program:
    return Pipeline([build_pass(name, {}) for name in LOCATE])(trace(model)).program


def lora() -> Any:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()


def changed(change: Callable[[nn.Module], object]) -> PreTrainedModel:
    model = llama()
    change(model.model.layers[1].mlp.gate_proj)
    return model


def compiled_inside() -> PreTrainedModel:
    model = llama()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def integers(linear: nn.Module) -> None:
    linear.weight = nn.Parameter(torch.ones(96, 64, dtype=torch.int8), requires_grad=False)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "peft": (lora, "merge_and_unload"),
    "injected": (lambda: lora().get_base_model(), r"layers\.0\.self_attn\.q_proj .*merge_and_unload"),
    "weight_norm": (lambda: changed(parametrizations.weight_norm), r"gate_proj .*remove_parametrizations"),
    "old weight_norm": (lambda: changed(weight_norm), r"gate_proj .*remove_weight_norm"),
    "torch prune": (lambda: changed(lambda m: prune.l1_unstructured(m, "weight", 0.5)), r"prune\.remove"),
    "compiled inside": (compiled_inside, r"layers\.1 is compiled"),
    "quantized": (lambda: changed(integers), r"gate_proj has a weight of int8; .*quantized from"),
    "dynamic": (lambda: torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}), "is a quantized Linear"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_model_with_other_parameters_than_its_class_is_refused_at_once(what: str) -> None:
    """With the module and what to do."""
    make, message = REFUSED[what]
    with pytest.raises(TraceError, match=message):
        trace(make())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapper_that_holds_the_model_whole_is_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = llama()
    program = trace(wrap(model))
    assert program.references["eager"].module is model
    assert program.source is not None
    assert program.source.model_class is LlamaForCausalLM


class Calibrated(Pass):
    """Notes that it ran."""

    name = "calibrated"
    prunes = True

    def __init__(self) -> None:
        self.ran = False

    def call(self, program: Program) -> PassResult:
        self.ran = True
        return PassResult(program, modified=False)


class OwnClass(LlamaForCausalLM):
    """A class that transformers does not map."""


def test_a_class_of_which_no_checkpoint_can_be_loaded_is_pruned_but_not_saved(tmp_path: Path) -> None:
    program = located(llama(OwnClass))
    assert program.source is not None
    assert "OwnClass" in program.source.unsavable
    work = Calibrated()
    with pytest.raises(PreconditionError, match=r"OwnClass.*can be pruned and exported"):
        carry_out(program, [work], out=tmp_path / "slim")
    assert not work.ran
    slim = prune_program(program, "magnitude-units", {"ratio": 0.2})
    exported = build_pass("export_onnx", {"out": str(tmp_path / "onnx")})(slim).program
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    assert exported.results["onnx"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "model"
    llama().save_pretrained(directory)
    (directory / "notes.txt").write_text("mine")
    return directory


LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"  # English that is always there
PLACES = {"the input": "model", "what holds it": ".", "inside it": "model/slim", "a link to it": "link"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("flow", ["prune", "sparse", "budgets", "stream", "export", "save"])
def test_an_output_is_never_an_input(flow: str, place: str, checkpoint: Path) -> None:
    """Overwriting allowed or not, whichever way it is named."""
    from fxprune.flows.wanted import Wanted

    link = checkpoint.parent / "link"
    if not link.exists():
        link.symlink_to(checkpoint)
    out = checkpoint.parent / PLACES[place]
    where = Destination(out, overwrite=True)
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}

    def save() -> None:
        program = trace(llama(), path=checkpoint)
        work = Calibrated()
        try:
            Pipeline([work, build_pass("save", {"out": str(out), "overwrite": True})])(program)
        finally:
            assert not work.ran

    flows: dict[str, Callable[[], object]] = {
        "prune": lambda: done(str(checkpoint), "magnitude-units", {"ratio": 0.2}, where),
        "sparse": lambda: done(str(checkpoint), "magnitude", {"sparsity": 0.5}, where),
        "budgets": lambda: done(str(checkpoint), "magnitude-units", {"ratio": [0.1, 0.2]}, where, Wanted()),
        "stream": lambda: done(
            str(checkpoint), "wanda", {"sparsity": 0.5, "calibration": str(LICENSE)}, where, stream=True
        ),
        "export": lambda: run_export(str(checkpoint), ExportRequest(out, overwrite=True), lambda _: None),
        "save": save,
    }
    with pytest.raises(OutputError, match="the input"):
        flows[flow]()
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before


def bloom() -> PreTrainedModel:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4)).eval()


def test_heads_that_the_class_cannot_save_are_left_out_before_anything_is_calibrated(tmp_path: Path) -> None:
    """BLOOM's ALiBi has a row for each of the dense heads; its MLPs are pruned all the same."""
    program = located(bloom())
    slim = prune_program(program, "magnitude-units", {"ratio": 0.2}, out=tmp_path / "slim")
    assert {group.kind for group in slim.groups} >= {"mlp"}
    assert not [group for group in slim.groups if group.kind == "attention"]
    asked = next(event for event in slim.history if event.name == "ask_savable")
    assert "alibi" in next(iter(asked.details["refused"].values()))
    assert slim.results["checkpoint"]["directory"] == str(tmp_path / "slim")


def test_a_pass_that_is_left_with_nothing_says_why_before_it_works(tmp_path: Path) -> None:
    program = located(bloom())
    step = build_pass("magnitude-units", {"ratio": 0.1, "kinds": ["attention"]})
    with pytest.raises(FxpruneError, match="alibi"):
        carry_out(program, [step], out=tmp_path / "slim")
    assert prune_program(program, "magnitude-units", {"ratio": 0.1, "kinds": ["attention"]}).plan  # not saved: fine


def test_groups_that_the_class_can_save_stay() -> None:
    program = located(llama())
    for uniform in (True, False):
        step = build_pass("magnitude-units", {"ratio": 0.1, "uniform": uniform})
        assert without_unsavable(program, step) is program


def test_asking_leaves_the_model_as_it_is() -> None:
    model = bloom()
    before = copy.deepcopy(model.state_dict())
    program = located(model)
    without_unsavable(program, build_pass("magnitude-units", {"ratio": 0.1}))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
