"""onnxruntime-genai: its configuration, its text, its tokenizer, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fxprune
from fxprune.core.errors import ExportError, PreconditionError, UsageError, VerificationError
from fxprune.core.plan import Plan
from fxprune.evaluation.harness_model import RunnerLM
from fxprune.exporters.genai import GenaiRunner, require_genai, write_genai_config
from fxprune.exporters.genai_tokenizer import TokenizerComparison, compare_tokenizers
from fxprune.exporters.ort import OrtRunner
from fxprune.flows.exporting import ExportRequest, run_export
from fxprune.passes.export_onnx import ExportOnnx
from fxprune.passes.verify import Verify
from fxprune.runtimes.runners import GraphRunner, Runner, greedy, position_ids_from_mask
from tests.commands import run_command
from tests.conftest import SPECIAL_TOKENS, TINY_LINES
from tests.families import located, random_plan
from tests.proof import slimmed

if TYPE_CHECKING:
    from fxprune.core.program import Program

pytest.importorskip("onnxruntime_genai", reason="the extra genai is not installed")

LM_EVAL = [("onnxruntime_ort", "ONNXRuntimeLM"), ("onnxruntime_genai", "ONNXRuntimeGenAILM")]
MIXED = {"num_key_value_heads": 3, "vocab_size": 300}


def byte_tokenizer(normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which onnxruntime-genai knows."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def with_source(program: Program, **changes: object) -> Program:
    assert program.source is not None
    return program.replace(source=dataclasses.replace(program.source, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    """A slim program whose layers keep different numbers of key/value heads, and its export; read-only."""
    program = located("llama", **MIXED)
    plan = random_plan(program.groups)
    first = next(group for group in program.groups if group.kind == "attention")
    kept = {group.name: plan.kept_units(group) for group in program.groups} | {first.name: range(first.units)}
    program = with_source(slimmed(program, Plan.of(kept)), tokenizer=byte_tokenizer())
    out = tmp_path_factory.mktemp("genai") / "mixed"
    return ExportOnnx(out=out, to="genai")(program).program, out


@pytest.fixture
def copied(mixed: tuple[Program, Path], tmp_path: Path) -> Path:
    """A copy of the export that a test may change."""
    return Path(shutil.copytree(mixed[1], tmp_path / "copy"))


def change(directory: Path, **model: object) -> None:
    path = directory / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"] |= model
    path.write_text(json.dumps(config))


@pytest.mark.smoke
def test_layers_may_have_different_numbers_of_key_value_heads(mixed: tuple[Program, Path]) -> None:
    program, out = mixed
    counts = [tensor.shape[1] for tensor in OrtRunner(out / "model.onnx", threads=1).empty_past(1)]
    assert counts == [3, 3, 2, 2]
    rungs = Verify(genai=out, graph=False)(program).program.results["verify"]
    assert [(rung["rung"], rung["passed"]) for rung in rungs] == [
        ("greedy text of onnxruntime-genai = slim, after 8 tokens", True),
        ("greedy text of onnxruntime-genai = slim, after 1 token", True),
        ("tokens of onnxruntime-genai = tokenizer's", True),
        ("text of onnxruntime-genai's tokens = tokenizer's", True),
    ]
    decoder = json.loads((out / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (2, 3)


@pytest.mark.smoke
def test_a_mixed_model_that_was_saved_and_loaded(tmp_path: Path) -> None:
    """By the command's own way: the directory is loaded, exported, and proved in the runtime."""
    program = located("llama", **MIXED)
    first = next(group for group in program.groups if group.kind == "attention")
    plan = Plan.of({first.name: first.heads_of(1), "model.layers.1.mlp": range(13)})
    fxprune.save(with_source(slimmed(program, plan), tokenizer=byte_tokenizer()), tmp_path / "slim")
    found = run_export(str(tmp_path / "slim"), ExportRequest(tmp_path / "out", "genai"), lambda _: None)
    assert all(rung["passed"] for rung in found["verify"])
    decoder = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (6, 3)
    runner = OrtRunner(tmp_path / "out" / "model.onnx", threads=1)
    assert [tensor.shape[1] for tensor in runner.empty_past(1)] == [1, 1, 3, 3]


