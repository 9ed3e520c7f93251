"""Front end: from a model to a flat FX graph.

Hugging Face models go through `transformers.exporters` in their deployable form (cache, left-padded sample), plain
`nn.Module`s through `torch.export`. Either way the result is a Program whose placeholders are flat tensors.

A cache goes into the graph where all that it keeps grows with the tokens, as keys and values do: then an empty one is
what a prompt starts from. A state of fixed size (convolution, linear attention, Mamba) is there or is not, and torch
bakes in which; such a model is traced on whole sequences, without a cache.
"""

from __future__ import annotations

import copy
import inspect
import logging
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from torch._C import DispatchKey
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxprune.core.errors import TraceError, UsageError
from fxprune.core.program import CacheEntry, Interface, Program, Source
from fxprune.models.loading import max_positions
from fxprune.models.savable import require_plain, unsavable_reason, unwrapped
from fxprune.tracing.graphs import erase_dead
from fxprune.tracing.lengths import unheld_length
from fxprune.tracing.normalise import normalise
from fxprune.tracing.outputs import named_results
from fxprune.tracing.unreached import find_shared, find_unreached
from fxprune.tracing.weight_masks import masks_of_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["pair_cache", "plain_graph", "sample_inputs", "symbolic_axes", "trace"]

_LOGGER = logging.getLogger(__name__)
_BATCH, _NEW, _PAST = 2, 3, 5
"""Sizes of the sample: pairwise different, and at least 2 because torch.export bakes in lengths of 0 and 1."""
_WHOLE = 11
"""Tokens of a whole sequence: no multiple of a chunk, or the graph would miss how the rest of one is padded."""
_IMAGE = 224
"""Height and width of images where the configuration names none: what image processors give by default."""
_CACHE_DIMS = 4
"""Axes of cached keys and values: batch, heads, length, channels. The keys of an indexer, without heads, have fewer."""
_ELSEWHERE = (3, 23, 41)
"""Numbers of tokens that a graph of whole sequences is run with: fewer than its sample has, and more."""
_UNLIKE = 0.2
"""Share of the largest logit by which another computation differs; rounding stays far below in any precision."""
_UNLIKE_IN_SINGLE, _UNLIKE_IN_HALF = 1e-3, 0.05
"""The same where a graph and its model run the same operators on the same few tokens."""
_MOST_SAID = 200
"""Characters of a library's own words in a message."""
_LENGTHS = (2, 3, 6, 10, *(2**k + 1 for k in range(4, 14)))
"""Numbers of tokens that a graph of whole sequences is asked about: just above the usual sizes of a chunk."""

_LOGGER = logging.getLogger(__name__)
_broadcast: Any = torch.broadcast_shapes
_agree: Any = torch._check

_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


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
        if example_inputs is None:
            exported, inputs = _export_sample(model, length)
        else:
            inputs = dict(example_inputs)
            exported = _export_hugging_face(model, inputs) if hugging_face else _export_plain(model, (), inputs)
        causal = hugging_face and _is_causal(model, inputs)
        whole = causal and _runs_whole_sequences(inputs)
        fixed = _fixed_length(exported) if whole else None
        if whole and fixed is None and not _holds_elsewhere(model, *_flatten(exported, inputs)):
            fixed = _FixedLength(inputs["input_ids"].shape[1])
        if fixed is not None and length is not None and example_inputs is None:
            # What one length has unrolled, another may have unrolled without an equation that tells: it stays fixed.
            inputs = sample_inputs(model, length, cache=False)
            exported = _export_hugging_face(model, inputs)
            fixed = _FixedLength(length)
        graph_module, interface = _flatten(exported, inputs)
    except Exception as error:  # models and torch.export raise dozens of types; the cause stays attached
        said = f"{type(error).__name__}: {_first_line(error)}"
        way = (
            "Check that model(**example_inputs) runs, and that its forward has no data-dependent control flow."
            if example_inputs is not None
            else "Pass example_inputs= (forward arguments by name) that the model runs with and that need no "
            "data-dependent control flow."
        )
        raise TraceError(f"torch.export could not trace {type(model).__name__}: {said}. {way}") from error
    if fixed is not None:
        _require_causal(model, graph_module, interface)
    if causal and "logits" in interface.outputs:
        interface = _as_language_model(interface, fixed)
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


