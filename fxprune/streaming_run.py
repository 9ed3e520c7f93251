"""A whole streaming run: configuration and shards in, pruned shards out, resumable at every block.

The steps of an in-memory run (trace, lift, cut, calibrate, solve, write) with weights that come and go. What needs the
whole model at once is refused: sampling calibration text from it, allocation by the loss, and running it afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from fxprune.calibration import CalibrationSpec, calibration_set
from fxprune.channels import get_attribute
from fxprune.engine import CalibrationEngine, text_samples
from fxprune.errors import CheckpointError, PreconditionError, UsageError
from fxprune.evaluate import hash_tokens
from fxprune.grouped import GroupedLinear
from fxprune.layerwise import LayerFigures, LayerwiseSolver
from fxprune.loading import check_weights, load_tokenizer, local_snapshot, resolve_device
from fxprune.output import prepare_output
from fxprune.pipeline import Pipeline, build_pass
from fxprune.progress import track
from fxprune.reporting import versions
from fxprune.scope import called_projections
from fxprune.skeleton import aliases, initialize_buffers
from fxprune.sparse_pass import SparsePass, own_projections
from fxprune.streaming import ShardReader, StreamingOutput, StreamingWeights
from fxprune.weight_masks import has_masks
from fxprune.workflow import Stopwatch, models_of_config, trace_on_meta

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.fx import GraphModule

    from fxprune.engine import Samples
    from fxprune.program import Program

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
        The report's sections: model, method, sparsity, calibration, seconds, versions.

    Raises:
        FxpruneError: as the parts raise; a run that failed or was interrupted goes on after its last finished block.
    """
    if method.calibration == "self" and method.needs_data:
        raise UsageError("streaming cannot sample text from a model that does not fit in memory; name a text file")
    if method.allocation != "uniform":
        raise UsageError(f"allocation={method.allocation} needs the whole model in memory; streaming prunes uniformly")
    if not method.needs_data:
        raise UsageError(f"{method.name} needs no calibration; streaming is for methods that do")
    path, target = local_snapshot(source), prepare_output(out, overwrite=overwrite)
    if has_masks(path):
        raise PreconditionError(f"{path} has masks of weights that were pruned before; they would not be held")
    place = resolve_device(device)
    watch = Stopwatch()
    reader = ShardReader(path)
    with watch.stage("trace"):
        program = _traced(path, reader)
    method.requires(program)
    targets = method.targets(program)
    root = _moved(own_projections(program.graph_module, targets), place)
    names, values = _names_and_values(program, reader)
    with watch.stage("text"):
        texts = calibration_set(
            CalibrationSpec(method.calibration, samples=method.samples, seq_len=method.seq_len, seed=method.seed),
            tokenizer=load_tokenizer(path),
            config=program.source.config if program.source else None,
            device=place,
        )
    tokens = texts.tokens.to(place)
    output = StreamingOutput(
        target, reader, _fingerprint(reader, method, tokens, method.engine_options(program, place).forward_dtype)
    )
    output.open(restart=restart)
    weights = StreamingWeights(root, output, values, names, place)
    _require_tensors(root, weights)
    layers = LayerwiseSolver(root, method.solver(), targets)
    told = {figure["name"] for figure in output.progress["figures"]}

    def news() -> list[dict[str, Any]]:
        fresh = [figure for name, figure in layers.figures.items() if name not in told]
        told.update(figure.name for figure in fresh)
        return [figure.to_json() for figure in fresh]

    weights.figures, weights.masks = news, layers.masks
    samples = text_samples(_on(program, place), tokens)
    seconds, engine = _run(method, program, samples, layers=layers, weights=weights, on_block=on_block)
    figures = [_figure(data) for data in output.progress["figures"]]
    with watch.stage("write"):
        output.finish(overwrite=overwrite)
    check_weights(target)
    sparsity = method.figures(root, figures) | {"batch_size": engine.batch_size, "streamed": True}
    sparsity["seconds"] = {**watch.seconds, **seconds}
    return {
        "model": str(source),
        "method": method.name,
        "seed": method.seed,
        "sparsity": sparsity,
        "calibration": dict(texts.description),
        "seconds": sparsity["seconds"],
        "versions": versions(),
    }


