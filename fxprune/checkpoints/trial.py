"""Running a rebuilt model once: whether it runs at all with its shapes, and whether it computes what it must."""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from fxprune.core.errors import CheckpointError
from fxprune.models.skeleton import BUILD_ERRORS
from fxprune.tracing.outputs import named_results

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "ExpectedLogits",
    "cannot_run",
    "prepared",
    "relative_error",
    "run_once",
    "runs_on_meta",
    "tolerance_of",
    "wrong_result",
]

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_ROUNDOFFS = 8
_MOST_SAID = 200


@dataclass(frozen=True)
class ExpectedLogits:
    """What a model gives for some inputs: a reference from outside the class that is to be rebuilt.

    Attributes:
        inputs: keyword arguments of the class's `forward`, without a cache, such as `input_ids` and `attention_mask`
            (batch, length). Lengths that are no head count and a padded row show most.
        logits: the first output for them: logits (batch, length, vocabulary), or what the class gives. Positions that
            `attention_mask` hides are not compared.
        dtype: the dtype that the reference computed in, to which the model is converted before it is compared; None
            where that is the dtype of the weights.
        fixed: integers that no attribute may lose when head counts are looked for. Logits tell a size of a head from a
            number of heads by their values; on the meta device, where they have none, it must be said.
    """

    inputs: Mapping[str, Tensor]
    logits: Tensor
    dtype: torch.dtype | None = None
    fixed: frozenset[int] = frozenset()


def tolerance_of(model: PreTrainedModel) -> float:
    """Allowed relative error: 1e-4 in float32 and float64, eight units of roundoff in lower precision."""
    return 1e-4 if model.dtype in {torch.float32, torch.float64} else _ROUNDOFFS * torch.finfo(model.dtype).eps


def relative_error(model: PreTrainedModel, expected: ExpectedLogits) -> float:
    """Largest absolute difference from the expected logits, divided by the largest of these.

    The model runs with the attention it has, and with eager attention where its class can switch: the two read
    different attributes of a block.

    Args:
        model: a model with weights, in the dtype of the reference; its attention implementation stays as it is.
        expected: the inputs and the logits; on the meta device shapes alone are compared, and a model there is asked.

    Returns:
        The larger of the two errors, or the first if it is too large already; infinite where shapes differ or a result
        is not a number.

    Raises:
        One of `BUILD_ERRORS`: the model cannot run.
    """
    with _experts_that_run(model):
        return _relative_error(model, expected)


@contextmanager
def _experts_that_run(model: PreTrainedModel) -> Iterator[None]:
    """In float64 experts run one by one: torch's grouped product has no kernel for it."""
    before = getattr(model.config, "_experts_implementation", None)
    if before != "grouped_mm" or model.dtype is not torch.float64:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _relative_error(model: PreTrainedModel, expected: ExpectedLogits) -> float:
    if expected.logits.is_meta:  # the other kinds of attention look at the values of masks
        with _eager_attention(model):
            return _error(model, expected)
    error = _error(model, expected)
    if model.config._attn_implementation != "eager" and error <= tolerance_of(model):
        with _eager_attention(model):
            error = max(error, _error(model, expected))
    return error


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run with eager attention; each part has what it had afterwards, as not every part knows every kind."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [(config, config._attn_implementation) for config in configs]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, kind in before:
            config._attn_implementation = kind


def _error(model: PreTrainedModel, expected: ExpectedLogits) -> float:
    device = next(model.parameters()).device
    with torch.no_grad(), named_results(model.config), _numbers_in(model.dtype):
        output = model(**prepared(model, expected.inputs, device, model.dtype))
    got = output.logits if "logits" in output else output[0]
    wanted = expected.logits.to(device)
    if got.shape != wanted.shape:
        return math.inf
    if wanted.is_meta:
        return 0.0
    mask = expected.inputs.get("attention_mask")
    if mask is not None and mask.shape == wanted.shape[:2] and not model.config.is_encoder_decoder:
        seen = mask.to(device).bool()
        got, wanted = got[seen], wanted[seen]
    scale = wanted.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    error = ((got.double() - wanted.double()).abs().max() / scale).item()
    return math.inf if math.isnan(error) else error