def _first_line(error: Exception) -> str:
    """What a library says first; its explanations are in the cause."""
    line = next((each.strip() for each in str(error).splitlines() if each.strip()), "no message")
    return (line if len(line) <= _MOST_SAID else f"{line[:_MOST_SAID]}...").rstrip(".")


def _restore_tables(model: nn.Module) -> None:
    from fxprune.tracing.rope_tables import restore_tables  # noqa: PLC0415 - imports transformers

    changed = restore_tables(model)
    if changed:
        _LOGGER.info("%s: %s were rounded by a cast and are computed anew", type(model).__name__, ", ".join(changed))


@dataclass(frozen=True)
class _FixedLength:
    """A graph of whole sequences that holds for one length."""

    length: int


def _fixed_length(exported: torch.export.ExportedProgram) -> _FixedLength | None:
    """Whether the graph of whole sequences holds for its own number of tokens only.

    Where a model's code loops over tokens or chunks, torch notes how many rounds it has unrolled: an equation of the
    length, which other lengths break. (Inequalities decide about shapes that broadcast, and hold more than they say.)
    """
    tokens = next(node for node in exported.graph.nodes if node.op == "placeholder" and node.name == "input_ids")
    size = tokens.meta["val"].shape[1]
    if not isinstance(size, torch.SymInt) or is_concrete_int(size):
        return _FixedLength(int(size))
    symbol, environment = size.node.expr, size.node.shape_env
    equations = [
        g.expr
        for g in environment.guards
        if g.expr.free_symbols == {symbol} and g.expr.is_Relational and g.expr.rel_op == "=="
    ]
    allowed = exported.range_constraints.get(symbol)
    broken = [
        length
        for length in _LENGTHS
        if any(equation.subs(symbol, length) == False for equation in equations)  # noqa: E712 - sympy's false
        or (allowed is not None and length > 2 and not allowed.lower <= length <= allowed.upper)
    ]
    if not broken:
        return None
    length = int(size.node.hint)
    return _FixedLength(length)


def _holds_elsewhere(model: nn.Module, graph_module: torch.fx.GraphModule, interface: Interface) -> bool:
    """Whether a graph of whole sequences runs other lengths too, and gives what the model gives for them.

    Not every number of chunks that was unrolled leaves an equation behind.
    """
    ids = interface.example_inputs["input_ids"]
    if not {*interface.inputs} <= {"input_ids", "attention_mask", "position_ids"} or "logits" not in interface.outputs:
        return True  # whoever gave such a sample knows its lengths
    for length in _ELSEWHERE:
        tokens = ids.new_ones(1, length) if ids.is_meta else _tokens(model.config, length, ids.device)[:1]
        made = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "position_ids": torch.arange(length, device=ids.device).unsqueeze(0),
        }
        given = {name: made[name] for name in interface.inputs}
        with torch.no_grad(), named_results(model.config):
            try:
                got = dict(zip(interface.outputs, graph_module(*given.values()), strict=True))["logits"]
            except RuntimeError:
                return False
            if ids.is_meta:
                continue
            wanted = model(**given, use_cache=False).logits
        if got.shape != wanted.shape or float((got - wanted).abs().max()) > _UNLIKE * float(wanted.abs().max()):
            return False
    return True


def _as_language_model(interface: Interface, fixed: _FixedLength | None) -> Interface:
    """Say that the graph is a causal language model; of one length, no axis of that length is dynamic."""
    if fixed is None:
        return replace(interface, causal=True)
    ids = interface.dynamic_axes["input_ids"]
    rows = ids.get(0)
    axes = {
        name: {axis: symbol for axis, symbol in of.items() if axis == 0 or symbol == rows}
        for name, of in interface.dynamic_axes.items()
    }
    return replace(interface, causal=True, dynamic_axes=axes, fixed_length=fixed.length)


