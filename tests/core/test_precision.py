"""Precision as a dimension: every pruning method on checkpoints in bfloat16, float16 and mixed, down to what is saved.

Tiny models lose more than real ones, and the methods draw labels by probabilities that rounding moves, so that plans
may differ by near ties. What must hold: as much is removed as in float32 (within one step of the widths), and the
divergence from the dense model is at most half as much again, plus 0.05 nats.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM

import fxprune
from fxprune.calibration.distillation import token_kl
from fxprune.calibration.loss_head import LossHead, divergence
from fxprune.calibration.loss_scale import backward, first_scale
from fxprune.calibration.overflow import find_overflow
from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import CalibrationError, NotFiniteError, TrainingError, VerificationError
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.precision import coarsest, is_low, main_dtype
from fxprune.core.widened import Widened
from fxprune.flows.steps import prune_program
from fxprune.flows.streaming_run import prune_streaming
from fxprune.passes.verify import Verify
from fxprune.tracing.trace import trace
from tests.conftest import TINY_LINES
from tests.families import SIZES, build, randomise
from tests.verification.test_ladder import corrupted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fxprune.core.program import Program

LOW = (torch.bfloat16, torch.float16)
SHAPE: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 40, "head_dim": 10, "vocab_size": 97}
LEARNED: dict[str, Any] = {
    "ratio": 0.3, "samples": 12, "seq_len": 12, "held_out": 4, "steps": 4, "batch": 2, "start_samples": 8,
    "fit_samples": 8, "fit_steps": 1, "lora_rank": 2,
}  # fmt: skip
UNITS: dict[str, Any] = {"ratio": 0.25}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("channel", UNITS),
    ("channel", {**UNITS, "criterion": "obs", "swaps": 1}),
    ("channel", {**UNITS, "distil_epochs": 2.0, "steps": 0}),
    ("channel", {**UNITS, "reconstruct": "auto"}),
    ("channel", {**UNITS, "reconstruct": "scale", "steps": 1}),
    ("channel", {**UNITS, "reconstruct": "bias", "steps": 1}),
    ("channel", {**UNITS, "reconstruct": "ridge", "drift": 0.5, "steps": 1}),
    ("fisher", UNITS),
    ("osscar", UNITS),
    ("flap", UNITS),
    ("wanda-sp", UNITS),
    ("taylor", UNITS),
    ("magnitude-units", UNITS),
    ("random", UNITS),
    ("depth", {"ratio": 0.3}),
    ("magnitude", {"sparsity": 0.4}),
    ("wanda", {"sparsity": 0.4, "allocation": "loss"}),
    ("sparsegpt", {"pattern": "2:4"}),
    ("alps", {"sparsity": 0.4, "distil_epochs": 2.0}),
    ("l0", LEARNED),
    ("l0", {**LEARNED, "lora_rank": 0}),
    ("l0", {**LEARNED, "distillation": "plain", "checkpointing": True}),
    ("l0", {**LEARNED, "distillation": "none", "post_steps": 1, "post_loss": "distil"}),
]
WHOLE_WAY = ("channel", "alps", "depth", "l0")
"""Methods that are followed to the reloaded checkpoint, each with its first options."""


def named(case: tuple[str, dict[str, Any]]) -> str:
    shown = {k: v for k, v in case[1].items() if k not in {*LEARNED, "ratio"} or v in {0, "none"}}
    return "-".join([case[0], *(f"{key}={value}" for key, value in shown.items())])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(TINY_LINES * 40))
    return str(path)


@pytest.fixture(scope="module")
def programs(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A located program by family and dtype, loaded as users load checkpoints: frequencies stay in float32."""

    @functools.cache
    def made(family: str, dtype: torch.dtype) -> Program:
        path = tmp_path_factory.mktemp("dense")
        model = build(family, **SHAPE)
        model.save_pretrained(path)
        return located(type(model).from_pretrained(path, dtype=dtype), tiny_tokenizer)

    return made


