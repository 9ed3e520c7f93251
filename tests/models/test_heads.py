"""Every head on the command line: classifiers, reward models, encoders, encoder-decoders, vision transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    LlamaConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
)

import fxprune
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import CheckpointError
from fxprune.models.loading import load_config
from fxprune.models.model_class import class_of_config
from tests.commands import run_command

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Run = Callable[..., tuple[int, str, str]]

BERT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 3,
}
LLAMA: dict[str, Any] = {**BERT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
T5: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 3,
    "decoder_start_token_id": 3,
    "eos_token_id": 2,
}
VIT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "classifier": ("LlamaForSequenceClassification", lambda: LlamaConfig(**LLAMA, num_labels=3)),
    "reward": ("LlamaForSequenceClassification", lambda: LlamaConfig(**LLAMA, num_labels=1)),
    "decoder": ("Qwen3Model", lambda: Qwen3Config(**LLAMA, head_dim=16)),
    "tokens": ("BertForTokenClassification", lambda: BertConfig(**BERT, num_labels=5)),
    "masked": ("BertForMaskedLM", lambda: BertConfig(**BERT)),
    "answers": ("BertForQuestionAnswering", lambda: BertConfig(**BERT)),
    "t5": ("T5ForConditionalGeneration", lambda: T5Config(**T5)),
    "vit": ("ViTForImageClassification", lambda: ViTConfig(**VIT)),
}
HEADS = {
    "classifier": "score.weight",
    "reward": "score.weight",
    "tokens": "classifier.weight",
    "masked": "cls.predictions.transform.dense.weight",
    "answers": "qa_outputs.weight",
    "t5": "lm_head.weight",
    "vit": "classifier.weight",
}
NO_TEXT = "prune with one of magnitude, random"
NO_LOSS = "prune with one of flap, magnitude, osscar, random, wanda-sp"


def built(name: str) -> PreTrainedModel:
    """A tiny model of which nothing is an identity."""
    kind, config = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, kind)(config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def directory(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase
) -> Callable[[str], Path]:
    """The directory of a tiny model, as transformers saves it; read-only."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            built(name).save_pretrained(made[name])
            if name == "vit":
                (made[name] / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
            else:
                tiny_tokenizer.save_pretrained(made[name])
        return made[name]

    return of


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; gives exit status, standard output, standard error."""

    def command(*args: object) -> tuple[int, str, str]:
        return run_command(monkeypatch, capsys, *args)

    return command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the compiler traces a model to a graph and finds which weights belong together. " * 60)
    return path


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """One sequence of another length than any that verification uses, or an image."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
    ids = torch.arange(5, 14).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    )