def _runs_whole_sequences(inputs: Mapping[str, Any]) -> bool:
    return "input_ids" in inputs and "past_key_values" not in inputs


def _is_causal(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether it is a language model that generates from its input tokens, as its class and configuration say."""
    generates: Any = getattr(model, "can_generate", lambda: False)
    config: Any = model.config
    # An encoder's configuration that was not told to be a decoder; decoders have the field too, and keep a cache.
    both_ways = getattr(config, "is_decoder", True) is False and "past_key_values" not in inputs
    return (
        "input_ids" in inputs
        and bool(generates())
        and not getattr(config, "is_encoder_decoder", False)
        and not both_ways
    )


def _export_sample(model: nn.Module, length: int | None) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Export with a made-up sample: whole sequences where a cache does not go into a graph, or not for every length.

    Returns:
        The program, and the sample that it was exported with.
    """
    inputs = sample_inputs(model)
    if "past_key_values" not in inputs:
        return _export_hugging_face(model, inputs), inputs
    try:
        exported = _export_hugging_face(model, inputs)
        limit = unheld_length(exported, _NEW, _PAST, max_positions(model.config)) if _is_causal(model, inputs) else None
        why = "" if limit is None else f"it takes another path for {limit} tokens"
        if not why and _is_causal(model, inputs) and not _starts_from_nothing(model, *_flatten(exported, inputs)):
            why = "it computes something else without a past than with one"
        if not why:
            return exported, inputs
    except Exception as error:  # noqa: BLE001 - models and torch.export raise dozens of types
        why = _first_line(error)
    _LOGGER.info("%s has no graph with a cache (%s): it is traced on whole sequences", type(model).__name__, why)
    whole = sample_inputs(model, length, cache=False)
    return _export_hugging_face(model, whole), whole


def _starts_from_nothing(model: nn.Module, graph_module: torch.fx.GraphModule, interface: Interface) -> bool:
    """Whether a graph with a cache gives for a prompt, with an empty one, what the model gives for it.

    The sample has a past, and code that asks whether there is one has its answer baked into the graph.
    """
    caches = {entry.input for entry in interface.cache}
    ids = interface.example_inputs.get("input_ids")
    texts = {*interface.inputs} - caches <= {"input_ids", "attention_mask", "position_ids"}
    if ids is None or ids.is_meta or not caches or not texts or "logits" not in interface.outputs:
        return True
    tokens, mask = _tokens(model.config, _PAST, ids.device), _left_padded(_BATCH, _PAST, ids.device)
    made = {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": torch.arange(_PAST, device=ids.device).repeat(_BATCH, 1),
    }
    empty = {name: interface.example_inputs[name][:, :, :0] for name in caches}
    given = {name: made[name] for name in interface.inputs if name in made}
    with torch.no_grad(), named_results(model.config):
        got = graph_module(*(({**given, **empty})[name] for name in interface.inputs))
        wanted = model(**given, use_cache=False).logits
    seen = mask.bool()
    error = (dict(zip(interface.outputs, got, strict=True))["logits"] - wanted)[seen].abs().max()
    allowed = _UNLIKE_IN_HALF if wanted.dtype in {torch.bfloat16, torch.float16} else _UNLIKE_IN_SINGLE
    return not float(error) > allowed * float(wanted[seen].abs().max())


def _require_causal(model: nn.Module, graph_module: torch.fx.GraphModule, interface: Interface) -> None:
    """Raise if tokens of a graph for one length depend on the padding behind them, with which shorter text is run."""
    examples = interface.example_inputs
    ids = examples.get("input_ids")
    if ids is None or ids.is_meta or "logits" not in interface.outputs:
        return
    length = ids.shape[1]
    half = length // 2
    padded = {
        name: torch.nn.functional.pad(each[:, :half], (0, length - half)) if each.shape == ids.shape else each
        for name, each in examples.items()
    }
    with torch.no_grad():
        whole, part = (
            dict(zip(interface.outputs, graph_module(*given.values()), strict=True))["logits"][:, :half]
            for given in (examples, padded)
        )
    mask = examples.get("attention_mask")
    seen = torch.ones_like(ids[:, :half], dtype=torch.bool) if mask is None else mask[:, :half].bool()
    if float((whole - part)[seen].abs().max()) > _UNLIKE * float(whole[seen].abs().max()):
        raise TraceError(
            f"{type(model).__name__} has a graph for {length} tokens only, and it reads tokens ahead, so that shorter "
            "text cannot be run with padding behind it; give example_inputs= with which its code runs every length"
        )


def sample_inputs(model: nn.Module, length: int | None = None, *, cache: bool = True) -> dict[str, Any]:
    """Make up a small sample of a Hugging Face model's deployable form.

    Causal language models get tokens, a left-padded mask, positions and, if it grows with the tokens, a cache; encoders
    get what their signature asks for among tokens, pixels and decoder tokens.

    Args:
        model: a `PreTrainedModel`, on any device, meta included.
        length: tokens of a causal language model that gets no cache; a few when None.
        cache: whether a causal language model gets one if it can.

    Returns:
        Keyword arguments of `model.forward`.
    """
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    first = next(model.parameters())
    device = first.device
    # Outputs have names in the graph; a model that returns tuples by default is asked for them.
    named = {"return_dict": True} if getattr(config, "return_dict", True) is False else {}
    if "pixel_values" in parameters and "input_ids" not in parameters:
        size: Any = _of_images(config, "image_size", _IMAGE)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        # Noise: what is blank gives every patch the same numbers, and hides what differs between them.
        generator = torch.Generator().manual_seed(0)
        channels: Any = _of_images(config, "num_channels", 3)
        pixels = torch.randn(_BATCH, channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(device, first.dtype), **named}
    generates: Any = getattr(model, "can_generate", lambda: False)
    if getattr(config, "is_encoder_decoder", False):
        # A classifier shifts the encoder's tokens for its decoder, and looks for their end in what that gives.
        decoder = {"decoder_input_ids": _tokens(config, _NEW, device)} if generates() else {}
        return {
            "input_ids": _tokens(config, _PAST, device),
            "attention_mask": _left_padded(_BATCH, _PAST, device),
            **decoder,
            "use_cache": False,
            **named,
        }
    no_cache = {"use_cache": False} if {"use_cache", "past_key_values"} & set(parameters) else {}
    if not generates():
        mask = _left_padded(_BATCH, _NEW, device)
        return {"input_ids": _tokens(config, _NEW, device), "attention_mask": mask, **no_cache, **named}
    filled = _growing_cache(model) if cache and "past_key_values" in parameters else None
    past, new = (0, length or _WHOLE) if filled is None else (_PAST, _NEW)
    inputs = {"input_ids": _tokens(config, new, device), "attention_mask": _left_padded(_BATCH, past + new, device)}
    if "position_ids" in parameters:
        inputs["position_ids"] = torch.arange(past, past + new, device=device).repeat(_BATCH, 1)
    rest = no_cache if filled is None else {"past_key_values": filled, **_asked_for_cache(parameters, config)}
    inputs = {name: tensor for name, tensor in inputs.items() if _takes(parameters, name)}
    return {**inputs, **rest, **named}


def _of_images(config: Any, name: str, otherwise: int) -> Any:
    """A field about images, of the model or of its vision part; convolutional classes name no size, and take any."""
    parts = (config, getattr(config, "vision_config", None))
    return next((found for part in parts if (found := getattr(part, name, None)) is not None), otherwise)


def _asked_for_cache(parameters: Mapping[str, inspect.Parameter], config: Any) -> dict[str, Any]:
    """A configuration may want no cache, as those that training writes do; the graph has one all the same."""
    off = getattr(config, "use_cache", True) is False and _takes(parameters, "use_cache")
    return {"use_cache": True} if off else {}


def _takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def _tokens(config: Any, length: int, device: torch.device) -> Tensor:
    vocabulary = getattr(config.get_text_config(), "vocab_size", 2) or 2
    return torch.randint(0, vocabulary, (_BATCH, length), generator=torch.Generator().manual_seed(0)).to(device)


def _left_padded(batch: int, length: int, device: torch.device) -> Tensor:
    """A mask with one padded row: an all-ones mask can vanish from the graph."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    return mask.to(device)


def _cache(model: nn.Module, batch: int, length: int) -> Any:
    """A cache filled by the model itself, so that every model's own layout comes out right; None if it returns none.

    It is filled as the exporter traces it, sliding windows with all their tokens.
    """
    from transformers.exporters.utils import apply_patches  # noqa: PLC0415 - heavy, Hugging Face path only

    device = next(model.parameters()).device
    tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
    # On the meta device neither a mask nor tokens have values that could be looked at.
    mask = {} if device.type == "meta" else {"attention_mask": torch.ones_like(tokens)}
    padding = _without_padding(model.config) if device.type == "meta" else nullcontext()
    with torch.no_grad(), _quiet_exporter(), apply_patches("dynamo"), padding, named_results(model.config):
        output = model(input_ids=tokens, **mask, use_cache=True)
    return getattr(output, "past_key_values", None)


@contextmanager
def _without_padding(config: Any) -> Iterator[None]:
    """Without a mask some models look for padding among the tokens: here there is no such token.

    The field is set behind the back of configurations that check what they are given, and set back.
    """
    fields = vars(config)
    padding = fields.get("pad_token_id")
    if padding is not None:
        fields["pad_token_id"] = None
    try:
        yield
    finally:
        if padding is not None:
            fields["pad_token_id"] = padding


def _growing_cache(model: nn.Module) -> Any:
    """A filled cache if every tensor of it grows with the tokens; None if the model keeps a state of fixed size."""
    try:
        cache = _cache(model, _BATCH, _PAST)
        if cache is None:
            return None
        axes = _dynamic_axes_of_cache(model, cache)
    except (AttributeError, TypeError, ValueError) as error:
        # It may run without one all the same; if not, that error says more.
        _LOGGER.warning("%s makes no cache (%s); it is traced on whole sequences", type(model).__name__, error)
        return None
    grows = all(len(changing) != 1 for changing in axes)  # of a state, the batch alone changes
    plain = all(leaf.dim() == _CACHE_DIMS for leaf, of in zip(pytree.tree_leaves(cache), axes, strict=True) if of)
    return cache if any(axes) and grows and plain else None


def _dynamic_axes_of_cache(model: nn.Module, cache: Any) -> list[dict[int, Any]]:
    """Which axes of each cache tensor follow batch and length: those that change when both change."""
    from transformers.exporters.exporter_dynamo import (  # noqa: PLC0415 - heavy, Hugging Face path only
        register_cache_pytrees_for_model,
    )

    register_cache_pytrees_for_model(model)
    other = pytree.tree_leaves(_cache(model, _BATCH + 1, _PAST + 2))
    return [
        {axis: torch.export.Dim.AUTO for axis in range(mine.dim()) if mine.shape[axis] != yours.shape[axis]}
        for mine, yours in zip(pytree.tree_leaves(cache), other, strict=True)
    ]


def _export_hugging_face(model: nn.Module, inputs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Export through transformers' own exporter, which knows the library's untraceable corners."""
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter  # noqa: PLC0415 - heavy

    from fxprune.tracing.rope_tables import stateless_rope  # noqa: PLC0415 - imports transformers

    shapes: dict[str, Any] = {}
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            floating = value.is_floating_point()
            axes = [0] if floating else range(value.dim())
            shapes[key] = dict.fromkeys(axes, torch.export.Dim.AUTO)
        elif key == "past_key_values":
            shapes[key] = _dynamic_axes_of_cache(model, value)
    device = next(model.parameters()).device
    lists = _ListsAsSlices() if device.type == "meta" else nullcontext()
    with _quiet_exporter(), _cheap_shapes(device), lists, stateless_rope(model):
        config = DynamoConfig(dynamic=True, dynamic_shapes=shapes)
        exported: torch.export.ExportedProgram = DynamoExporter().export(model, dict(inputs), config).program
    return exported


class _ListsAsSlices(TorchFunctionMode):
    """Takes `x[:, [-2]]` for `x[:, -2:-1]`: what torch makes of a list for a meta tensor has lost its values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        if func is torch.Tensor.__getitem__:
            args = (args[0], _lists_as_slices(args[1]))
        return func(*args, **(kwargs or {}))


def _lists_as_slices(index: Any) -> Any:
    """The same index with its only list, if that is a run of positions and the rest are slices, as a slice."""
    items = index if isinstance(index, tuple) else (index,)
    lists = [item for item in items if isinstance(item, list)]
    rest = all(item is None or item is Ellipsis or isinstance(item, (slice, list)) for item in items)
    if len(lists) != 1 or not rest or not all(type(position) is int for position in lists[0]) or not lists[0]:
        return index
    start, end = lists[0][0], lists[0][-1] + 1
    if lists[0] != list(range(start, end)) or start < 0 < end:
        return index
    return tuple(slice(start, end or None) if item is lists[0] else item for item in items)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns that it is experimental each time; our verification makes that warning moot."""
    logger = logging.getLogger("transformers.exporters")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _cheap_shapes(device: torch.device) -> Iterator[None]:
    """Halve the time that export spends on symbolic shapes; the graph is the same.

    Attention and Linears are decomposed to find the shape of their result: for attention a dozen products and reshapes
    with symbolic sizes for one node of the graph. Their shape rules say the same. The cache of fake results costs more
    than it saves where sizes are symbols.
    """
    key = DispatchKey.CompositeImplicitAutograd
    rules: dict[Any, Any] = {torch.ops.aten.linear.default: _shape_of_linear}
    if device.type in {"cpu", "meta"}:  # elsewhere kernels choose the layout of the result
        rules[torch.ops.aten.scaled_dot_product_attention.default] = _shape_of_attention
    rules = {op: rule for op, rule in rules.items() if key not in op.py_kernels}
    for op, rule in rules.items():
        op.py_impl(key)(rule)
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        for op in rules:
            del op.py_kernels[key]
            op._dispatch_cache.clear()


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The result of `linear` without its values."""
    _agree(x.shape[-1] == weight.shape[1])
    _agree(bias is None or bias.shape[0] == weight.shape[0])
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _shape_of_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> Tensor:
    """The result of `scaled_dot_product_attention` without its values; sizes that must agree are made to."""
    heads = query.shape[-3:-2] if options.get("enable_gqa") else None
    keys, values = ((*t.shape[:-3], *(heads or t.shape[-3:-2])) for t in (key, value))
    batch = _broadcast(query.shape[:-2], keys, values)
    _agree(query.shape[-1] == key.shape[-1])
    _agree(key.shape[-2] == value.shape[-2])
    if attn_mask is not None:
        _broadcast((*batch, query.shape[-2], key.shape[-2]), attn_mask.shape)
    return query.new_empty((*batch, query.shape[-2], value.shape[-1]))


def _export_plain(model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Export a plain module: every axis but the last of a floating input may change, where the module lets it."""
    shapes = {
        key: dict.fromkeys(range(max(1, value.dim() - value.is_floating_point())), torch.export.Dim.AUTO)
        if isinstance(value, torch.Tensor) and value.dim()
        else None
        for key, value in inputs.items()
    }
    with torch.no_grad():
        return torch.export.export(model, args, kwargs=copy.copy(inputs), dynamic_shapes=shapes, strict=False)


def _flatten(exported: torch.export.ExportedProgram, inputs: dict[str, Any]) -> tuple[torch.fx.GraphModule, Interface]:
    """Take the graph out of its pytree clothes: flat tensors in, flat tuple out, names from the trees."""
    graph_module: torch.fx.GraphModule = exported.module(check_guards=False)
    plain_graph(graph_module)
    graph = graph_module.graph
    names = _output_names(exported)
    kept = _drop_passed_through(graph, names)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    examples = {node.name: leaf for node, leaf in zip(placeholders, leaves, strict=True)}
    for node in [node for node in placeholders if not node.users and node.name in names]:
        del examples[node.name]
        placeholders.remove(node)
        graph.erase_node(node)
    axes = {node.name: symbolic_axes(node) for node in placeholders}
    interface = Interface(examples, axes, kept, pair_cache(examples, kept))
    # A fresh module: the exported one carries a hook that checks inputs against the original signature.
    return torch.fx.GraphModule(graph_module, graph), interface


def plain_graph(graph_module: torch.fx.GraphModule) -> None:
    """Take pytrees, assertions and guards out of an exported graph, in place, and normalise it."""
    graph = graph_module.graph
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTIONS:
            graph.erase_node(node)
    for node in [node for node in graph.nodes if node.op == "call_module" and node.target == "_guards_fn"]:
        graph.erase_node(node)
    erase_dead(graph)
    normalise(graph_module)


def symbolic_axes(placeholder: torch.fx.Node) -> dict[int, str]:
    """The axes of an exported graph's input whose length may change, with the names of their symbols."""
    return {
        axis: str(size)
        for axis, size in enumerate(placeholder.meta["val"].shape)
        if isinstance(size, torch.SymInt) and not is_concrete_int(size)
    }


def _output_names(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Name each output after its path in the returned structure: `logits`, `past_key_values_0`, ..."""
    spec = exported.call_spec.out_spec
    assert spec is not None
    placeholder = [object() for _ in range(spec.num_leaves)]
    children = spec.children() if hasattr(spec, "children") else spec.children_specs
    context = spec.context
    keys = context if isinstance(context, list) else context[0] if isinstance(context, tuple) and context else None
    if not isinstance(keys, list) or len(keys) != len(children):
        keys = [f"output_{index}" for index in range(len(children))] if children else ["output_0"]
    names: list[str] = []
    for key, child in zip(keys, children or [spec], strict=True):
        leaves = child.num_leaves
        names += [str(key)] if leaves == 1 and child.is_leaf() else [f"{key}_{index}" for index in range(leaves)]
    assert len(names) == len(placeholder)
    return tuple(names)


def _by_products(names: tuple[str, ...], inputs: set[str]) -> set[str]:
    """What a model with logits returns beside them: hidden states, and caches that it does not take back."""
    return {name for name in names if name != "logits" and name not in inputs} if "logits" in names else set()


def _drop_passed_through(graph: torch.fx.Graph, names: tuple[str, ...]) -> tuple[str, ...]:
    """Drop by-products, and inputs handed back untouched (token counters of some caches); return the names left."""
    dropped = _by_products(names, {node.name for node in graph.nodes if node.op == "placeholder"})
    output = next(node for node in graph.nodes if node.op == "output")
    values = output.args[0]
    assert isinstance(values, (list, tuple))
    kept = [
        (name, value)
        for name, value in zip(names, values, strict=True)
        if name not in dropped
        and not (isinstance(value, torch.fx.Node) and value.op == "placeholder" and list(value.users) == [output])
    ]
    output.args = (tuple(value for _, value in kept),)
    erase_dead(graph)
    return tuple(name for name, _ in kept)


def pair_cache(examples: Mapping[str, Tensor], outputs: tuple[str, ...]) -> tuple[CacheEntry, ...]:
    """Cache tensors are those that come in and go out under one name; keys and values alternate."""
    both = [name for name, leaf in examples.items() if name in outputs and leaf.dim() == 4]
    return tuple(
        CacheEntry(input=name, output=name, layer=index // 2, kind="value" if index % 2 else "key")
        for index, name in enumerate(both)
    )
