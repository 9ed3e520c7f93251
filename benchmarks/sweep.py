"""Every class behind transformers' auto classes: pruned, saved, reloaded, generated, exported, or refused by name.

    python -m benchmarks.sweep [--auto AutoModelForCausalLM ...] [--type llama ...] [--method NAME] [--out JSON]

Each class is built tiny from its configuration's own fields (`benchmarks/sweep_sizes.py`), with random norms and
biases, in bfloat16. Then, as a user would: traced, located, pruned, slimmed, verified, saved, reloaded bit by bit,
generated with left padding by the reloaded model, exported to ONNX and compared in ONNX Runtime.

    unbuilt   no tiny configuration that the class itself can run was found; fxprune was not asked
    pruned    everything up to the reloaded checkpoint held (generation where the class generates)
    refused   a typed error said why
    failed    anything else: a fault of fxprune

Classes are measured one after the other in a worker process, so that one that crashes or hangs does not take the rest
along. Prints a Markdown table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
RATIO = 0.05
NEW_TOKENS = 4
_STATUSES = ("pruned", "refused", "failed", "unbuilt")
_SHOWN = 160
"""Characters of a reason that the table shows; the JSON has all of it."""
SECONDS = 600
"""After which a class counts as hanging."""


def runnable(auto: str, model_type: str) -> tuple[Any, str]:
    """A tiny model that runs on a sample of its own, in bfloat16, or None with the reason."""
    import torch  # noqa: PLC0415 - the parent process stays light
    import transformers  # noqa: PLC0415
    from transformers.models.auto import modeling_auto  # noqa: PLC0415
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    from benchmarks.sweep_sizes import tiny_configs  # noqa: PLC0415
    from tests.families import randomise  # noqa: PLC0415

    reason = "no configuration"
    try:
        for config in tiny_configs(CONFIG_MAPPING[model_type], decoder=auto == "AutoModelForCausalLM"):
            torch.manual_seed(0)
            if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
                config.decoder_start_token_id = 0  # no class has a default for it, all published models do
            names = getattr(modeling_auto, AUTO[auto])[model_type]
            if not isinstance(names, str):
                config.architectures = [names[0]]  # a type with several classes asks which
            try:
                model = getattr(transformers, auto).from_config(config).eval()
                randomise(model)
                model = _in_bfloat16(model)
                _run(model)
            except Exception as error:  # noqa: BLE001 - classes raise anything for sizes that do not fit together
                reason = f"{type(error).__name__}: {error}"
                continue
            return model, ""
    except Exception as error:  # noqa: BLE001 - as above
        reason = f"{type(error).__name__}: {error}"
    return None, reason


def _in_bfloat16(model: Any) -> Any:
    """The model in bfloat16, but for the parameters that its class keeps in float32 whatever is asked for."""
    import torch  # noqa: PLC0415

    kept = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    patterns = [re.compile(rf"(^|\.){re.escape(name).replace(re.escape('*'), '.*')}($|\.)") for name in kept]
    model = model.to(torch.bfloat16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in patterns):
            tensor.data = tensor.data.float()
    return model


def _run(model: Any) -> None:
    """One forward pass of the class itself, as its users would call it."""
    import torch  # noqa: PLC0415

    if model.main_input_name == "pixel_values":
        vision = getattr(model.config, "vision_config", model.config)
        size = getattr(vision, "image_size", 32)
        size = size if isinstance(size, int) else 32
        channels = getattr(vision, "num_channels", 3)
        inputs = {"pixel_values": torch.randn(2, channels, size, size, dtype=model.dtype)}
    else:
        ids = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(0))
        eos = getattr(model.config, "eos_token_id", None)
        if isinstance(eos, int):
            ids[:, -1] = eos  # where some classifiers look
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        output = model(**inputs)
    if not all(bool(t.isfinite().all()) for t in output.values() if isinstance(t, torch.Tensor)):
        raise ValueError("its output is not finite")


def _fails(model: Any) -> str:
    """Why the class itself does not run; some get other dtypes when they are loaded. Empty if it runs."""
    try:
        _run(model)
    except Exception as error:  # noqa: BLE001 - classes raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def measure(auto: str, model_type: str, method: str) -> dict[str, Any]:
    """What becomes of one class."""
    from fxprune.core.errors import FxpruneError  # noqa: PLC0415

    model, reason = runnable(auto, model_type)
    row: dict[str, Any] = {"auto": auto, "type": model_type}
    if model is None:
        return row | {"status": "unbuilt", "reason": _one_line(reason)}
    row["class"] = type(model).__name__
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            loaded = _as_published(model, Path(scratch) / "dense")
            if reason := _fails(loaded.model):
                return row | {"status": "unbuilt", "reason": f"as it is loaded, {_one_line(reason)}"}
            _prune(loaded, method, row, Path(scratch))
        row["status"] = "pruned"
    except FxpruneError as error:
        row |= {"status": "refused", "error": type(error).__name__, "reason": _one_line(str(error))}
    except Exception as error:  # noqa: BLE001 - what the sweep is there to find
        row |= {"status": "failed", "error": type(error).__name__, "reason": _one_line(str(error))}
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]


def _as_published(model: Any, path: Path) -> Any:
    """The model as its users get it: written in bfloat16, and loaded from there as the command line does."""
    from fxprune.checkpoints.load_model import load_model  # noqa: PLC0415

    model.save_pretrained(path)
    return load_model(path)


def _prune(loaded: Any, method: str, row: dict[str, Any], scratch: Path) -> None:
    import torch  # noqa: PLC0415

    import fxprune  # noqa: PLC0415
    from fxprune.channels.front_end import LOCATE  # noqa: PLC0415
    from fxprune.core.pipeline import Pipeline, build_pass  # noqa: PLC0415
    from fxprune.flows.steps import prune_program  # noqa: PLC0415

    row["stage"] = "trace"
    program = fxprune.trace(loaded.model, path=loaded.path)
    row["stage"] = "locate"
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(program).program
    row["groups"] = dict(Counter(group.kind for group in program.groups))
    options: dict[str, Any] = {"ratio": RATIO}
    if method not in {"magnitude-units", "random"}:
        options |= {"samples": 4, "seq_len": 16}
    out = scratch / "slim"
    row["stage"] = "prune"
    program = prune_program(program, method, options, out=out, on_pass=lambda step: row.update(stage=step.name))
    row["kind"] = program.results["checkpoint"]["kind"]
    row["rungs"] = [rung["rung"] for rung in program.results["verify"]]
    row["stage"] = "reload"
    slim = fxprune.load(out)
    _same_bits(slim, program, torch)
    row["stage"] = "generate"
    row["generated"] = _generate(slim)
    row["stage"] = "export"
    row["onnx"] = _export(out, scratch / "onnx")
    row["stage"] = "done"


def _same_bits(slim: Any, program: Any, torch: Any) -> None:
    from fxprune.core.tensors import same_bits  # noqa: PLC0415
    from fxprune.tracing.lifted_graphs import state_tensors  # noqa: PLC0415

    state = slim.state_dict()
    dtypes = {tensor.dtype for name, tensor in slim.named_parameters() if tensor.is_floating_point()}
    if torch.bfloat16 not in dtypes:
        raise AssertionError(f"a bfloat16 model came out as {dtypes}")
    wrong = [
        name
        for name, tensor in state_tensors(program.graph_module).items()
        if name in state and not same_bits(state[name], tensor)
    ]
    if wrong:
        raise AssertionError(f"reloaded weights differ: {wrong[:3]}")


def _export(slim: Path, out: Path) -> float | str:
    """Largest difference of an output in ONNX Runtime, in float32: it has few kernels for bfloat16; or the refusal."""
    from fxprune.core.errors import FxpruneError  # noqa: PLC0415
    from fxprune.flows.exporting import ExportRequest, run_export  # noqa: PLC0415

    try:
        rungs = run_export(str(slim), ExportRequest(out, dtype="float32"), lambda _: None)["verify"]
    except FxpruneError as error:
        return f"{type(error).__name__}: {_one_line(str(error))}"
    return max(float(rung["max_abs_error"]) for rung in rungs if "ONNX" in rung["rung"])


def _generate(model: Any) -> bool:
    """Generate from two prompts, one left-padded; False where the class does not generate."""
    import torch  # noqa: PLC0415

    if not model.can_generate() or model.main_input_name != "input_ids":
        return False
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    tokens = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    if tokens.shape[-1] < NEW_TOKENS:
        raise AssertionError(f"generate gave {tuple(tokens.shape)}")
    return True


def _work(pipe: Connection, method: str) -> None:
    """The worker: rows for the classes that come through the pipe."""
    warnings.filterwarnings("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    while (task := pipe.recv()) is not None:
        pipe.send(measure(*task, method))


class _Worker:
    """A process that measures classes and is started anew when one of them takes it down."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.process: Any = None

    def start(self) -> None:
        """Start the process if there is none."""
        if self.process is None or not self.process.is_alive():
            self.pipe, theirs = multiprocessing.Pipe()
            self.process = multiprocessing.get_context("spawn").Process(
                target=_work, args=(theirs, self.method), daemon=True
            )
            self.process.start()
            theirs.close()

    def stop(self) -> None:
        """Let the process end."""
        if self.process is not None and self.process.is_alive():
            self.pipe.send(None)
            self.process.join()

    def measure(self, auto: str, model_type: str) -> dict[str, Any]:
        """The row of one class."""
        self.start()
        row = {"auto": auto, "type": model_type, "status": "failed"}
        self.pipe.send((auto, model_type))
        try:
            if self.pipe.poll(SECONDS):
                found: dict[str, Any] = self.pipe.recv()
                return found
            row["reason"] = f"no answer within {SECONDS} s"
        except EOFError:
            self.process.join()
            row["reason"] = f"the process died with exit code {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        return row


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table: a row for each class."""
    lines = ["| class | units | result | checkpoint | generates | ONNX Runtime |", "|---|---|---|---|---|---|"]
    for row in rows:
        name = row.get("class") or row["type"]
        units = ", ".join(f"{count} {kind}" for kind, count in row.get("groups", {}).items()) or "-"
        if row["status"] == "pruned":
            onnx = row.get("onnx")
            onnx = f"{onnx:.0e}" if isinstance(onnx, float) else str(onnx)[:_SHOWN]
            generates = "yes" if row.get("generated") else "-"
            lines.append(f"| {name} | {units} | pruned | {row['kind']} | {generates} | {onnx} |")
        else:
            reason = row.get("reason", "").replace("|", "\\|")
            reason = f"{reason[:_SHOWN]} ..." if len(reason) > _SHOWN else reason
            lines.append(f"| {name} | {units} | {row['status']}: {reason} | - | - | - |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many classes of each auto class came to what."""
    found: dict[str, Any] = {}
    for auto in dict.fromkeys(row["auto"] for row in rows):
        mine = [row for row in rows if row["auto"] == auto]
        counts = Counter(row["status"] for row in mine)
        built = len(mine) - counts["unbuilt"]
        found[auto] = dict(counts) | {"built": built, "share": round(counts["pruned"] / max(built, 1), 3)}
    return found


