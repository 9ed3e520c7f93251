"""Front end: from a model to a flat FX graph.

Hugging Face models go through `transformers.exporters` in their deployable form (cache, left-padded sample), plain
`nn.Module`s through `torch.export`. Either way the result is a Program whose placeholders are flat tensors.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import TraceError, UsageError
from fxprune.core.program import Program, Source
from fxprune.models.cache_names import cache_of, named_as_taken
from fxprune.models.loading import max_positions
from fxprune.models.savable import require_plain, unsavable_reason, unwrapped
from fxprune.tracing.cache import NEW, PAST
from fxprune.tracing.export import export_hugging_face, export_plain
from fxprune.tracing.flatten import flatten
from fxprune.tracing.found_masks import masks_of_model
from fxprune.tracing.lengths import starts_from_nothing, unheld_length
from fxprune.tracing.sample import sample_inputs
from fxprune.tracing.unreached import find_shared, find_unreached
from fxprune.tracing.whole_sequences import fixed_length, holds_elsewhere, of_one_length, require_causal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from fxprune.core.program import Interface

    _Exported = tuple[torch.export.ExportedProgram, dict[str, Any], tuple[torch.fx.GraphModule, Interface]]

__all__ = ["trace"]

_LOGGER = logging.getLogger(__name__)
_MOST_SAID = 200
"""Characters of a library's own words in a message."""
_LOW = {torch.float16, torch.bfloat16}


def trace(
    model: nn.Module,
    *,
    tokenizer: Any = None,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    name: str | None = None,
    path: Path | None = None,
    length: int | None = None,
) -> Program:
    """Trace a model to a Program.

    Args:
        model: a Hugging Face `PreTrainedModel` or any `nn.Module` that `torch.export` accepts. It is put in
            evaluation mode; its parameters are shared with the Program, not copied. The meta device is fine. Of a
            wrapper that holds a model whole (`torch.compile`, `DataParallel`) the model inside is traced. Tables that
            a cast (`model.half()`) rounded with the weights get back what the class computes, as loading in that
            dtype gives them.
        tokenizer: kept for checkpoints and calibration; tracing does not use it.
        example_inputs: forward arguments by name (or, for a plain module, by position). Hugging Face models need
            none: a small sample of the deployable form is made up. Lengths that may change must be at least 2 in it.
        name: how reports call the model; by default its path or class name.
        path: local directory of the checkpoint the model was loaded from. If it has masks of pruned weights, every
            later pass holds them; without a path they are looked for where `model.config.name_or_path` says that the
            model was loaded from. Masks under which the model has weights that are not zero are not held; a warning
            says so.
        length: tokens of the sample of a causal language model that is traced on whole sequences. It matters where the
            model's code loops over tokens or chunks of them (`Interface.fixed_length`): give the length of the
            calibration samples.

    Returns:
        A Program whose graph calls aten operators, with the model itself kept as the reference `eager`.

    Raises:
        TraceError: no sample could be made or run, torch.export failed, a plain module came without `example_inputs`,
            or a Hugging Face model has other parameters than its class: adapters, parametrizations, quantized weights.
            The message says what to do.
        CheckpointError: the masks in `path` are damaged or of another model.
        UsageError: `length` is below 2.
    """
    if length is not None and length < 2:
        raise UsageError(f"length is {length}: torch.export bakes in lengths of 0 and 1, give at least 2 tokens")
    model = unwrapped(model)
    model.eval()
    hugging_face = hasattr(model, "config") and hasattr(model, "dummy_inputs")
    if hugging_face:
        require_plain(model)
        _restore_tables(model)
    if isinstance(example_inputs, tuple):
        names = list(inspect.signature(model.forward).parameters)
        example_inputs = dict(zip(names, example_inputs, strict=False))
    if example_inputs is None and not hugging_face:
        raise TraceError(
            f"{type(model).__name__} is a plain nn.Module: pass example_inputs= (a tuple or a dict of tensors)"
        )
    try:
        given = None if example_inputs is None else named_as_taken(model, example_inputs)
        exported, inputs, flat = (
            _export_sample(model, length) if given is None else _export_given(model, given, hugging_face)
        )
        causal = hugging_face and _is_causal(model, inputs)
        graph_module, interface = flat
        fixed = None
        if causal and _runs_whole_sequences(inputs):
            fixed = fixed_length(exported)
            if fixed is None and not holds_elsewhere(model, graph_module, interface):
                fixed = inputs["input_ids"].shape[1]
            if fixed is not None and length is not None and example_inputs is None:
                # Another length may unroll other rounds without an equation that tells: it stays fixed.
                inputs, fixed = sample_inputs(model, length, cache=False), length
                graph_module, interface = flatten(export_hugging_face(model, inputs), inputs)
    except Exception as error:  # models and torch.export raise dozens of types; the cause stays attached
        raise _untraceable(model, error, sampled=example_inputs is None) from error
    if fixed is not None:
        require_causal(model, graph_module, interface)
    if causal and "logits" in interface.outputs:
        interface = replace(interface if fixed is None else of_one_length(interface, fixed), causal=True)
    source = None
    if hugging_face:
        source = Source(
            name=name or getattr(model.config, "_name_or_path", "") or type(model).__name__,
            config=model.config,
            model_class=type(model),
            tokenizer=tokenizer,
            generation_config=getattr(model, "generation_config", None),
            path=path,
            unsavable=unsavable_reason(model),
            weight_masks=masks_of_model(model, path),
        )
    unreached, shared = find_unreached(model, graph_module), find_shared(model, graph_module)
    program = Program(graph_module, interface, source=source, unreached=unreached, shared=shared)
    return program.with_reference("eager", model)


