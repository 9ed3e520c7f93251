"""A whole streaming run: configuration and shards in, pruned shards out, resumable at every block.

The steps of an in-memory run (trace, lift, cut, calibrate, solve, write) with weights that come and go. What needs the
whole model at once is refused: sampling calibration text from it, allocation by the loss, and running it afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from fxprune.calibration.engine import CalibrationEngine, text_samples
from fxprune.calibration.text import calibration_set
from fxprune.core.errors import CheckpointError, PreconditionError, UsageError
from fxprune.core.output import prepare_output
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.program import Event
from fxprune.core.progress import track
from fxprune.core.stopwatch import Stopwatch
from fxprune.evaluation.perplexity import hash_tokens
from fxprune.flows.from_config import models_of_config, trace_on_meta
from fxprune.flows.reporting import versions
from fxprune.measure.speed import file_size, machine, peak_rss_bytes
from fxprune.models.loading import check_weights, expand_user, load_tokenizer, local_snapshot, resolve_device
from fxprune.models.manifest import MANIFEST_NAME, read_manifest
from fxprune.models.methods import check_method, class_of_model
from fxprune.models.mixed_config import is_mixed_directory
from fxprune.models.shard_reader import ShardReader
from fxprune.models.skeleton import initialize_buffers
from fxprune.models.stored_weights import StoredWeights
from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.lifted import parameter_of
from fxprune.tracing.lifted_graphs import own_projections
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.weight_masks import masks_of_projections, masks_of_state, read_masks
from fxprune.weights.base import SparsePass, details_of, dtype_of
from fxprune.weights.layerwise import LayerFigures, LayerwiseSolver
from fxprune.weights.scope import called_projections
from fxprune.weights.streaming import StreamingOutput, StreamingWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.fx import GraphModule

    from fxprune.calibration.engine import Samples
    from fxprune.core.program import Program

__all__ = ["prune_streaming"]


def prune_streaming(
    source: str | Path,
    out: str | Path,
    method: SparsePass,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    restart: bool = False,
    on_block: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Prune a checkpoint's weights without ever holding the model.

    Args:
        source: a directory with safetensors shards and `config.json`, or a hub id.
        out: where the pruned checkpoint shall be; unfinished work lies beside it in `.NAME.streaming`.
        method: a weight-pruning pass with its options.
        device: where blocks are computed.
        overwrite: whether an earlier output may be replaced.
        restart: throw away unfinished work instead of going on with it.
        on_block: called with blocks done and blocks in all.

    Returns:
        The report's sections: model, method, seed, sparsity, calibration, history, seconds, peak memory, machine,
        versions, details.

    Raises:
        FxpruneError: as the parts raise; a run that failed or was interrupted goes on after its last finished block.
    """
    if reason := method.why_not_streamed():
        raise UsageError(reason)
    start = time.perf_counter()
    target = prepare_output(out, overwrite=overwrite, inputs=[source])
    _refuse_mixed(expand_user(source))
    path = local_snapshot(source)
    _refuse_mixed(path)
    check_method(method, *class_of_model(path))
    place = resolve_device(device)
    watch = Stopwatch()
    reader = ShardReader(path)
    with watch.stage("trace"):
        program = _traced(path, reader)
    method.requires(program)
    targets = method.targets(program)
    root = _moved(own_projections(program.graph_module, targets), place)
    model: Any = program.references["eager"].module
    stored = StoredWeights(reader, model)
    initialize_buffers(model, torch.device("cpu"))
    values = dict(model.named_non_persistent_buffers())
    _require_tensors(root, stored, values)
    with watch.stage("text"):
        texts = calibration_set(
            method.calibration_spec(),
            tokenizer=load_tokenizer(path),
            config=program.source.config if program.source else None,
            device=place,
        )
    tokens = texts.tokens.to(place)
    output = StreamingOutput(
        target, stored, _fingerprint(reader, method, tokens, method.engine_options(program, place).forward_dtype)
    )
    output.open(restart=restart)
    masks, others = masks_of_projections(root, read_masks(path))
    layers = LayerwiseSolver(root, method.solver(), targets, masks)
    others |= masks_of_state(root, {name: mask for name, mask in masks.items() if name not in targets})
    samples = text_samples(_on(program, place), tokens)
    details, parts = _run(method, program, samples, layers=layers, output=output, values=values, on_block=on_block)
    figures = [_figure(data) for data in output.progress["figures"]]
    sparsity = {**method.figures(root, figures), **details, "streamed": True}
    summary = {key: sparsity[key] for key in ("target", "removed_share", "mean_error", "streamed")}
    event = Event(method.name, method.options(), modified=True, seconds=time.perf_counter() - start, details=summary)
    with watch.stage("save"):
        output.finish(event, str(source), overwrite=overwrite, masks=others)
        check_weights(target)
    sparsity["seconds"] = {"text": watch.seconds["text"], **parts}
    return {
        "model": str(source),
        "model_class": type(model).__name__,
        "method": method.name,
        "seed": method.seed,
        "sparsity": sparsity,
        "calibration": dict(texts.description),
        "history": [event.to_json()],
        "seconds": {
            "trace": watch.seconds["trace"],
            "calibrate": watch.seconds["text"] + parts.get("forward", 0.0) + parts.get("gram", 0.0),
            "prune": parts["prepare"] + parts["solve"],
            "save": watch.seconds["save"],
        },
        "peak_rss_bytes": peak_rss_bytes(),
        "machine": machine(),
        "versions": versions(),
        "details": {
            "checkpoint": {"directory": str(target), "kind": "uniform", "reason": "", "bytes": file_size(target)}
        },
    }


