"""The command line: what users type, what it writes, and how it refuses."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fxprune
from fxprune.calibration.text import CalibrationSpec, calibration_set
from fxprune.cli import main as cli
from fxprune.models.loading import load_tokenizer
from tests.commands import run_command

Run = Callable[..., tuple[int, str, str]]


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


PRUNE = ("--samples", 12, "--seq-len", 16, "--seed", 1)


def test_prune_writes_a_checkpoint_that_loads_and_a_report(
    run: Run, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "slim"
    status, shown, err = run("prune", tiny_llama_dir, "--ratio", 0.3, "--out", out, "--calibration", text, *PRUNE)
    assert status == 0, err
    assert "parameters" in shown
    report = json.loads((out / "report.json").read_text())
    assert abs(report["params"]["removed_share_blocks"] - 0.3) < 0.015  # half a step of 8 channels
    assert all(rung["passed"] for rung in report["verify"])
    assert {"traced = eager", "slim = masked", "reloaded checkpoint = slim"} <= {r["rung"] for r in report["verify"]}
    assert (out / "report.html").stat().st_size > 10_000
    model = fxprune.load(out)
    # a class whose config adds biases to all its Linears at once may carry some that are zero
    size = sum(p.numel() for p in model.parameters())
    assert report["params"]["slim"] <= size < report["params"]["dense"]


@pytest.fixture
def chats(tiny_llama_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny Llama with a chat template, and records with chats for it."""
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "chat-model"))
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    rows = [
        {
            "id": f"identity_{number:05}",
            "conversations": [
                {"from": "human", "value": f"which {number}"},
                {"from": "gpt", "value": "the small graph"},
            ],
            "notes": f"heads and channels {number} " * 4,
        }
        for number in range(60)
    ]
    records = tmp_path / "chats.jsonl"
    records.write_text("\n".join(json.dumps(row) for row in rows))
    return model, records


@pytest.mark.parametrize(
    "how",
    [
        ("prune", "--ratio", 0.3),
        ("sparsify", "--method", "wanda", "--sparsity", 0.5),
        ("sparsify", "--method", "wanda", "--sparsity", 0.5, "--stream"),
    ],
)
def test_chats_calibrate_as_the_model_reads_them(
    run: Run, chats: tuple[Path, Path], tmp_path: Path, how: tuple[object, ...]
) -> None:
    """The command line and Python read the same tokens, and the report shows how they begin."""
    (model, records), out = chats, tmp_path / "slim"
    verb, *how = how
    status, _, err = run(verb, model, *how, "--out", out, "--calibration", records, *PRUNE)
    assert status == 0, err
    described = json.loads((out / "report.json").read_text())["calibration"]
    assert described["field"] == "conversations"
    assert "</s>" in described["begins"]
    shown = html.unescape((out / "report.html").read_text())
    assert json.dumps(described["begins"], ensure_ascii=False) in shown
    spec = CalibrationSpec(str(records), samples=12, seq_len=16, seed=1)
    made = calibration_set(spec, tokenizer=load_tokenizer(model))
    assert described == made.description
    status, _, err = run(
        verb, model, *how, "--out", out, "--overwrite", "--calibration", records, "--text-field", "notes", *PRUNE
    )
    assert status == 0, err
    described = json.loads((out / "report.json").read_text())["calibration"]
    assert described["field"] == "notes"
    assert "heads" in described["begins"]


def test_records_that_are_not_clear_are_told_before_the_model_is_loaded(run: Run, tmp_path: Path) -> None:
    records = tmp_path / "pages.jsonl"
    records.write_text('{"id": "0001", "page": "heads and channels"}\n')
    given = (tmp_path / "no-model", "--out", tmp_path / "slim", "--calibration", records)
    for verb, *how in (("prune", "--ratio", 0.3), ("sparsify", "--method", "wanda", "--sparsity", 0.5)):
        status, _, err = run(verb, *given, *how)
        assert status == 1
        assert "fields 'id', 'page' to read is not clear" in err
        assert "--text-field" in err
        status, _, err = run(verb, *given, *how, "--text-field", "pages")
        assert status == 1
        assert "no field 'pages'; the record has 'id', 'page'" in err
    status, _, err = run(
        "prune", tmp_path / "no-model", "--out", tmp_path / "s", "--ratio", 0.3, "--text-field", "page"
    )
    assert status == 2
    assert "names a field of calibration records" in err