def _untraceable(model: nn.Module, error: Exception, *, sampled: bool) -> TraceError:
    """What failed and what to do; `sampled` is whether the example inputs were made up."""
    said = f"{type(error).__name__}: {_first_line(error)}"
    way = (
        "Pass example_inputs= (forward arguments by name) that the model runs with and that need no "
        "data-dependent control flow."
        if sampled
        else "Check that model(**example_inputs) runs, and that its forward has no data-dependent control flow."
    )
    return TraceError(f"torch.export could not trace {type(model).__name__}: {said}. {way}")


def _first_line(error: Exception) -> str:
    """What a library says first; its explanations are in the cause."""
    line = next((each.strip() for each in str(error).splitlines() if each.strip()), "no message")
    return (line if len(line) <= _MOST_SAID else f"{line[:_MOST_SAID]}...").rstrip(".")


def _export_given(model: nn.Module, inputs: dict[str, Any], hugging_face: bool) -> _Exported:
    """Export with the inputs that were given."""
    exported = export_hugging_face(model, inputs) if hugging_face else export_plain(model, (), inputs)
    return exported, inputs, flatten(exported, inputs)


def _export_sample(model: nn.Module, length: int | None) -> _Exported:
    """Export with a made-up sample: whole sequences where a cache does not go into a graph, or not for every length."""
    inputs = sample_inputs(model)
    if cache_of(inputs) is None:
        return _export_given(model, inputs, hugging_face=True)
    try:
        found = _export_given(model, inputs, hugging_face=True)
        why = _unheld(model, found) if _is_causal(model, inputs) else ""
        if not why:
            return found
    except Exception as error:  # noqa: BLE001 - models and torch.export raise dozens of types
        why = _first_line(error)
    _LOGGER.info("%s has no graph with a cache (%s): it is traced on whole sequences", type(model).__name__, why)
    return _export_given(model, sample_inputs(model, length, cache=False), hugging_face=True)


def _unheld(model: nn.Module, found: _Exported) -> str:
    """Why a graph with a cache does not hold for every number of tokens; empty if it does."""
    exported, _, flat = found
    limit = unheld_length(exported, NEW, PAST, max_positions(model.config))
    if limit is not None:
        return f"it takes another path for {limit} tokens"
    return "" if starts_from_nothing(model, *flat) else "it computes something else without a past than with one"


def _restore_tables(model: nn.Module) -> None:
    if all(buffer.dtype not in _LOW or buffer.is_meta for buffer in model.buffers()):
        return
    from fxprune.tracing.rope_tables import restore_tables  # noqa: PLC0415 - imports transformers

    changed = restore_tables(model)
    if changed:
        _LOGGER.info("%s: %s were rounded by a cast and are computed anew", type(model).__name__, ", ".join(changed))


def _runs_whole_sequences(inputs: Mapping[str, Any]) -> bool:
    return "input_ids" in inputs and cache_of(inputs) is None


def _is_causal(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether it is a language model that generates from its input tokens, as its class and configuration say."""
    generates: Any = getattr(model, "can_generate", lambda: False)
    config: Any = model.config
    # An encoder's configuration that was not told to be a decoder; decoders have the field too, and keep a cache.
    both_ways = getattr(config, "is_decoder", True) is False and cache_of(inputs) is None
    return (
        "input_ids" in inputs
        and bool(generates())
        and not getattr(config, "is_encoder_decoder", False)
        and not both_ways
    )