def located(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Program:
    return Pipeline([build_pass(name, {}) for name in LOCATE])(trace(model.eval(), tokenizer=tokenizer)).program


def logits(program: Program) -> Tensor:
    tokens = torch.arange(3, 67).reshape(4, 16)
    interface = program.interface
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    given["position_ids"] = torch.arange(16).expand(4, 16)
    for entry in interface.cache:
        example = interface.example_inputs[entry.input]
        given[entry.input] = example.new_empty(4, example.shape[1], 0, example.shape[3])
    with torch.no_grad():
        found = program.graph_module(*(given[name] for name in interface.inputs))
    return dict(zip(interface.outputs, found, strict=True))["logits"].float()


def options_of(case: tuple[str, dict[str, Any]], text: str) -> dict[str, Any]:
    return {"calibration": text, "samples": 8, "seq_len": 16, **case[1]}


_FLOAT32: dict[tuple[str, str], tuple[float, float]] = {}


def figures(pruned: Program, dense: Program) -> tuple[float, float]:
    """Removed share and divergence from the dense float32 model."""
    section = pruned.results.get("structured") or pruned.results["sparsity"]
    return section["removed_share"], float(token_kl(logits(pruned), logits(dense)))


@pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", METHODS, ids=named)
def test_a_method_prunes_in_the_precision_that_went_in(
    case: tuple[str, dict[str, Any]], dtype: torch.dtype, programs: Any, text: str, tmp_path: Path
) -> None:
    family = "qwen2" if METHODS.index(case) % 2 else "llama"
    full, program = programs(family, torch.float32), programs(family, dtype)
    name, options = case[0], options_of(case, text)
    key = family, named(case)
    if key not in _FLOAT32:
        pruned = build_pass(name, options)(full).program
        if name == "depth":  # the only method that leaves the graph to the mask that follows
            pruned = build_pass("insert_masks", {})(pruned).program
        _FLOAT32[key] = figures(pruned, full)
    whole = name in WHOLE_WAY and case == next(one for one in METHODS if one[0] == name)
    out = tmp_path / "slim" if whole else None
    before = {key: value.clone() for key, value in program.graph_module.state_dict().items()}
    found = prune_program(program, name, options, out=out)
    assert all(rung["passed"] for rung in found.results["verify"])
    assert {p.dtype for p in found.graph_module.parameters()} == {dtype}
    assert all(torch.equal(value, before[key]) for key, value in program.graph_module.state_dict().items())
    (share, loss), (wanted_share, wanted_loss) = figures(found, full), _FLOAT32[key]
    assert share == pytest.approx(wanted_share, abs=0.1)
    assert loss <= 1.5 * wanted_loss + 0.05
    if out is not None:
        assert {rung["rung"] for rung in found.results["verify"]} >= {"reloaded checkpoint = slim"}
        slim = fxprune.load(out)
        state = {key: value for key, value in found.graph_module.state_dict().items() if key in slim.state_dict()}
        assert state
        for key, value in slim.state_dict().items():
            assert value.dtype is dtype
            if key in state and state[key].shape == value.shape:
                assert torch.equal(value, state[key])


def test_self_calibration_runs_in_lower_precision(programs: Any) -> None:
    program = programs("llama", torch.bfloat16)
    found = build_pass("channel", {"ratio": 0.25, "samples": 8, "seq_len": 12})(program).program
    assert found.results["calibration"]["source"] == "self"


@pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
def test_a_checkpoint_is_streamed_in_its_precision(
    dtype: torch.dtype, tiny_tokenizer: PreTrainedTokenizerBase, text: str, tmp_path: Path
) -> None:
    build("llama", **SHAPE).to(dtype).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    method: Any = build_pass("wanda", {"sparsity": 0.5, "calibration": text, "samples": 8, "seq_len": 16})
    prune_streaming(tmp_path / "dense", tmp_path / "sparse", method)
    assert {p.dtype for p in fxprune.load(tmp_path / "sparse").parameters()} == {dtype}


def test_signals_on_disk_are_found_again(programs: Any, text: str, tmp_path: Path) -> None:
    options = {"ratio": 0.25, "calibration": text, "samples": 8, "seq_len": 16, "signals": str(tmp_path)}
    first, again = (build_pass("channel", options)(programs("llama", torch.bfloat16)).program for _ in range(2))
    assert "signals_read_from" in again.results["structured"]
    assert first.plan == again.plan


# ---- mixed models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["channel", "alps"])
def test_norms_in_float32_come_out_in_float32(
    method: str, tiny_tokenizer: PreTrainedTokenizerBase, text: str, tmp_path: Path
) -> None:
    """Gemma computes its norms in float32 whatever their dtype; its scale of embeddings is rounded to the weights'."""
    model = GemmaForCausalLM(GemmaConfig(**(SIZES | SHAPE)))
    randomise(model)
    model.save_pretrained(tmp_path / "dense")
    model = GemmaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    options = {"calibration": text, "samples": 8, "seq_len": 16}
    options |= {"ratio": 0.25} if method == "channel" else {"sparsity": 0.4, "distil_epochs": 2.0}
    prune_program(located(model, tiny_tokenizer), method, options, out=tmp_path / "slim")
    assert {n: p.dtype for n, p in fxprune.load(tmp_path / "slim").named_parameters()} == dtypes


def test_the_coarsest_dtype_and_that_of_most_weights() -> None:
    tensors = [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(9, dtype=torch.int64)]
    assert coarsest(tensors) is torch.bfloat16
    assert main_dtype(tensors) is torch.float32
    assert coarsest([]) is main_dtype([]) is torch.float32
    assert [is_low(d) for d in (torch.float64, torch.float32, *LOW)] == [False, False, True, True]


# ---- what is computed inside ---------------------------------------------------------------------------------------


def test_a_widened_graph_is_the_graph_of_widened_weights(programs: Any) -> None:
    low = programs("qwen2", torch.bfloat16)
    wide = low.references["eager"].module
    tokens = torch.arange(3, 35).reshape(2, 16)
    mask = torch.ones_like(tokens)
    given = {"input_ids": tokens, "attention_mask": mask, "position_ids": torch.arange(16).expand(2, 16)}
    for entry in low.interface.cache:
        example = low.interface.example_inputs[entry.input]
        given[entry.input] = example.new_empty(2, example.shape[1], 0, example.shape[3])
    with torch.no_grad():
        found = Widened(low.graph_module)(*(given[name] for name in low.interface.inputs))
        wanted = copy.deepcopy(wide).float()(input_ids=tokens, attention_mask=mask).logits
    assert found[0].dtype is torch.float32
    torch.testing.assert_close(found[list(low.interface.outputs).index("logits")], wanted, rtol=1e-4, atol=1e-4)
    assert {p.dtype for p in low.graph_module.parameters()} == {torch.bfloat16}


def test_logits_that_are_measured_are_not_rounded(programs: Any) -> None:
    head = LossHead(programs("llama", torch.bfloat16))
    states = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    weight = programs("llama", torch.bfloat16).graph_module.get_parameter("lm_head.weight").float()
    found = head.logits(states)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, states @ weight.t())
    assert divergence(head, states[None], states[None]) == 0.0