def test_uniform_prune_loads_with_plain_transformers_and_generates_the_same_text(
    run: Run, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "slim"
    status, _, err = run(
        "prune", tiny_llama_dir, "--ratio", 0.25, "--uniform", "--out", out,
        "--calibration", text, *PRUNE,
    )  # fmt: skip
    assert status == 0, err
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(5, 15).unsqueeze(0)
    ours = fxprune.load(out).generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain.generate(ids, max_new_tokens=8, do_sample=False), ours)


@pytest.mark.parametrize("ratio", ["0", "1", "-0.1", "1.5", "nan"])
def test_a_ratio_out_of_range_is_a_usage_error(run: Run, ratio: str, tmp_path: Path) -> None:
    status, _, err = run("prune", "nowhere", "--ratio", ratio, "--out", tmp_path / "x")
    assert status == 2
    assert "between 0 and 1" in err


def test_a_ratio_that_no_plan_reaches_says_what_can_be_reached(
    run: Run, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "slim"
    status, _, err = run("prune", tiny_llama_dir, "--ratio", 0.97, "--out", out, "--calibration", text, *PRUNE)
    assert status == 1
    assert "the best reachable is" in err
    assert not out.exists()


def zeros(model: torch.nn.Module) -> dict[str, float]:
    """Share of zeros of every Linear but the output projection."""
    return {
        name: float((module.weight == 0).float().mean())
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


@pytest.mark.smoke
def test_prune_sets_weights_to_zero_and_says_what_that_buys(
    run: Run, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sparse"
    status, shown, err = run(
        "sparsify", tiny_llama_dir, "--method", "wanda", "--sparsity", 0.5, "--out", out,
        "--calibration", text, *PRUNE, "--option", "distil_epochs=2", "--option", "distil_rate=0.01",
    )  # fmt: skip
    assert status == 0, err
    assert "wanda, 0.5; zeros: 50.0% of" in shown
    assert "ONNX Runtime" in shown
    assert set(zeros(AutoModelForCausalLM.from_pretrained(out)).values()) == {0.5}
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == report["sparsity"]["method"] == "wanda"
    assert report["sparsity"]["dense_linears"] == ["lm_head"]
    distilled = report["sparsity"]["distilled"]
    assert distilled["steps"] > 1
    assert distilled["kept"] == (distilled["after"] < distilled["before"])
    assert {"calibrate", "prune", "verify", "save"} <= set(report["seconds"])
    assert all(rung["passed"] for rung in report["verify"])
    assert "reloaded checkpoint = slim" in {rung["rung"] for rung in report["verify"]}
    assert {"params", "groups"}.isdisjoint(report)
    assert 'id="sparsity"' in (out / "report.html").read_text()


def test_prune_streams_what_it_would_prune_in_memory(
    run: Run, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    command = (
        "sparsify", tiny_llama_dir, "--pattern", "2:4", "--exclude", "*.o_proj",
        "--option", "per_module=*.down_proj=1:4", "--calibration", text, *PRUNE,
    )  # fmt: skip
    models = []
    for name, more in (("memory", ()), ("streamed", ("--stream",))):
        out = tmp_path / name
        status, _, err = run(*command, "--out", out, *more)
        assert status == 0, err
        models.append(AutoModelForCausalLM.from_pretrained(out))
        sparsity = json.loads((out / "report.json").read_text())["sparsity"]
        assert sparsity["target"] == "2:4"
        assert sparsity["pruned_linears"] == 12
        assert (out / "report.html").is_file()
    assert "block 2 of 2" in err
    found = zeros(models[1])
    for name, share in found.items():
        assert share == {"o_proj": 0, "down_proj": 0.75}.get(name.rpartition(".")[2], 0.5), name
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("prune", "--method", "wanda", "--ratio", "0.3"), "wanda is no method of prune: use fxprune sparsify"),
        (("prune", "--method", "l0", "--ratio", "0.3"), "l0 is no method of prune: use fxprune learn"),
        (("sparsify", "--method", "channel"), "channel is no method of sparsify: use fxprune prune"),
        (("sparsify", "--method", "wanda", "--option", "ratio=0.3"), "unknown option 'ratio'"),
        (("sparsify", "--method", "wanda", "--sparsity", "0.5", "--pattern", "2:4"), "either a sparsity or a pattern"),
        (("sparsify", "--method", "wanda", "--sparsity", "1"), "less than 1"),
        (("sparsify", "--method", "wanda", "--sparsity", "-0.5"), "less than 1"),
        (("sparsify", "--method", "wanda", "--pattern", "2-4"), "neither a share"),
        (("sparsify", "--method", "wanda", "--pattern", "4:2"), ""),
        (("sparsify", "--method", "wanda", "--option", "allocation=random"), "allocation"),
        (("sparsify", "--method", "wanda", "--option", "per_module=*.q_proj"), "PATTERN=VALUE"),
        (("sparsify", "--method", "wanda", "--option", "per_module=*.q_proj=many"), "neither a share"),
        (("sparsify", "--method", "wanda", "--option", "uniform=true"), "uniform"),
        (("sparsify", "--method", "wanda", "--option", "round_to=4"), "round_to"),
        (("prune", "--ratio", "0.2", "--option", "sparsity=0.5"), "unknown option 'sparsity'"),
        (("prune", "--ratio", "0.2", "--option", "pattern=2:4"), "unknown option 'pattern'"),
        (("prune",), "ratio"),
        (("prune", "--ratio", "0.2", "--option", "stream=true"), "unknown option 'stream'"),
        (("prune", "--ratio", "0.2", "--option", "seed=2"), "--option seed=2: write --seed 2"),
        (("sparsify", "--option", "stream=true"), "write --stream, which is a flag"),
        (("sparsify", "--ratio", "0.2"), "--sparsity or --pattern"),
        (("prune", "--ratio", "0.2", "--json", "/nowhere/x.json"), "there is no directory /nowhere"),
        (("prune", "--method", "magnitude", "--ratio", "0.2", "--samples", "9"), "reads no calibration text"),
        (("sparsify", "--method", "magnitude", "--calibration", "t.txt"), "leave calibration out"),
        (("sparsify", "--method", "wanda", "--stream", "--calibration", "t.txt", "--measure-speed"), "never holds"),
        (("sparsify", "--method", "magnitude", "--stream"), "needs no calibration"),
        (("sparsify", "--method", "wanda", "--stream"), "name a text file"),
        (("sparsify", "--stream", "--calibration", "t.txt", "--dtype", "float32"), "leave --dtype out"),
        (("sparsify", "--stream", "--calibration", "t.txt", "--option", "allocation=loss"), "uniform"),
        (("prune", "--sparsity", "0.5"), "--sparsity: it is an option of fxprune sparsify"),
        (("prune", "--ratio", "0.2", "--keep", "*.mlp=0.5"), "--keep: write --option keep=VALUE"),
        (("prune", "--ratio", "0.2", "--lora-targets", "q_proj"), "--option lora_targets=VALUE of fxprune learn"),
    ],
)
def test_options_that_do_not_go_together_are_a_usage_error(
    run: Run, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    verb, *more = options
    status, _, err = run(verb, "nowhere", "--out", tmp_path / "x", *more)
    assert status == 2, err
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_empty_is_kept(run: Run, tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    status, _, err = run("prune", tiny_llama_dir, "--ratio", 0.2, "--out", out)
    assert status == 1
    assert str(out) in err
    assert (out / "precious.txt").read_text() == "mine"


def test_a_missing_model_is_told_by_its_path(run: Run, tmp_path: Path) -> None:
    status, _, err = run("inspect", tmp_path / "missing")
    assert status == 1
    assert "missing" in err


@pytest.mark.smoke
def test_inspect_needs_only_a_config(run: Run, tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    figures = tmp_path / "inspect.json"
    status, out, err = run("inspect", tmp_path, "--json", figures)
    assert status == 0, err
    assert "6 query heads on 2 KV heads of 10" in out
    data = json.loads(figures.read_text())
    assert {(g["kind"], g["dense"]) for g in data["groups"]} == {
        ("attention", 6),
        ("mlp", 80),
        ("hidden", 48),
        ("layers", 2),
    }
    assert any("looked up by index" in pin["reason"] for pin in data["pins"])


@pytest.mark.smoke
def test_eval_prints_the_perplexity_and_its_definition(
    run: Run, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "eval.json"
    status, out, err = run("eval", tiny_llama_dir, "--ppl", text, "--window", 32, "--windows", 4, "--json", figures)
    assert status == 0, err
    entry = json.loads(figures.read_text())["perplexity"][0]
    assert entry["windows"] == 4
    assert f"{entry['perplexity']:.2f}" in out
    assert 50 < entry["perplexity"] < 200  # a random model of 97 tokens


def test_eval_on_a_device_that_is_not_there_is_a_usage_error(run: Run, tiny_llama_dir: Path, text: Path) -> None:
    status, _, err = run("eval", tiny_llama_dir, "--ppl", text, "--device", "nowhere")
    assert status == 2
    assert "device nowhere cannot be used here" in err


@pytest.mark.smoke
def test_run_executes_a_pipeline(run: Run, tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    pipeline, records = tmp_path / "pipeline.yaml", tmp_path / "pages.jsonl"
    records.write_text(json.dumps({"id": "0001", "page": text.read_text()}) + "\n")
    pipeline.write_text(
        f"""
model: {tiny_llama_dir}
passes:
  - lift_linears
  - locate_mlp
  - channel: {{ratio: 0.2, calibration: {records}, text_field: page, samples: 12, seq_len: 16}}
  - insert_masks
  - slim
  - verify: {{reexport: false}}
  - save: {{out: {tmp_path / "slim"}}}
"""
    )
    status, _, err = run("run", pipeline)
    assert status == 0, err
    assert fxprune.load(tmp_path / "slim").config.model_type == "llama"


def test_run_names_the_nearest_pass_and_option(run: Run, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text("model: nowhere\npasses: [lift_linear]\n")
    status, _, err = run("run", pipeline)
    assert status == 1
    assert "lift_linears" in err
    pipeline.write_text("model: nowhere\npasses: [{channel: {ratoi: 0.2}}]\n")
    status, _, err = run("run", pipeline)
    assert status == 2
    assert "did you mean 'ratio'" in err


def _files(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("wait_for", ["tracing", "channel", "save"])
def test_interrupting_leaves_the_old_output_whole(
    wait_for: str, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "slim"
    command = [
        sys.executable, "-c", "from fxprune.cli.main import main; main()", "prune", str(tiny_llama_dir), "--ratio",
        "0.2", "--out", str(out), "--calibration", str(text), "--samples", "12", "--seq-len", "16", "--overwrite",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "fxprune.json").write_text("{}")
    before = _files(out)
    process: Any = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    for line in process.stderr:
        if line.startswith(wait_for):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "interrupted; earlier output is whole" in said
    assert _files(out) == before
    assert [p.name for p in tmp_path.iterdir() if p.name not in {"slim", "text.txt"}] == []


def test_an_interrupt_that_native_code_turned_into_an_error_is_still_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallow(**_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise SystemError("returned a result with an exception set") from None

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "app", swallow)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