def _run(
    method: SparsePass,
    program: Program,
    samples: Samples,
    *,
    layers: LayerwiseSolver,
    weights: StreamingWeights,
    on_block: Callable[[int, int], None] | None,
) -> tuple[dict[str, float], CalibrationEngine]:
    output = weights.output
    cut = method.cut(layers.root, layers.targets, samples)
    options = method.engine_options(program, next(iter(samples.varying.values())).device)
    if output.progress.get("batch_size"):
        options = dataclasses.replace(options, batch_size=int(output.progress["batch_size"]))
    options = dataclasses.replace(options, spill_directory=output.staging)
    engine = CalibrationEngine(cut, samples, options, weights)

    weights.batch_size = lambda: engine.batch_size

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
    seconds = {**engine.seconds, "prepare": layers.prepare_seconds}
    seconds["solve"] -= layers.prepare_seconds
    return seconds, engine


def _figure(data: Mapping[str, Any]) -> LayerFigures:
    empty = {"target": "", "shape": (), "removed": 0.0, "error": 0.0, "tokens": 0, "seconds": 0.0}
    return LayerFigures(**{**empty, **data, "shape": tuple(data.get("shape", ()))})


def _traced(path: Path, reader: ShardReader) -> Program:
    """The model on the meta device in the dtype of its shards, lifted, with experts located."""
    dtypes = {reader.read_dtype(name) for name in list(reader.where)[:8]}
    floating = sorted((d for d in dtypes if d.is_floating_point), key=str)
    program = trace_on_meta(models_of_config(path, floating[0] if floating else None), str(path))
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

    for node in graph_module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, place)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, place)
    graph_module.recompile()
    return graph_module


def _on(program: Program, device: torch.device) -> Any:
    """The interface with examples on the device where the graph will run."""
    examples = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in program.interface.example_inputs.items()
    }
    return dataclasses.replace(program.interface, example_inputs=examples)


def _names_and_values(program: Program, reader: ShardReader) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Which tensor of the checkpoint a parameter is, where the names differ; and buffers that no checkpoint holds."""
    model: Any = program.references["eager"].module
    owners = aliases(model)
    twins: dict[str, list[str]] = {}
    for name, owner in owners.items():
        twins.setdefault(owner, []).append(name)
    names = {
        name: next(twin for twin in twins[owner] if twin in reader.where)
        for name, owner in owners.items()
        if name not in reader.where and any(twin in reader.where for twin in twins[owner])
    }
    initialize_buffers(model, torch.device("cpu"))
    return names, dict(model.named_non_persistent_buffers())


def _require_tensors(root: GraphModule, weights: StreamingWeights) -> None:
    """Everything that the graph reads can be had.

    Raises:
        CheckpointError: the checkpoint lays weights out otherwise than the model class.
        PreconditionError: the graph holds constants that were lost on the meta device.
    """
    needed = {name for name, _ in [*root.named_parameters(remove_duplicate=False), *root.named_buffers()]}
    lifted = weights.checkpoint_names(root)
    lacking = weights.lacking(lifted.get(name, name) for name in needed)
    constants = [name for name in lacking if "lifted_tensor" in name or name.rpartition(".")[2].startswith("_tensor")]
    if constants:
        raise PreconditionError(
            f"the graph reads {constants[0]}, a constant that the model computes when it runs; this model cannot be "
            "streamed: prune it in memory"
        )
    if lacking:
        raise CheckpointError(
            f"the checkpoint has no {min(lacking)} ({len(lacking)} such tensors): it lays weights out otherwise "
            "than the model class (experts one by one, for instance); load it and save it with the class first, or "
            "prune it in memory"
        )


_NO_MATTER = {"memory_bytes", "device_bytes"}  # where activations are kept changes no bit of them


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