@pytest.mark.smoke
@pytest.mark.parametrize(("module", "model"), LM_EVAL)
def test_the_own_back_ends_of_lm_eval_read_the_export(mixed: tuple[Program, Path], module: str, model: str) -> None:
    """They score as `fxprune eval` does, mixed numbers of key/value heads or not."""
    harness = pytest.importorskip(f"lm_eval.models.{module}", reason="lm-eval has no such back end yet")
    program, out = mixed
    assert program.source is not None
    theirs = getattr(harness, model)(str(out), execution_provider="cpu")
    slim = GraphRunner(program.graph_module, program.interface)
    ours = RunnerLM(slim, program.source.tokenizer, batch_size=1)
    ids = torch.randint(4, 300, (3, 12), generator=torch.Generator().manual_seed(1)).tolist()
    requests = [(None, row[:split], row[split:]) for row, split in zip(ids, (1, 6, 11), strict=True)]
    expected = ours._loglikelihood_tokens(requests)
    found = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    for (total, greedy_here), (other, greedy_there) in zip(expected, found, strict=True):
        assert other == pytest.approx(total, abs=1e-3)
        assert greedy_there == greedy_here
    assert theirs.tok_encode("the cat") == program.source.tokenizer.encode("the cat", add_special_tokens=False)


def test_wrong_text_is_found(mixed: tuple[Program, Path]) -> None:
    """The export of a slim model is no export of the dense one."""
    with pytest.raises(VerificationError, match="greedy text of onnxruntime-genai = slim"):
        Verify(genai=mixed[1], graph=False)(located("llama", **MIXED))


def test_the_runner_is_a_runner(mixed: tuple[Program, Path]) -> None:
    runner, reference = GenaiRunner(mixed[1], threads=1), OrtRunner(mixed[1] / "model.onnx", threads=1)
    assert isinstance(runner, Runner)
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    pasts: list[Any] = [None, None]
    for start, end in ((0, 5), (5, 8), (8, 9)):
        positions = position_ids_from_mask(mask[:1, :end], end - start)
        logits = []
        for index, form in enumerate((runner, reference)):
            out, pasts[index] = form.step(ids[:1, start:end], mask[:1, :end], positions, pasts[index])
            logits.append(out)
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    both = [form.step(ids, mask, position_ids_from_mask(mask, 9), None) for form in (runner, reference)]
    torch.testing.assert_close(both[0][0], both[1][0], atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="one sequence at a time"):
        runner.step(ids[:, :1], torch.ones(2, 10), torch.full((2, 1), 9), both[0][1])


def test_a_past_can_be_continued_twice(mixed: tuple[Program, Path]) -> None:
    runner = GenaiRunner(mixed[1], threads=1)
    ids = torch.arange(5, 11)[None]
    mask = torch.ones_like(ids)
    _, past = runner.step(ids[:, :5], mask[:, :5], torch.arange(5)[None], None)
    first, longer = runner.step(ids[:, 5:], mask, torch.tensor([[5]]), past)
    again, _ = runner.step(ids[:, 5:], mask, torch.tensor([[5]]), past)
    forked, _ = runner.step(ids[:, 5:], mask, torch.tensor([[5]]), runner.fork(past))
    torch.testing.assert_close(first, again, atol=1e-5, rtol=0)
    torch.testing.assert_close(first, forked, atol=1e-5, rtol=0)
    assert longer[0].tolist() == ids.tolist()


