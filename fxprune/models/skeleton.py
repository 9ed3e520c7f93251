"""Skeletons: models of the right class and the slim shapes, on the meta device, so that no dense weight is allocated.

A skeleton is what the class builds from a configuration. Where layers differ, every decoder block is constructed with
the configuration of its own layer, so everything that a block derives from the configuration (head counts, groups for
`repeat_kv`, split sizes) is right. What no configuration field can say, a narrower Linear or an added bias, is then
changed on the module itself.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as hf_init
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from fxprune.core.errors import CheckpointError
from fxprune.models import MODEL_TYPE
from fxprune.models.build_limits import check_depth
from fxprune.models.config_fields import get_field, has_field, path_of, readable, set_field
from fxprune.models.mixed_config import NOT_READ, is_mixed, stock_layers_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = [
    "BUILD_ERRORS",
    "Shape",
    "aliases",
    "build_layered_skeleton",
    "build_skeleton",
    "config_with",
    "construct_layers",
    "fill_skeleton",
    "initialize_buffers",
    "is_aligned",
    "layer_config_path",
    "layer_list",
    "outer_lists",
    "read_config",
    "resize_projections",
    "resolve_model_class",
    "runs_grouped",
    "state_shapes",
]

Shape = tuple[int, ...]

BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What configuration and model constructors raise when values do not fit together."""

# Taken from the model's own configuration every time a block runs, because users switch them on the model.
_FOLLOWED = ("_attn_implementation", "_experts_implementation")
# Not the dense configuration's own: what kernels run is not for a checkpoint to choose, and the rest has other readers.
_NOT_READ = (*NOT_READ, "fxprune", "base_model_type")
_GROUPED_ALIGNMENT = 16  # bytes; torch.nn.functional.grouped_mm refuses rows of other strides