@pytest.mark.parametrize("name", ["classifier", "decoder", "tokens", "masked", "t5", "vit"])
def test_the_whole_way(run: Run, directory: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """Inspect, prune, reload, export and verify: the class is the one that config.json names, the head is as it was."""
    kind, dense = MODELS[name][0], directory(name)
    status, shown, err = run("inspect", dense)
    assert status == 0, err
    assert f"({kind})" in shown
    slim, onnx = tmp_path / "slim", tmp_path / "onnx"
    # The others have no field for their heads' width, and T5 one table of position biases for the heads of all layers.
    kinds = () if name in {"classifier", "decoder"} else ("--option", "kinds=mlp")
    options = ("--method", "magnitude", "--ratio", 0.2, "--uniform", *kinds)
    status, shown, err = run("prune", dense, *options, "--out", slim)
    assert status == 0, err
    assert kind in shown
    report = json.loads((slim / "report.json").read_text())
    assert report["model_class"] == kind
    assert kind in (slim / "report.html").read_text()
    assert "quality" not in report
    assert report["params"]["slim"] < report["params"]["dense"]
    rungs = {rung["rung"]: rung for rung in report["verify"]}
    assert {"traced = eager", "slim = masked", "reloaded checkpoint = slim"} <= rungs.keys()
    assert all(rung["passed"] and rung["cases"] == (3 if name == "vit" else 4) for rung in rungs.values())
    model, before = fxprune.load(slim), built(name)
    assert type(model).__name__ == kind
    assert type(load_model(slim).model) is type(model)
    if name in HEADS:
        assert torch.equal(model.state_dict()[HEADS[name]], before.state_dict()[HEADS[name]])
    assert report["details"]["checkpoint"]["kind"] == "uniform"
    assert (slim / "preprocessor_config.json").is_file() == (name == "vit")
    assert f"{kind}.from_pretrained(" in (slim / "README.md").read_text()
    plain = getattr(transformers, kind).from_pretrained(slim).eval()
    with torch.no_grad():
        given, expected = model(**inputs_of(model))[0], plain(**inputs_of(model))[0]
    assert torch.equal(given, expected)
    status, _, err = run("export", slim, "--out", onnx)
    assert status == 0, err
    status, shown, err = run("verify", slim, onnx)
    assert status == 0, err
    assert "ONNX Runtime = slim" in shown
    described = json.loads((onnx / "export.json").read_text())
    assert (described["model_class"], described["language_model"]) == (kind, False)


CALIBRATED = [
    ("reward", "wanda-sp", "ratio"),
    ("masked", "flap", "ratio"),
    ("decoder", "osscar", "ratio"),
    ("tokens", "sparsegpt", "sparsity"),
    ("t5", "wanda", "sparsity"),
]


@pytest.mark.parametrize(("name", "method", "target"), CALIBRATED)
def test_methods_that_read_activations_calibrate_on_text(
    run: Run, directory: Callable[[str], Path], text: Path, tmp_path: Path, name: str, method: str, target: str
) -> None:
    out = tmp_path / "out"
    status, _, err = run(
        "prune" if target == "ratio" else "sparsify", directory(name), "--method", method, f"--{target}", 0.2,
        "--out", out, "--calibration", text, "--samples", 12, "--seq-len", 16,
    )  # fmt: skip
    assert status == 0, err
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"]["tokens"] == 12 * 16
    assert all(rung["passed"] for rung in report["verify"])
    assert {"quality", "guard"}.isdisjoint(report)
    model, head = fxprune.load(out), HEADS.get(name)
    if head is not None:
        assert torch.equal(model.state_dict()[head], built(name).state_dict()[head])


def test_zeros_need_no_text_and_leave_the_head_dense(
    run: Run, directory: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("reward", "vit", "answers"):
        out = tmp_path / name
        status, _, err = run("sparsify", directory(name), "--method", "magnitude", "--sparsity", 0.5, "--out", out)
        assert status == 0, err
        state = fxprune.load(out).state_dict()
        assert bool((state[HEADS[name]] != 0).all())
        assert (
            f"{HEADS[name].rpartition('.')[0]}"
            in json.loads((out / "report.json").read_text())["sparsity"]["dense_linears"]
        )


REFUSED: list[tuple[str, tuple[object, ...], str]] = [
    *(
        (name, ("prune", "--method", method, "--ratio", 0.2), f"{method} reads the loss of a language model.*{NO_LOSS}")
        for name, method in (("reward", "channel"), ("masked", "fisher"), ("t5", "taylor"), ("tokens", "depth"))
    ),
    ("decoder", ("learn", "--ratio", 0.2), f"l0 reads the loss.*Qwen3Model does not.*{NO_LOSS}"),
    ("vit", ("prune", "--ratio", 0.2), f"channel reads the loss.*use fxprune {NO_TEXT}$"),
    ("vit", ("prune", "--method", "wanda-sp", "--ratio", 0.2), f"reads pixel_values: use fxprune {NO_TEXT}$"),
    ("vit", ("sparsify", "--method", "wanda"), "reads pixel_values: use fxprune sparsify with one of magnitude$"),
    ("vit", ("prune", "--method", "magnitude", "--ratio", 0.2, "--option", "reconstruct=bias"), "reads pixel_values"),
    (
        "reward",
        ("sparsify", "--method", "wanda", "--sparsity", 0.5, "--option", "distil_epochs=1"),
        "distil_epochs of wanda reads the loss",
    ),
    (
        "reward",
        ("sparsify", "--method", "wanda", "--sparsity", 0.5, "--option", "allocation=loss"),
        "allocation=loss of wanda",
    ),
    ("masked", ("prune", "--method", "wanda-sp", "--ratio", 0.2), "writes none that could be sampled.*--calibration"),
    ("masked", ("prune", "--method", "wanda-sp", "--ratio", "0.1,0.2"), "writes none that could be sampled"),
    ("reward", ("prune", "--method", "magnitude", "--ratio", 0.2, "--ppl", "python"), "--ppl needs a language model"),
    ("reward", ("prune", "--method", "magnitude", "--ratio", 0.2, "--measure-speed"), "--measure-speed needs a"),
    ("reward", ("export", "--to", "genai"), "--to genai needs a language model.*export it to onnx"),
    ("masked", ("export", "--int4"), "--int4 needs a language model"),
]


@pytest.mark.parametrize(("name", "command", "message"), REFUSED)
def test_what_a_head_cannot_do_is_refused_before_any_work(
    run: Run,
    directory: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    command: tuple[object, ...],
    message: str,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    for module in ("steps", "exporting"):
        monkeypatch.setattr(f"fxprune.flows.{module}.load_model", load)
    out = tmp_path / "out"
    status, _, err = run(command[0], directory(name), *command[1:], "--out", out)
    assert status in {1, 2}
    assert re.search(message, " ".join(err.split())), err
    assert not out.exists()


def test_figures_of_text_are_refused_by_name(run: Run, directory: Callable[[str], Path], text: Path) -> None:
    status, _, err = run("eval", directory("masked"), "--ppl", text)
    assert status == 2
    assert "evaluation on text or tasks needs a language model" in err
    assert "BertForMaskedLM" in err
    status, _, err = run("compare", directory("masked"), directory("reward"), "--ppl", text)
    assert status == 2
    status, _, err = run("bench", directory("masked"), directory("tokens"))
    assert status == 2
    assert "--decode 0" in err
    status, _, err = run("bench", directory("vit"), directory("vit"), "--decode", 0)
    assert status == 2
    assert "ViTForImageClassification reads pixel_values" in err


def test_forward_passes_are_timed(run: Run, directory: Callable[[str], Path], tmp_path: Path) -> None:
    """In torch, and in ONNX Runtime from a checkpoint and from an export."""
    onnx, data = tmp_path / "onnx", tmp_path / "bench.json"
    assert run("export", directory("masked"), "--out", onnx)[0] == 0
    common = ("--decode", 0, "--prefill", 8, "--repeats", 2, "--no-footprint", "--json", data)
    status, _, err = run("bench", directory("t5"), directory("masked"), *common)
    assert status == 0, err
    assert [entry["case"] for entry in json.loads(data.read_text())["speed"]] == ["prefill-8"]
    status, _, err = run("bench", directory("masked"), onnx, "--runtime", "onnxruntime", *common)
    assert status == 0, err
    (entry,) = json.loads(data.read_text())["speed"]
    assert entry["runtime"] == "onnxruntime"
    assert entry["bound"] == 1.0


def test_streaming_a_classifier_gives_what_memory_gives(
    run: Run, directory: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    states = []
    for more in ((), ("--stream",)):
        out = tmp_path / f"out{len(more)}"
        status, _, err = run(
            "sparsify", directory("classifier"), "--method", "wanda", "--sparsity", 0.5, "--out", out,
            "--calibration", text, "--samples", 8, "--seq-len", 16, *more,
        )  # fmt: skip
        assert status == 0, err
        model = fxprune.load(out)
        assert type(model).__name__ == "LlamaForSequenceClassification"
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_pipeline_runs_on_a_classifier(run: Run, directory: Callable[[str], Path], tmp_path: Path) -> None:
    steps = ["lift_linears", "locate_attention", "locate_mlp", {"magnitude-units": {"ratio": 0.2}}, "insert_masks"]
    pipeline, out = tmp_path / "pipeline.yaml", tmp_path / "report.json"
    pipeline.write_text(json.dumps({"passes": [*steps, "slim", "verify"]}))
    status, _, err = run("run", pipeline, "--model", directory("classifier"), "--json", out)
    assert status == 0, err
    assert json.loads(out.read_text())["model_class"] == "LlamaForSequenceClassification"
    pipeline.write_text(json.dumps({"passes": ["lift_linears", {"channel": {"ratio": 0.2}}]}))
    status, _, err = run("run", pipeline, "--model", directory("classifier"))
    assert status == 1
    assert "channel reads the loss of a language model" in err


def changed(source: Path, target: Path, **values: Any) -> Path:
    """A copy of a directory with fields of config.json changed; None removes one."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config = {key: value for key, value in {**config, **values}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_weights_of_another_head_are_named(
    tiny_llama_dir: Path, directory: Callable[[str], Path], tmp_path: Path
) -> None:
    wrong = changed(tiny_llama_dir, tmp_path / "wrong", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"score\.weight; .* names LlamaForSequenceClassification, .* another"):
        load_model(wrong)
    none = changed(directory("classifier"), tmp_path / "none", architectures=None)
    with pytest.raises(CheckpointError, match=r"score\.weight stand instead; .* names no class, .*LlamaForCausalLM"):
        load_model(none)
    old = changed(tiny_llama_dir, tmp_path / "old", architectures=["LLaMAForCausalLM"])
    assert type(load_model(old).model).__name__ == "LlamaForCausalLM"
    unknown = changed(tiny_llama_dir, tmp_path / "unknown", architectures=["LlamaForNothing"])
    with pytest.raises(CheckpointError, match="names the class LlamaForNothing"):
        load_model(unknown)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("classifier", "LlamaForCausalLM"), ("tokens", "BertLMHeadModel"), ("t5", "T5ForConditionalGeneration"),
     ("vit", "ViTForImageClassification")],
)  # fmt: skip
def test_a_configuration_without_a_class_has_the_first_that_fits(
    directory: Callable[[str], Path], tmp_path: Path, name: str, expected: str
) -> None:
    config = load_config(changed(directory(name), tmp_path / "none", architectures=None))
    assert class_of_config(config).__name__ == expected