def test_padding_is_refused(mixed: tuple[Program, Path]) -> None:
    runner = GenaiRunner(mixed[1], threads=1)
    ids, mask = torch.arange(5, 11)[None], torch.ones(1, 6, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(UsageError, match="without padding"):
        runner.step(ids, mask, position_ids_from_mask(mask, 6), None)


def test_text_ends_at_an_end_of_text_token(mixed: tuple[Program, Path], copied: Path) -> None:
    prompt = torch.arange(5, 13)[None]
    expected = greedy(OrtRunner(mixed[1] / "model.onnx", threads=1), prompt, 12)[0].tolist()
    end = next(i for i, token in enumerate(expected) if i >= 2 and token not in expected[:i])
    change(copied, eos_token_id=[expected[end]])
    assert GenaiRunner(copied, threads=1).generate(prompt, 12)[0].tolist() == expected[: end + 1]
    assert Verify(genai=copied, graph=False)(mixed[0]).program.results["verify"][0]["passed"]


@pytest.mark.smoke
def test_streamed_text_is_the_greedy_text(mixed: tuple[Program, Path]) -> None:
    program, out = mixed
    assert program.source is not None
    runner, tokenizer = GenaiRunner(out, threads=1), program.source.tokenizer
    prompt = "the compiler traces"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    expected = greedy(OrtRunner(out / "model.onnx", threads=1), ids, 10)[0].tolist()
    pieces = runner.tokenizer.create_stream()  # it holds back half characters, which a random model often writes
    shown = list(runner.stream(prompt, 10))
    assert shown == [pieces.decode(token) for token in expected if token not in runner.ends]
    assert "".join(shown)


@pytest.mark.smoke
def test_the_example_streams(
    mixed: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["genai_stream.py", str(mixed[1]), "the compiler traces", "6"])
    example = Path(__file__).resolve().parents[2] / "examples" / "genai_stream.py"
    runpy.run_path(str(example), run_name="__main__")
    shown = capsys.readouterr().out
    assert shown.startswith("the compiler traces")
    assert re.search(r"\d tokens, \d+ a second", shown)


def test_a_tokenizer_that_the_runtime_reads_otherwise_is_found(
    mixed: tuple[Program, Path], copied: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The runtime has no Metaspace: it would lose every space, silently."""
    tiny_tokenizer.save_pretrained(copied)
    with pytest.raises(VerificationError, match="does not tokenise like the model's tokenizer.*--to onnx"):
        Verify(genai=copied, graph=False)(with_source(mixed[0], tokenizer=tiny_tokenizer))


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As of Llama 2: a space is prepended and written as a mark, and what is not in the vocabulary becomes bytes."""
    vocabulary = [*SPECIAL_TOKENS.values(), *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"aehlrt", "▁t", "he"]
    merges = [("▁", "t"), ("h", "e")]
    model = models.BPE({token: index for index, token in enumerate(vocabulary)}, merges)
    model.unk_token = SPECIAL_TOKENS["unk_token"]
    model.byte_fallback = True
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def compared(directory: Path, tokenizer: PreTrainedTokenizerFast) -> TokenizerComparison:
    tokenizer.save_pretrained(directory)
    return compare_tokenizers(GenaiRunner(directory, threads=1), tokenizer)


def test_tokenizers_that_the_runtime_reads_as_they_are(copied: Path) -> None:
    for tokenizer in (byte_tokenizer(), fallback_tokenizer()):
        found = compared(copied, tokenizer)
        assert (found.texts, found.decomposed, found.tokens, found.warnings) == ({}, {}, {}, ())
        assert found.decoded > 100


@pytest.mark.parametrize("sequence", [False, True])
def test_a_normaliser_that_the_runtime_leaves_out_is_a_warning(
    mixed: tuple[Program, Path], copied: Path, *, sequence: bool
) -> None:
    """Composed text gets the same tokens, and what is not does once it is composed: the export says so."""
    normalizer = normalizers.Sequence([normalizers.NFC()]) if sequence else normalizers.NFC()
    tokenizer = byte_tokenizer(normalizer)
    found = compared(copied, tokenizer)
    assert (found.texts, found.tokens) == ({}, {})
    assert repr("cafe\u0301, nai\u0308ve, Gro\u0308\u00dfe") in found.decomposed
    (warning,) = found.warnings
    assert "cafe\u0301" in warning
    results = Verify(genai=copied, graph=False)(with_source(mixed[0], tokenizer=tokenizer)).program.results
    assert results["warnings"] == [warning]
    assert results["verify"][2]["detail"] == warning


def test_the_warning_is_in_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    dense: Any = located("llama", **MIXED).references["eager"].module
    dense.save_pretrained(model)
    byte_tokenizer(normalizers.NFC()).save_pretrained(model)
    for more in ((), ("--int4",)):
        out = tmp_path / f"out{len(more)}"
        status, _, err = run_command(monkeypatch, capsys, "export", model, "--to", "genai", "--out", out, *more)
        assert status == 0, err
        (warning,) = json.loads((out / "export.json").read_text())["warnings"]
        assert f"warning: {warning}" in err
        assert "combining marks" in warning


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("t", "T")])
def test_normalisers_of_ordinary_text_are_refused(
    mixed: tuple[Program, Path], copied: Path, normalizer: normalizers.Normalizer
) -> None:
    tokenizer = byte_tokenizer(normalizer)
    tokenizer.save_pretrained(copied)
    with pytest.raises(VerificationError, match="does not tokenise like the model's tokenizer.*--to onnx"):
        Verify(genai=copied, graph=False)(with_source(mixed[0], tokenizer=tokenizer))