@contextmanager
def _numbers_in(dtype: torch.dtype) -> Iterator[None]:
    """Numbers that code turns into tensors have a model's dtype: float32 cannot hold the least float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prepared(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Any]:
    """Inputs on a device, floating ones in a dtype, and without a cache where the class knows one."""
    values: dict[str, Any] = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()
    }
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "use_cache" in parameters or (anything and hasattr(model.config, "use_cache")):
        values["use_cache"] = False
    return values


def runs_on_meta(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Run a skeleton, for what running does to it or shows.

    Args:
        model: on the meta device.
        inputs: what to run, on any device.

    Returns:
        Whether the class can run without values.
    """
    for masked in (True, False):  # code that looks at the values of a mask cannot run without values
        given = {name: tensor for name, tensor in inputs.items() if masked or "mask" not in name}
        try:
            with torch.no_grad(), named_results(model.config):
                model(**prepared(model, given, "meta", model.dtype))
        except BUILD_ERRORS:
            continue
        return True
    return False


def run_once(model: PreTrainedModel, changed: Sequence[str]) -> None:
    """Run a few tokens, so that a shape the class's code cannot work with is found now, with its block.

    Attention is eager, which uses the block's own group counts where a fused kernel takes them from the shapes.

    Args:
        model: a model with weights; its attention stays eager.
        changed: names of the parameters whose shapes changed, for the message.

    Raises:
        CheckpointError: it does not run, or it takes no tokens.
    """
    inputs = _tokens(model)
    model.set_attn_implementation("eager")
    entered: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: entered.append(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), named_results(model.config), _numbers_in(model.dtype):
            model(**prepared(model, inputs, next(model.parameters()).device, model.dtype))
    except BUILD_ERRORS as error:
        remedy = "give `expected` logits, with which head counts can be found; or "
        raise cannot_run(model, entered[-1] if entered else "", changed, error, remedy=remedy) from error
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tokens of a length that is a prime and divides no number in the configuration.

    Code that folds heads it believes in into the sequence axis then fails instead of computing something else.
    """
    if model.main_input_name != "input_ids":
        raise CheckpointError(
            f"{type(model).__name__} takes {model.main_input_name}, of which nothing is known here: give `expected` "
            "inputs and logits, with which the checkpoint can be proved"
        )
    numbers = [value for value in model.config.to_dict().values() if type(value) is int and value > 0]
    length = next((prime for prime in _PRIMES if all(value % prime for value in numbers)), _PRIMES[-1])
    embedding: Any = model.get_input_embeddings()
    ids = torch.arange(length)[None] % embedding.num_embeddings
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def cannot_run(
    model: PreTrainedModel, entered: str, changed: Iterable[str], error: Exception, *, remedy: str = ""
) -> CheckpointError:
    """The error to raise where a class cannot run.

    Args:
        model: the model.
        entered: name of the module that ran when it failed.
        changed: names of the parameters whose shapes changed.
        error: what it raised.
        remedy: what else can be done.
    """
    block, names = entered, list[str]()
    while block and not names:
        block = block.rpartition(".")[0]
        names = [name for name in changed if name.startswith(f"{block}." if block else "")]
    return CheckpointError(
        f"{block or 'model'}: {type(model).__name__} cannot run with the slim shapes of {names[:8]} "
        f"({_first_line(error)}); {remedy}choose other widths or counts, leave this group unpruned, "
        "or export the graph instead"
    )


def _first_line(error: Exception) -> str:
    """What a library says, without its explanations."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= _MOST_SAID else f"{line[:_MOST_SAID]}..."


def wrong_result(model: PreTrainedModel, error: float, how: str) -> CheckpointError:
    """The error to raise where a model runs and computes something else."""
    return CheckpointError(
        f"{type(model).__name__} rebuilt with {how} computes something else than the slim model: the relative error of "
        f"its logits is {error:.3g}, {tolerance_of(model):.3g} is allowed; nothing was written. Leave the "
        "group that the class cannot represent unpruned, or export the graph instead"
    )