def test_verification_finds_in_bfloat16_what_a_fixed_tolerance_let_pass(programs: Any) -> None:
    """One weight is changed by what moves the logits less than 200 roundoffs, which was the tolerance."""
    options = {"ratio": 0.25}
    pruned = build_pass("magnitude-units", options)(programs("llama", torch.bfloat16)).program
    slim = Pipeline([build_pass("insert_masks", {}), build_pass("slim", {})])(pruned).program
    wrong = corrupted(slim, "model.layers.0.mlp.down_proj", 0.25)
    with pytest.raises(VerificationError, match=r"slim = masked does not hold: max abs error (0\.|1\.[0-4])"):
        Verify(reexport=False)(wrong)


def test_a_mean_over_many_tokens_does_not_vanish_in_float16() -> None:
    """Gradients of 4096 tokens' mean lie below what float16 can hold; scaled they do not."""
    generator = torch.Generator().manual_seed(0)
    rows, adapter = torch.randn(4096, 8, generator=generator).half(), nn.Parameter(torch.zeros(8, 4))
    weight = torch.randn(4, 50, generator=generator)
    teacher = torch.randn(4096, 50, generator=generator) * 1e-3

    def loss(dtype: torch.dtype) -> Tensor:
        return token_kl((rows.to(dtype) @ adapter.to(dtype)) @ weight.to(dtype), teacher.to(dtype))

    found = []
    for dtype in (torch.float32, torch.float16):
        adapter.grad = None
        assert backward(loss(dtype), [adapter], dtype, 4096)
        assert adapter.grad is not None
        found.append(adapter.grad.clone())
    adapter.grad = None
    loss(torch.float16).backward()  # type: ignore[no-untyped-call]
    assert adapter.grad is not None
    errors = [float((one - found[0]).norm() / found[0].norm()) for one in (found[1], adapter.grad)]
    assert errors[0] < 0.01
    assert errors[1] > 5 * errors[0]