def read_config(path: Path) -> PreTrainedConfig:
    """Read a `config.json` whose model type transformers knows; what it says of a mixed model is left out.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, is not a JSON object, names no known model type, or its class refuses it.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; the directory is not a whole checkpoint") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); write the checkpoint again") from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type == MODEL_TYPE:
        model_type = values.get("base_model_type")
        values["per_layer_config"] = stock_layers_of(values)
        if values["per_layer_config"] is None:
            del values["per_layer_config"]
    if not isinstance(model_type, str) or model_type == MODEL_TYPE or model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: this version of transformers has no model_type {model_type!r}; upgrade transformers (code that "
            "comes with a checkpoint is never run)"
        )
    values = {key: _with_floats(value) for key, value in readable(values, _NOT_READ).items()}
    values["model_type"] = model_type
    check_depth(values, path)
    try:
        return CONFIG_MAPPING[model_type].from_dict(values)
    except BUILD_ERRORS as error:
        raise CheckpointError(f"{path}: the configuration class refuses these values: {error}") from error


def _with_floats(value: Any) -> Any:
    """Floats that JSON has no word for, as transformers writes them: `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in {"Infinity", "-Infinity", "NaN"}:
            return float(value["__float__"])
        return {key: _with_floats(one) for key, one in value.items()}
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def resolve_model_class(config: PreTrainedConfig, architecture: str) -> type[PreTrainedModel]:
    """Find a model class by name among those that transformers has for the configuration's class.

    These are the classes that an auto mapping gives for it, and transformers' own class of this name that is built from
    it: a mapping may name a class for a whole configuration that is built from its text part.

    Args:
        config: the configuration.
        architecture: name of the class, as in `architectures[0]` of a `config.json`.

    Raises:
        CheckpointError: transformers has no class of this name for this configuration.
    """
    for mapping in vars(modeling_auto).values():
        if not isinstance(mapping, _LazyAutoMapping):
            continue
        found = mapping.get(type(config), ())
        for candidate in found if isinstance(found, tuple) else (found,):
            # Case does not count: published configurations have LLaMAForCausalLM and PhiMoEForCausalLM.
            same = getattr(candidate, "__name__", "").lower() == architecture.lower()
            if same and issubclass(candidate, PreTrainedModel):
                model_class: type[PreTrainedModel] = candidate
                return model_class
    if own := _own_class(config, architecture):
        return own
    raise CheckpointError(
        f"transformers maps {type(config).__name__} to no model class called {architecture!r}; checkpoints are written "
        "and read for classes of transformers' auto mappings only, and no other code is imported"
    )


def _own_class(config: PreTrainedConfig, architecture: str) -> type[PreTrainedModel] | None:
    """Transformers' own class of a name that some auto mapping knows, if it is built from the configuration's class."""
    known = {
        name
        for mapping in vars(modeling_auto).values()
        if isinstance(mapping, _LazyAutoMapping)
        for value in mapping._model_mapping.values()
        for name in (value if isinstance(value, tuple | list) else (value,))
    }
    found: Any = getattr(transformers, architecture, None) if architecture in known else None
    own = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if own and found.config_class is type(config) else None


def config_with(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Return an independent copy with some fields changed and without a mixed model's layers; it is not validated.

    Fields of nested configurations have dotted names. Layers that the configuration class itself tells apart stay.
    """
    changed = copy.deepcopy(config)
    if is_mixed(changed) and changed.slim_record.stock_layers is None:
        changed.per_layer_config = None
    for name, value in overrides.items():
        set_field(changed, name, value)
    return changed


def build_skeleton(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build a model on the meta device, tied as its configuration says, with nothing allocated or initialised.

    Args:
        model_class: the class.
        config: its configuration; the model gets a copy, without per-layer fields unless it is a mixed model's.
        dtype: floating dtype of parameters and buffers; by default the configuration's, else float32.

    Returns:
        The model in evaluation mode.

    Raises:
        One of `BUILD_ERRORS`: the class cannot be built from this configuration.
    """
    config = copy.deepcopy(config) if is_mixed(config) else config_with(config, {})
    with torch.device("meta"), hf_init.no_init_weights():
        # The method behind AutoModel.from_config, which would choose the class itself.
        model = model_class._from_config(config, dtype=dtype or config.dtype or torch.float32)
    _move_to_meta(model)
    model.tie_weights()
    return model.eval()


def _move_to_meta(model: nn.Module) -> None:
    """Parameters that a class draws with functions that no device is the default of, such as `torch.normal`."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(owner), attribute, empty)


def aliases(model: nn.Module) -> dict[str, str]:
    """Map every name in the model's state to the first name of the same tensor: tied weights share one."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def state_shapes(model: nn.Module) -> dict[str, Shape]:
    """Shapes of parameters and persistent buffers; a tied weight appears once, under its first name."""
    state = model.state_dict(keep_vars=True)
    return {name: tuple(state[name].shape) for name, owner in aliases(model).items() if name == owner}


def layer_list(model: PreTrainedModel) -> str | None:
    """Qualified name of the module list that holds the decoder layers, or None if there is no single one.

    It is the outermost `ModuleList` with one module, of one class, for each of the configuration's hidden layers. Where
    configurations are nested, that of the text decides, and the list lies in a module that was built from one like it.
    """
    text = get_field(model.config, layer_config_path(model)) if layer_config_path(model) else model.config
    depth = getattr(text, "num_hidden_layers", None)
    found = [
        name
        for name, layers in outer_lists(model).items()
        if len(layers) == depth and isinstance(_config_around(model, name), type(text))
    ]
    return found[0] if len(found) == 1 else None


def layer_config_path(model: PreTrainedModel) -> str:
    """Dotted name of the configuration that decoder layers are built from; empty where it is the model's own."""
    return path_of(model.config, model.config.get_text_config())


def _config_around(model: PreTrainedModel, name: str) -> PreTrainedConfig:
    """The configuration of the innermost module that holds the one called `name` and has any."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return model.config


def outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The module lists with parameters that lie in no other one, by qualified name: stacks of layers, mostly."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not nested and any(True for _ in module.parameters()):
            found[name] = module
    return found


class _FollowModel:
    """Forward pre-hook of a block: the block's configuration uses the attention kernels that the model's names."""

    def __init__(self, model_config: PreTrainedConfig, layer_config: PreTrainedConfig) -> None:
        self.model_config = model_config
        self.layer_config = layer_config

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        _follow(self.model_config, self.layer_config)


def _follow(model_config: PreTrainedConfig, layer_config: PreTrainedConfig) -> None:
    for name in _FOLLOWED:
        value = getattr(model_config, name, None)
        if getattr(layer_config, name, None) != value:
            setattr(layer_config, name, value)


def build_layered_skeleton(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    overrides: Mapping[int, Mapping[str, int]],
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Build a skeleton whose layers have configurations of their own.

    Modules of a block keep their layer's configuration, for those that read it while running; only the choice of
    kernels follows the model's. The model's own configuration is the dense one.

    Args:
        model_class: the class.
        config: the dense configuration.
        overrides: for each layer index that differs, configuration fields with their values; fields of a nested
            configuration have dotted names.
        dtype: as for `build_skeleton`.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: the layers cannot be found, an index or a field does not exist, or the class refuses an
            override.
        One of `BUILD_ERRORS`: the class cannot be built from the dense configuration.
    """
    plain = build_skeleton(model_class, config, dtype)
    if not overrides:
        return plain
    # The plain model's configuration: the kernels are resolved in it.
    return construct_layers(plain, plain.config, overrides, lambda: build_skeleton(model_class, plain.config, dtype))


def construct_layers(
    plain: PreTrainedModel,
    config: PreTrainedConfig,
    overrides: Mapping[int, Mapping[str, int]],
    construct: Callable[[], PreTrainedModel],
) -> PreTrainedModel:
    """Construct a model whose layers have configurations of their own.

    Args:
        plain: the model without them, on the meta device: it shows where the layers are.
        config: the configuration that the model is constructed with.
        overrides: for each layer index that differs, configuration fields with their values.
        construct: constructs it.

    Returns:
        What `construct` returns.

    Raises:
        CheckpointError: the layers cannot be found, an index or a field does not exist, or the class refuses an
            override.
    """
    class_name = type(plain).__name__
    name = layer_list(plain)
    if name is None:
        raise CheckpointError(f"{class_name} has no single list of layers, so layers cannot be overridden")
    blocks = list(plain.get_submodule(name).children())
    for index, fields in overrides.items():
        if not 0 <= index < len(blocks) or not all(has_field(plain.config, field) for field in fields):
            raise CheckpointError(
                f"layer override {index}: {dict(fields)} does not fit {type(plain.config).__name__} with {len(blocks)} "
                "layers; config.json and fxprune.json do not belong together"
            )
    built: list[nn.Module] = []
    try:
        configs = [config_with(config, overrides.get(index, {})) for index in range(len(blocks))]
        path = layer_config_path(plain)
        if path:
            configs = [get_field(each, path) for each in configs]
        with _constructing({type(block) for block in blocks}, configs, built):
            model = construct()
    except BUILD_ERRORS as error:
        index = max(len(built) - 1, 0)
        fields = dict(overrides.get(index, {}))
        raise CheckpointError(f"{name}.{index}: {class_name} cannot be built with {fields}: {error}") from error
    layers = list(model.get_submodule(name).children())
    if len(built) != len(layers) or any(block is not layer for block, layer in zip(built, layers, strict=True)):
        raise CheckpointError(f"{class_name} does not construct the blocks of {name} one by one, in order")
    own = get_field(model.config, path) if path else model.config
    for layer, layer_config in zip(layers, configs, strict=True):
        layer.register_forward_pre_hook(_FollowModel(own, layer_config))
    return model


@contextmanager
def _constructing(
    block_classes: set[type[nn.Module]], configs: Sequence[PreTrainedConfig], built: list[nn.Module]
) -> Iterator[None]:
    """Give every block that this thread constructs the configuration of its layer, in order; append it to `built`.

    Building a whole model for every distinct layer would say the same in time quadratic in the depth.
    """
    thread = threading.get_ident()
    own = {block_class: block_class.__dict__.get("__init__") for block_class in block_classes}

    def wrap(construct: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(construct)
        def construct_layer(block: nn.Module, *args: object, **kwargs: object) -> None:
            inherited = bool(built) and built[-1] is block  # a block class that extends another one of them
            if threading.get_ident() != thread or inherited or len(built) == len(configs):
                construct(block, *args, **kwargs)
                return
            config = configs[len(built)]
            built.append(block)
            for value in (*args, *kwargs.values()):
                if type(value) is type(config):  # the model's: its kernels are resolved by now
                    _follow(value, config)
            args = tuple(config if type(value) is type(config) else value for value in args)
            kwargs = {key: config if type(value) is type(config) else value for key, value in kwargs.items()}
            construct(block, *args, **kwargs)

        return construct_layer

    try:
        for block_class in own:
            block_class.__init__ = wrap(block_class.__init__)  # type: ignore[method-assign]
        yield
    finally:
        for block_class, construct in own.items():
            if construct is None:
                del block_class.__init__
            else:
                block_class.__init__ = construct  # type: ignore[method-assign]


def is_aligned(tensor: Tensor) -> bool:
    """Whether the rows of a tensor have the strides that grouped matrix products need, if it has three dimensions."""
    return tensor.dim() != 3 or tensor.shape[-1] * tensor.element_size() % _GROUPED_ALIGNMENT == 0


def runs_grouped(model: nn.Module) -> bool:
    """Whether the rows of all expert weights of a model have the strides that grouped matrix products need."""
    return all(is_aligned(parameter) for parameter in model.parameters())


def resize_projections(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """Give `nn.Linear` and `Conv1D` modules of a skeleton the wanted shapes, and a bias where one is wanted.

    Args:
        model: a skeleton; it is changed in place.
        shapes: wanted shape of every parameter, by qualified name.

    Returns:
        The names of the parameters that were resized or added.
    """
    tied = _tied(model)
    changed: list[str] = []
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if not isinstance(module, nn.Linear | Conv1D) or len(shapes.get(weight, ())) != 2 or weight in tied:
            continue
        if tuple(module.weight.shape) != shapes[weight]:
            module.weight = _like(module.weight, shapes[weight])
            first, second = shapes[weight]
            if isinstance(module, Conv1D):
                module.nx, module.nf = first, second
            else:
                module.out_features, module.in_features = first, second
            changed.append(weight)
        bias = shapes.get(f"{name}.bias")
        if bias is not None and (module.bias is None or tuple(module.bias.shape) != bias):
            module.bias = _like(module.weight, bias)
            changed.append(f"{name}.bias")
    return tuple(changed)


def _like(parameter: Tensor, shape: Shape) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that have more than one name."""
    groups = aliases(model)
    names = Counter(groups.values())
    return {name for name, owner in groups.items() if names[owner] > 1}


def fill_skeleton(model: PreTrainedModel, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put tensors in place of a skeleton's parameters and compute the buffers that checkpoints do not hold.

    Args:
        model: a skeleton whose state has the names and shapes of `tensors`.
        tensors: every parameter and persistent buffer, a tied one once, on `device`; they are taken, not copied.
        device: where non-persistent buffers (rotary frequencies, masks) are created, by the class's own
            initialisation; on the meta device they stay as they are.

    Raises:
        CheckpointError: names or shapes differ, or the class leaves a non-persistent buffer uninitialised.
    """
    owners = aliases(model)
    try:
        missing, unexpected = model.load_state_dict(dict(tensors), strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{type(model).__name__}: {error}") from error
    missing = [name for name in missing if owners[name] == name]
    if missing or unexpected:
        raise CheckpointError(f"{type(model).__name__}: no tensor for {missing}, no parameter for {unexpected}")
    for name, owner in owners.items():
        if name != owner:
            parent, _, attribute = name.rpartition(".")
            source, _, source_attribute = owner.rpartition(".")
            setattr(model.get_submodule(parent), attribute, getattr(model.get_submodule(source), source_attribute))
    if device.type == "meta":
        return
    initialize_buffers(model, device)
    rest = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    if rest:
        raise CheckpointError(f"{type(model).__name__}: nothing was loaded for {rest}")


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def initialize_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the non-persistent buffers the way `from_pretrained` does: the class's `_init_weights`, guarded.

    Buffers start as NaN (or the least integer), so that one which no initialisation touches is found.

    Args:
        model: a skeleton, filled or not; parameters and persistent buffers are left alone.
        device: where the buffers are created.

    Raises:
        CheckpointError: the class leaves one of them uninitialised.
    """
    buffers = dict(model.named_non_persistent_buffers())
    if not buffers:
        return
    for name, buffer in buffers.items():
        parent, _, attribute = name.rpartition(".")
        model.get_submodule(parent)._buffers[attribute] = torch.full_like(
            buffer, _untouched(buffer.dtype), device=device
        )
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # the flag by which transformers guards what is loaded
    model.initialize_weights()
    for name, buffer in model.named_non_persistent_buffers():
        empty = buffer.isnan() if buffer.is_floating_point() else buffer == _untouched(buffer.dtype)
        if buffer.numel() and buffer.dtype != torch.bool and bool(empty.all()):
            raise CheckpointError(
                f"{type(model).__name__} does not initialise its buffer {name}, which no checkpoint holds; this class "
                "cannot be rebuilt from a checkpoint"
            )


def _untouched(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return False if dtype == torch.bool else torch.iinfo(dtype).min