def _refuse_mixed(directory: Path) -> None:
    """A mixed checkpoint's layers have shapes that its configuration does not say, and the graph comes from there."""
    written = (directory / MANIFEST_NAME).is_file() and read_manifest(directory).kind == "mixed"
    if written or is_mixed_directory(directory):
        raise PreconditionError(f"{directory} is a mixed checkpoint, which cannot be streamed: prune it in memory")


def _run(
    method: SparsePass,
    program: Program,
    samples: Samples,
    *,
    layers: LayerwiseSolver,
    output: StreamingOutput,
    values: Mapping[str, Tensor],
    on_block: Callable[[int, int], None] | None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Run what is left of the stages; what the report says about the calibration, and seconds by part."""
    place = next(iter(samples.varying.values())).device
    told = {figure["name"] for figure in output.progress["figures"]}

    def news() -> list[dict[str, Any]]:
        fresh = [figure for name, figure in layers.figures.items() if name not in told]
        told.update(figure.name for figure in fresh)
        return [figure.to_json() for figure in fresh]

    cut = method.cut(layers.root, layers.targets, samples)
    options = dataclasses.replace(method.engine_options(program, place), spill_directory=output.staging)
    if output.progress.get("batch_size"):
        options = dataclasses.replace(options, batch_size=int(output.progress["batch_size"]))
    weights = StreamingWeights(
        layers.root, output, values, place, masks=layers.masks, figures=news, batch_size=lambda: engine.batch_size
    )
    engine = CalibrationEngine(cut, samples, options, weights)

    def done(stage: int) -> None:
        block = cut.stages[stage - 1].block
        if on_block is not None and block >= 0 and (stage == len(cut.stages) or cut.stages[stage].block != block):
            on_block(block + 1, len(cut.blocks))

    for name in (figure["name"] for figure in output.progress["figures"]):
        layers.figures[name] = _figure({"name": name})  # solved before the interruption
    with track(f"{method.name}: stages", len(cut.stages)) as advance:

        def on_stage(stage: int) -> None:
            done(stage)
            advance(stage)

        engine.run(layers, on_stage=on_stage, first_stage=output.next_stage, restored=output.restored())
    return details_of(engine, layers, dtype_of(program))


def _figure(data: Mapping[str, Any]) -> LayerFigures:
    empty = {"target": "", "shape": (), "removed": 0.0, "error": 0.0, "tokens": 0, "seconds": 0.0}
    return LayerFigures(**{**empty, **data, "shape": tuple(data.get("shape", ()))})


def _traced(path: Path, reader: ShardReader) -> Program:
    """The model on the meta device in the dtype of its shards, lifted, with experts located."""
    floating = Counter(dtype for dtype in reader.dtypes.values() if dtype.is_floating_point)
    dtype = floating.most_common(1)[0][0] if floating else None
    program = trace_on_meta(models_of_config(path, dtype), str(path))
    if dtype is not None and dtype_of(program) is not dtype:
        short = [str(one).removeprefix("torch.") for one in (dtype, dtype_of(program))]
        raise PreconditionError(
            f"{path} is in {short[0]}, and this model can be traced without weights in {short[1]} only (torch knows "
            f"the shapes of products over experts in no other): prune it in memory, or save it in {short[1]} first"
        )
    program = build_pass("lift_linears", {})(program).program
    modules = (get_attribute(program.graph_module, name) for name in called_projections(program.graph_module))
    if any(isinstance(module, GroupedLinear) for module in modules):
        steps = ("locate_attention", "locate_mlp", "locate_hidden", "locate_experts")
        program = Pipeline([build_pass(step, {}) for step in steps])(program).program
    return program


def _moved(graph_module: GraphModule, device: torch.device) -> GraphModule:
    """The graph, changed: what it would create on the meta device is created where it runs."""

    def place(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) and argument.type == "meta" else argument

    for node in list(graph_module.graph.nodes):
        node.args = torch.fx.node.map_aggregate(node.args, place)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, place)
        if node.target is torch.ops.aten.histc.default and device.type == "cpu":
            # Classes count the tokens of experts in integers, but in float32 on the CPU, which counts nothing else.
            with graph_module.graph.inserting_before(node):
                counted = graph_module.graph.call_function(torch.ops.aten.to.dtype, (node.args[0], torch.float32))
            counted.meta = dict(node.meta)
            node.replace_input_with(node.args[0], counted)
    graph_module.recompile()
    return graph_module


def _on(program: Program, device: torch.device) -> Any:
    """The interface with examples on the device where the graph will run."""
    examples = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in program.interface.example_inputs.items()
    }
    return dataclasses.replace(program.interface, example_inputs=examples)


def _require_tensors(root: GraphModule, stored: StoredWeights, values: Mapping[str, Tensor]) -> None:
    """Everything that the graph reads can be had.

    Raises:
        CheckpointError: the checkpoint lacks weights of the model class.
        PreconditionError: the graph holds constants that were lost on the meta device.
    """
    needed = [name for name, _ in [*root.named_parameters(remove_duplicate=False), *root.named_buffers()]]
    originals = {parameter_of(root.get_submodule(name.rpartition(".")[0]), name)[0] for name in needed}
    lacking = [name for name in originals if name not in stored and name not in values]
    constants = [name for name in lacking if "lifted_tensor" in name or name.rpartition(".")[2].startswith("_tensor")]
    if constants:
        raise PreconditionError(
            f"the graph reads {constants[0]}, a constant that the model computes when it runs; this model cannot be "
            "streamed: prune it in memory"
        )
    if lacking:
        raise CheckpointError(
            f"the checkpoint has no {min(lacking)} ({len(lacking)} such tensors), nor what transformers makes it from: "
            "config.json and the weights do not belong together, or this layout cannot be streamed: prune it in memory"
        )


# Where activations are kept changes no bit of them, and which field was read is seen from the tokens.
_NO_MATTER = {"memory_bytes", "device_bytes", "text_field"}


def _fingerprint(reader: ShardReader, method: SparsePass, tokens: Tensor, forward_dtype: torch.dtype | None) -> str:
    """Of everything that decides the result."""
    data = {
        "source": reader.fingerprint(),
        "method": method.name,
        "options": {key: value for key, value in method.options().items() if key not in _NO_MATTER},
        "device": tokens.device.type,
        "forward_dtype": str(forward_dtype),
        "tokens": hash_tokens(tokens),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()