def page(result: dict[str, Any]) -> str:
    """The page of the documentation."""
    lines = [
        "# The sweep",
        "",
        "Every class behind transformers' auto classes, built tiny from its configuration's own fields, in bfloat16:",
        "pruned, saved, reloaded bit by bit, generated with left padding, exported to ONNX in float32; or refused with",
        "a typed error. `python -m benchmarks.sweep` makes it (`benchmarks/results/sweep.json`), with",
        f"`--method {result['method']}` at a ratio of {result['ratio']}; transformers {result['transformers']},",
        f"{result['date']}. The last column is the largest absolute difference of an output in ONNX Runtime, or why",
        "there is none.",
    ]
    for auto, counts in result["summary"].items():
        said = ", ".join(f"{counts[name]} {name}" for name in _STATUSES if counts.get(name))
        share = f"{counts['share']:.0%} of the {counts['built']} that can be built are pruned"
        rows = [row for row in result["rows"] if row["auto"] == auto]
        lines += ["", f"## {auto}", "", f"{said}: {share}.", "", table(rows)]
    return "\n".join(lines) + "\n"


def _publish(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(page(result), encoding="utf-8")
    print(table(result["rows"]))
    print(json.dumps(result["summary"], indent=2))


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--auto", nargs="+", choices=list(AUTO), default=list(AUTO))
    parser.add_argument("--type", nargs="+", help="model types; all by default")
    parser.add_argument("--method", default="magnitude-units")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sweep.json"))
    parser.add_argument("--page", type=Path, help="write the tables as a page of the documentation, docs/sweep.md")
    parser.add_argument("--plain", action="store_true", help="only write the tables of what was measured")
    arguments = parser.parse_args()

    if arguments.plain:
        _publish(json.loads(arguments.out.read_text(encoding="utf-8")), arguments.page)
        return
    from transformers.models.auto import modeling_auto  # noqa: PLC0415 - slow; --help answers at once

    tasks = [
        (auto, model_type)
        for auto in arguments.auto
        for model_type in getattr(modeling_auto, AUTO[auto])
        if not arguments.type or model_type in arguments.type
    ]
    worker = _Worker(arguments.method)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with arguments.out.with_suffix(".jsonl").open("w", encoding="utf-8") as log:  # what is done stays known if it ends
        for task in track(tasks, "classes"):
            rows.append(worker.measure(*task))
            log.write(json.dumps(rows[-1]) + "\n")
            log.flush()
    worker.stop()
    from transformers import __version__  # noqa: PLC0415 - heavy

    from fxprune.measure.speed import machine  # noqa: PLC0415 - heavy

    result = {
        "method": arguments.method,
        "ratio": RATIO,
        "transformers": __version__,
        "date": datetime.now(tz=UTC).date().isoformat(),
        "summary": summary(rows),
        "rows": rows,
        "machine": machine(),
    }
    arguments.out.with_suffix(".jsonl").unlink()
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _publish(result, arguments.page)


if __name__ == "__main__":
    main()