def test_tokens_that_become_other_text_are_refused(mixed: tuple[Program, Path], copied: Path) -> None:
    """The same tokens, another decoder: a runtime with code of its own does not follow it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("he", "HE")])
    tokenizer.save_pretrained(copied)
    with pytest.raises(VerificationError, match=r"does not decode like the model's tokenizer: token \d+.*--to onnx"):
        Verify(genai=copied, graph=False)(with_source(mixed[0], tokenizer=tokenizer))


def test_the_tokenizer_of_the_default_model(real_model_dir: Path, copied: Path) -> None:
    found = compared(copied, AutoTokenizer.from_pretrained(real_model_dir))
    assert (found.texts, found.decomposed, found.tokens) == ({}, {}, {})
    assert found.decoded > 48_000


@pytest.mark.smoke
def test_generation_options_follow_the_model(mixed: tuple[Program, Path], copied: Path) -> None:
    settings = SimpleNamespace(do_sample=True, temperature=0.2, top_p=0.9, eos_token_id=[2, 7], pad_token_id=9)
    source = with_source(mixed[0], generation_config=settings).source
    assert source is not None
    config = json.loads(write_genai_config(copied, source).read_text())
    search = config["search"]
    assert (search["do_sample"], search["temperature"], search["top_p"], search["max_length"]) == (True, 0.2, 0.9, 64)
    assert (config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == ([2, 7], 9)
    prompt = torch.arange(8, 16)[None]
    expected = greedy(OrtRunner(copied / "model.onnx", threads=1), prompt, 6)[0].tolist()
    end = next((i for i, token in enumerate(expected) if token in {2, 7}), len(expected))
    assert GenaiRunner(copied, threads=1).generate(prompt, 6)[0].tolist() == expected[: end + 1]  # greedy all the same


def test_what_is_refused(
    mixed: tuple[Program, Path], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PreconditionError, match="causal language models"):
        ExportOnnx(out=tmp_path / "plain", to="genai").requires(mixed[0].replace(source=None))
    config = json.loads((copied / "genai_config.json").read_text())
    for text, message in (("{", "cannot be read"), ('{"model": {}}', "KeyError"), ("[]", "TypeError")):
        (copied / "genai_config.json").write_text(text)
        with pytest.raises(ExportError, match=message):
            GenaiRunner(copied)
    config["model"]["decoder"]["filename"] = "../model.onnx"
    (copied / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="names no file beside it"):
        GenaiRunner(copied)
    config["model"]["decoder"]["filename"] = "model.onnx"
    for owner, field, value, message in (
        (config["model"]["decoder"]["session_options"], "custom_ops_library", "ops.bin", "load a library .custom_ops"),
        (config["model"]["decoder"]["session_options"], "provider_options", [{"qnn": {"path": "x.so"}}], "load a libr"),
        (config["model"], "vocab_size", "many", "is no number"),
    ):
        before = owner.get(field)
        owner[field] = value
        (copied / "genai_config.json").write_text(json.dumps(config))
        with pytest.raises(ExportError, match=message):
            GenaiRunner(copied)
        owner[field] = before
    (copied / "genai_config.json").write_text(json.dumps(config))
    (copied / "model.onnx").unlink()
    with pytest.raises(ExportError, match="no ONNX file"):
        GenaiRunner(copied)
    (copied / "genai_config.json").unlink()
    with pytest.raises(ExportError, match=r"genai_config\.json is missing; export with"):
        GenaiRunner(copied)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(ExportError, match=r"not installed.*fxprune\[genai\]"):
        require_genai()