def test_a_scale_that_overflows_is_halved_until_it_does_not() -> None:
    weight = nn.Parameter(torch.tensor([1000.0]))
    assert backward((weight.half().float() * 3).sum(), [weight], torch.float16, 1024)
    assert weight.grad is not None
    assert float(weight.grad) == 3
    assert first_scale(1024) == 64 * 1024
    weight.grad = None
    assert not backward((weight * float("inf")).sum(), [weight], torch.float16, 1024)


# ---- overflow ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing(tiny_tokenizer: PreTrainedTokenizerBase) -> Program:
    """In float16; gate and up projection of the second layer are so large that their product is infinite."""
    model = build("llama", **SHAPE)
    with torch.no_grad():
        for projection in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            projection.weight.mul_(3000)
    return located(model.half(), tiny_tokenizer)


@pytest.mark.parametrize(
    "case",
    [("channel", UNITS), ("channel", {**UNITS, "calibration": "self"}), ("flap", UNITS), ("osscar", UNITS),
     ("depth", {"ratio": 0.3}), ("sparsegpt", {"sparsity": 0.5}), ("wanda", {"allocation": "loss"}),
     ("l0", LEARNED), ("l0", {**LEARNED, "warm_start": False}), ("magnitude-units", UNITS), ("magnitude", {})],
    ids=named,
)  # fmt: skip
def test_an_overflow_is_named_with_its_module(
    case: tuple[str, dict[str, Any]], overflowing: Program, text: str
) -> None:
    said = r"model\.layers\.1\.mlp \(mul\) overflows float16, .*: load the model with dtype=bfloat16 or float32"
    with pytest.raises(NotFiniteError, match=said):
        prune_program(overflowing, case[0], options_of(case, text))


def test_an_overflow_is_an_error_of_calibration_and_of_training() -> None:
    assert issubclass(NotFiniteError, CalibrationError)
    assert issubclass(NotFiniteError, TrainingError)


def test_where_nothing_overflows_nothing_is_found(programs: Any) -> None:
    tokens = torch.arange(3, 35).reshape(2, 16)
    assert find_overflow(programs("llama", torch.float16), tokens) is None


def test_a_weight_that_is_nan_is_a_damaged_checkpoint(programs: Any, text: str) -> None:
    wrong = corrupted(programs("llama", torch.float32), "model.layers.0.mlp.up_proj", float("nan"))
    with pytest.raises(NotFiniteError, match=r"model\.layers\.0\.mlp\.up_proj has weights that are NaN"):
        build_pass("wanda-sp", {**UNITS, "calibration": text, "samples": 4, "seq_len": 16})(wrong)
