"""Checkpoints: a slim model as a directory that stands alone, written only when it is proved to load back.

A *uniform* checkpoint has a `config.json` that says everything: plain `from_pretrained` loads it, and so does all that
is built on it. A *mixed* one has layers that differ, or widths, biases or numbers that the configuration class does not
allow; its `config.json` keeps the dense widths at the slim depth, the layers' own in `per_layer_config`, and the rest
in a record (`fxprune.models.mixed_config`), under a `model_type` that transformers knows once fxprune is imported.
`fxprune.json` says all of it again, sealed. Reading needs the model class, never the dense weights, pickles or foreign
code.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from fxprune.checkpoints.layout import Layout, classify, round_buffers
from fxprune.checkpoints.trial import ExpectedLogits, relative_error, run_once, tolerance_of, wrong_result
from fxprune.core.errors import CheckpointError
from fxprune.core.output import staged_directory
from fxprune.core.registry import resolve
from fxprune.core.tensors import same_bits
from fxprune.models.build_limits import bounded_build
from fxprune.models.constants import apply_constants
from fxprune.models.depth import renumbered
from fxprune.models.loading import quiet_transformers, weight_files
from fxprune.models.manifest import (
    CONFIG_NAME,
    Manifest,
    ShapeChange,
    SourceRecord,
    read_manifest,
    verify_companions,
    versions,
    write_manifest,
)
from fxprune.models.mixed_config import config_class_of, is_mixed_directory, mixed_config
from fxprune.models.mixed_model import model_class_of, stock_model_class
from fxprune.models.mixed_record import check_overrides, read_record
from fxprune.models.shards import (
    hash_dense_weights,
    read_shapes,
    read_tensors,
    verify_hashes,
    verify_headers,
    write_shards,
)
from fxprune.models.skeleton import (
    BUILD_ERRORS,
    aliases,
    build_skeleton,
    fill_skeleton,
    outer_lists,
    read_config,
    resolve_model_class,
    runs_grouped,
    state_shapes,
)
from fxprune.tracing.weight_masks import write_masks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from fxprune.core.program import Source
    from fxprune.models.skeleton import Shape

__all__ = [
    "CheckpointInfo",
    "ExpectedLogits",
    "Layout",
    "classify",
    "load",
    "load_skeleton",
    "save",
]

_GENERATION_NAME = "generation_config.json"
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_MOST_TENSORS = 10_000
"""Where the weight files may be missing: what a model of 1000 layers has."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What was written.

    Attributes:
        directory: where.
        kind: `"uniform"`: plain `from_pretrained` loads it. `"mixed"`: it does once fxprune is imported.
        reason: why it is not uniform; empty if it is.
        files: SHA-256 of each weight file.
        parameters: number of elements in the weight files.
        bytes: size of the tensors in the weight files.
        kept_layers: for each module list that lost layers, the dense indices of those it keeps.
        config_overrides: fields of `config.json` that differ from the dense configuration (uniform), or fields that
            `load` sets on it although its class may refuse them (mixed).
        layer_overrides: configuration fields of each layer that differs, by slim index (mixed).
        constants: numbers that `load` sets on modules, by slim name and attribute (mixed).
        added_biases: biases that the dense class does not have.
    """

    directory: Path
    kind: Literal["uniform", "mixed"]
    reason: str
    files: Mapping[str, str]
    parameters: int
    bytes: int
    kept_layers: Mapping[str, tuple[int, ...]]
    config_overrides: Mapping[str, Any]
    layer_overrides: Mapping[int, Mapping[str, int]]
    constants: Mapping[str, Mapping[str, float | int]]
    added_biases: tuple[str, ...]


def save(
    tensors: Mapping[str, Tensor],
    directory: str | Path,
    *,
    source: Source,
    plan: Mapping[str, Any],
    history: Sequence[Any],
    epsilons: Mapping[str, float] | None = None,
    expected: ExpectedLogits | None = None,
    weight_masks: Mapping[str, Tensor] | None = None,
    buffers: Collection[str] = (),
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> CheckpointInfo:
    """Write a slim model as a directory, and prove that it loads back before the directory takes its name.

    The proof: the directory is loaded again, every tensor has the same bits, dtype and shape as the one given, and
    one forward pass runs, which gives the expected logits if there are any; a uniform checkpoint is loaded with plain
    `from_pretrained` too. Without expected logits, a class that takes head counts from its dense widths is refused
    where these do not fit: shapes do not prove which numbers are right.

    Args:
        tensors: as for `classify`: the slim state dict under dense names, removed layers left out; on any device.
        directory: where to.
        source: the dense model, with the tokenizer and the generation config to write beside the weights.
        plan: what stays of each group, JSON-able.
        history: what was done, JSON-able, oldest first.
        epsilons: as for `classify`: the epsilon of each norm that needs another one, by dense module name.
        expected: inputs, and the logits that the slim model gives for them.
        weight_masks: bool masks of pruned weights by dense name, written beside the weights
            (`fxprune.tracing.weight_masks`).
        buffers: as for `classify`: those of the tensors that are buffers of a graph.
        overwrite: whether an earlier output may be replaced.
        max_shard_size: largest weight file, in bytes or as `"5GB"`.

    Returns:
        What was written.

    Raises:
        CheckpointError: as `classify`; or the plan or the history is not JSON, or the checkpoint does not load back, or
            it loads and computes something else. What was at `directory` before is untouched.
        OutputError: `directory` cannot be used.
        UsageError: `max_shard_size` is not a size.
    """
    with staged_directory(directory, overwrite=overwrite) as staging:
        layout = classify(tensors, source, epsilons, expected, buffers=buffers)
        files = write_shards(layout.tensors, staging, max_shard_size, "model")
        _write_config(layout, source, staging / CONFIG_NAME)
        _write_companions(source, staging)
        named = {renumbered(name, layout.kept_layers): mask for name, mask in (weight_masks or {}).items()}
        write_masks(staging, {name: mask for name, mask in named.items() if name is not None})
        write_manifest(staging, _manifest(layout, source, plan, history, files))
        resolve("fxprune.exporters.model_card:write_model_card")(staging, source=source.path)
        _prove(staging, layout, source, expected)
    return CheckpointInfo(
        directory=Path(directory).expanduser().resolve(),
        kind=layout.kind,
        reason=layout.reason,
        files=files,
        parameters=sum(tensor.numel() for tensor in layout.tensors.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in layout.tensors.values()),
        kept_layers=layout.kept_layers,
        config_overrides=layout.config_overrides,
        layer_overrides=layout.layer_overrides,
        constants=layout.constants,
        added_biases=layout.added_biases,
    )


def _write_config(layout: Layout, source: Source, path: Path) -> None:
    """Write `config.json`: that of a uniform model as it is, that of a mixed one with what differs."""
    config = layout.config
    if layout.kind == "mixed":
        model_class = stock_model_class(source.model_class)
        shapes = {name: tuple(tensor.shape) for name, tensor in layout.tensors.items()}
        named = {*layout.changed, *layout.added_biases}
        config = _mixed_config(build_skeleton(model_class, config), layout, named, shapes, path)
        # Built once, it names only the shapes that no field gives.
        config = build_skeleton(model_class_of(model_class, type(config)), config).config
    config.to_json_file(path)


def _mixed_config(
    plain: PreTrainedModel, said: Layout | Manifest, named: set[str], shapes: Mapping[str, Shape], path: Path | str
) -> PreTrainedConfig:
    """The configuration of a mixed model.

    Args:
        plain: the skeleton of `config.json` without what differs.
        said: what differs.
        named: the parameters that it names.
        shapes: their shapes.
        path: the file, for messages.
    """
    check_overrides(plain.config, said.config_overrides, str(path))
    values = {
        "overrides": dict(said.config_overrides),
        "parameters": {name: shapes[name] for name in sorted(named) if name in shapes and _is_projections(plain, name)},
        "constants": {name: dict(numbers) for name, numbers in said.constants.items()},
    }
    record = read_record(values, str(path))
    config: PreTrainedConfig = mixed_config(plain.config, record, said.layer_overrides, path)
    return config


def _is_projections(plain: PreTrainedModel, name: str) -> bool:
    """Whether a parameter is the weight or the bias of a module that can be given another shape."""
    owner, _, attribute = name.rpartition(".")
    try:
        return attribute in {"weight", "bias"} and isinstance(plain.get_submodule(owner), nn.Linear | Conv1D)
    except AttributeError:
        return False


def _write_companions(source: Source, directory: Path) -> None:
    """Write the tokenizer with its chat template, the generation config and what prepares images, as they came."""
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(directory)
    if source.generation_config is not None:
        # Not save_pretrained: it refuses the unusual values that many published configurations have.
        source.generation_config.to_json_file(
            directory / _GENERATION_NAME, use_diff=True, keys_to_pop=["compile_config"]
        )
    for file in () if source.path is None else (source.path / name for name in _PREPROCESSORS):
        if file.is_file():
            shutil.copyfile(file, directory / file.name)


def _manifest(
    layout: Layout, source: Source, plan: Mapping[str, Any], history: Sequence[Any], files: dict[str, str]
) -> Manifest:
    try:
        # Through JSON once: tuples become lists, and what is not JSON is named.
        return Manifest(
            kind=layout.kind,
            reason=layout.reason,
            source=SourceRecord(name=source.name, sha256=hash_dense_weights(source.path)),
            versions=versions(),
            plan=json.loads(json.dumps(dict(plan), allow_nan=False)),
            history=tuple(json.loads(json.dumps(list(history), allow_nan=False))),
            kept_layers=dict(layout.kept_layers),
            config_overrides=dict(layout.config_overrides),
            layer_overrides={index: dict(fields) for index, fields in layout.layer_overrides.items()},
            constants={name: dict(values) for name, values in layout.constants.items()},
            parameters={name: ShapeChange(dense=old, slim=new) for name, (old, new) in layout.changed.items()},
            added_biases=layout.added_biases,
            zero_biases=layout.zero_biases,
            files=files,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"plan and history must be JSON: {error}") from error


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify_hash: bool | Literal["headers"] = True,
) -> PreTrainedModel:
    """Load a checkpoint that `save` wrote, uniform or mixed, from its directory alone.

    A directory without `fxprune.json` is loaded if transformers wrote it for a mixed model (`save_pretrained`, a
    checkpoint of `Trainer`): there is no hash to compare then, and everything else is checked as ever.

    Args:
        directory: the checkpoint.
        dtype: floating dtype to convert to; by default every tensor keeps the one it was saved with.
        device: where the model shall be. On the CPU, tensors are views of the mapped files.
        verify_hash: True compares `config.json` and the weight files with their SHA-256, for which the weights are read
            once more; `"headers"` leaves out the weights themselves and looks at the sizes and headers of their files;
            False takes all files as they are, for changes that were meant. `fxprune.json` must be as it was written.

    Returns:
        The model in evaluation mode. That of a mixed checkpoint is an instance of a class that extends transformers'
        own (`fxprune.models.mixed_model`), which is trained, adapted and saved like any other. Its configuration is
        heterogeneous: `config.per_layer_config[i]` answers for layer `i`, and reading globally what differs between
        layers raises. Experts whose widths the grouped matrix product cannot take run one by one.

    Raises:
        CheckpointError: a file is missing, damaged, changed, or does not fit the others; the message says which.
    """
    target = torch.device(device)
    if is_mixed_directory(directory):
        return _load_saved(Path(directory).expanduser(), dtype, target)
    path, manifest = _described(directory, verify=bool(verify_hash))
    shapes = read_shapes(path, manifest.files)
    if verify_hash:
        verify_headers(path, manifest.headers)
    if verify_hash is True or (verify_hash and not manifest.headers):  # version 1 has no headers to compare
        verify_hashes(path, manifest.files)
    with bounded_build(len(shapes), path):
        model = _fit(_plain(path, dtype), manifest, shapes, dtype, path)
    fp32 = _kept_in_float32(model, dtype)

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        if dtype is None or not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if any(f".{part}." in f".{name}." for part in fp32) else dtype

    tensors = read_tensors(path, manifest.files, target, dtype_of)
    try:
        fill_skeleton(model, tensors, target)
    except (MemoryError, *BUILD_ERRORS) as error:
        raise CheckpointError(f"{path}: {type(model).__name__} cannot be filled with its tensors: {error}") from error
    apply_constants(model, manifest.constants)
    _configure(model, path)
    if (path / _GENERATION_NAME).exists() and model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        except (OSError, *BUILD_ERRORS) as error:
            raise CheckpointError(f"{path / _GENERATION_NAME} cannot be read: {error}; correct or remove it") from error
    return model


def load_skeleton(directory: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model of a checkpoint on the meta device from `config.json` and `fxprune.json` alone.

    Args:
        directory: the checkpoint; its weight files may be missing.
        dtype: floating dtype of parameters and buffers; by default the configuration's.

    Returns:
        The model that `load` returns, without data.

    Raises:
        CheckpointError: one of the two files is missing, damaged, or does not fit the other.
    """
    if is_mixed_directory(directory):
        path = Path(directory).expanduser()
        with bounded_build(_MOST_TENSORS, path):
            model_class, config = _saved_class(path)
            return _built(model_class, config, dtype, str(path))
    path, manifest = _described(directory)
    whole = all((path / name).is_file() for name in manifest.files)
    with bounded_build(len(read_shapes(path, manifest.files)) if whole else _MOST_TENSORS, path):
        plain = _plain(path, dtype)
        model = _fit(plain, manifest, _recorded_shapes(plain, manifest, path), dtype, path)
    _configure(model, path)
    return model


def _recorded_shapes(plain: PreTrainedModel, manifest: Manifest, path: Path) -> dict[str, Shape]:
    """The shapes that the weight files must have."""
    shapes = state_shapes(plain) | {name: change.slim for name, change in manifest.parameters.items()}
    for name in manifest.added_biases:
        if name not in shapes:
            owner = name.removesuffix(".bias")
            weight = shapes.get(f"{owner}.weight")
            if weight is None:
                raise CheckpointError(f"{path}: fxprune.json adds {name} to no projection; write the checkpoint again")
            shapes[name] = (weight[-1] if isinstance(plain.get_submodule(owner), Conv1D) else weight[0],)
    return shapes


def _described(directory: str | Path, *, verify: bool = True) -> tuple[Path, Manifest]:
    """Read what a checkpoint says about itself, and check the files that say more."""
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; name one that fxprune wrote")
    manifest = read_manifest(path)
    if verify:
        verify_companions(path, manifest)
    return path, manifest


def _plain(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The skeleton of a checkpoint's `config.json`."""
    config = read_config(path / CONFIG_NAME)
    model_class = _named_class(config, path)
    try:
        return build_skeleton(model_class, config, dtype)
    except BUILD_ERRORS as error:
        name = model_class.__name__
        raise CheckpointError(f"{path / CONFIG_NAME}: {name} cannot be built from it: {error}") from error


def _named_class(config: PreTrainedConfig, path: Path) -> type[PreTrainedModel]:
    """The class of transformers that a configuration names."""
    names = config.architectures
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{path / CONFIG_NAME} names no class in `architectures`; write the checkpoint again")
    return resolve_model_class(config, names[0])


def _configure(model: PreTrainedModel, path: Path) -> None:
    """Let the configuration of a rebuilt model say what it can about it, and experts run in a way that they can."""
    if model.config._experts_implementation == "grouped_mm" and not runs_grouped(model):
        model.set_experts_implementation("eager")
    model.config.name_or_path = model.name_or_path = str(path)  # adapters name their base by it


def _fit(
    model: PreTrainedModel, manifest: Manifest, shapes: Mapping[str, Shape], dtype: torch.dtype | None, path: Path
) -> PreTrainedModel:
    """Give the skeleton of `config.json` the checkpoint's shapes; check that weights, manifest and config agree."""
    where = f"{path}: config.json, fxprune.json and the weight files do not belong together"
    again = "restore the file that was changed, or write the checkpoint again"
    for name, change in manifest.parameters.items():
        if shapes.get(name) != change.slim:
            raise CheckpointError(
                f"{where}: fxprune.json gives {name} the shape {list(change.slim)}, the weight files have "
                f"{list(shapes[name]) if name in shapes else 'no such tensor'}; {again}"
            )
    if manifest.kind == "mixed":
        model = _fit_mixed(model, manifest, shapes, dtype, where)
    elif manifest.layer_overrides or manifest.constants:
        raise CheckpointError(f"{where}: a uniform checkpoint has no layer overrides and no constants; {again}")
    for name, indices in manifest.kept_layers.items():
        if len(outer_lists(model).get(name, ())) != len(indices):
            raise CheckpointError(f"{where}: fxprune.json says that {name} has {len(indices)} layers; {again}")
    built = state_shapes(model)
    if built != shapes:
        wrong = sorted(name for name in built.keys() | shapes.keys() if built.get(name) != shapes.get(name))
        details = ", ".join(f"{name} ({built.get(name)} built, {shapes.get(name)} stored)" for name in wrong[:4])
        raise CheckpointError(f"{where}: {details}; {again}")
    return model


def _fit_mixed(
    plain: PreTrainedModel, manifest: Manifest, shapes: Mapping[str, Shape], dtype: torch.dtype | None, where: str
) -> PreTrainedModel:
    """Build a skeleton with what only the manifest says: overrides, narrower projections, biases and constants."""
    again = "restore the file that was changed, or write the checkpoint again"
    dense = state_shapes(plain)
    for name, change in manifest.parameters.items():
        if dense.get(name) != change.dense:
            raise CheckpointError(f"{where}: config.json does not give {name} its dense shape; {again}")
    named = {*manifest.parameters, *manifest.added_biases}
    try:
        config = _mixed_config(plain, manifest, named, shapes, where)
        return _built(model_class_of(type(plain), type(config)), config, dtype, where)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}; {again}") from error


def _built(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype | None, where: str
) -> PreTrainedModel:
    try:
        return build_skeleton(model_class, config, dtype)
    except BUILD_ERRORS as error:
        raise CheckpointError(f"{where}: {model_class.__name__} cannot be built: {error}") from error


def _saved_class(path: Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Class and configuration of a directory that transformers wrote for a mixed model."""
    stock = read_config(path / CONFIG_NAME)
    model_class = _named_class(stock, path)
    values = json.loads((path / CONFIG_NAME).read_bytes())
    config_class = config_class_of(type(stock))
    try:
        config: PreTrainedConfig = config_class.from_dict(values, name_or_path=str(path))
    except BUILD_ERRORS as error:
        raise CheckpointError(f"{path / CONFIG_NAME} cannot be used: {error}; save the model again") from error
    return model_class_of(model_class, config_class), config


def _elements(shapes: Mapping[str, Shape]) -> int:
    return sum(prod(shape) for shape in shapes.values())


def _load_saved(path: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """Load what transformers wrote for a mixed model, the way that transformers does, with its weights all there."""
    stored = read_shapes(path, [file.name for file in weight_files(path)])
    with bounded_build(len(stored), path):
        model_class, config = _saved_class(path)
        # Names may be others than the class's, so elements are counted: no file can ask for much more than it holds.
        wanted = _elements(state_shapes(_built(model_class, config, dtype, str(path))))
        if wanted > 2 * _elements(stored):
            raise CheckpointError(
                f"{path}: config.json describes a model of {wanted} numbers, and the weight files hold "
                f"{_elements(stored)}; restore the file that was changed, or save the model again"
            )
        try:
            with quiet_transformers():
                model, info = model_class.from_pretrained(
                    path,
                    config=config,
                    dtype=dtype or "auto",
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except (OSError, *BUILD_ERRORS) as error:
            raise CheckpointError(f"{path}: {model_class.__name__} cannot be loaded: {error}") from error
    odd = {what: sorted(info[what]) for what in ("missing_keys", "unexpected_keys") if info[what]}
    if odd:
        details = "; ".join(f"{what.replace('_', ' ')} {names[:4]}" for what, names in odd.items())
        raise CheckpointError(f"{path}: config.json and the weights do not belong together: {details}")
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype | None) -> set[str]:
    """Parts of names that the class keeps in float32, as `from_pretrained` does."""
    kept: set[str] = set()
    if dtype in {torch.float16, torch.bfloat16}:
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept


def _prove(staging: Path, layout: Layout, source: Source, expected: ExpectedLogits | None) -> None:
    """Load a staged checkpoint back and compare it, and what it computes, with what was given."""
    model = load(staging, verify_hash="headers")
    _compare(model, layout, source, "fxprune.load", proved=expected is not None)
    _compute(model, layout, expected, "fxprune.load")
    model_class: Any = type(model)
    del model
    if len({tensor.dtype for tensor in layout.tensors.values() if tensor.is_floating_point()}) > 1:
        return  # `from_pretrained` converts all to one, as it does with any model
    try:
        with _no_progress_bars():
            plain = model_class.from_pretrained(staging, local_files_only=True, use_safetensors=True)
    except (OSError, *BUILD_ERRORS) as error:
        raise CheckpointError(f"{model_class.__name__}.from_pretrained refuses the checkpoint: {error}") from error
    _compare(plain, layout, source, "from_pretrained", proved=expected is not None)
    _compute(plain, layout, expected, "from_pretrained")


def _compute(model: PreTrainedModel, layout: Layout, expected: ExpectedLogits | None, how: str) -> None:
    """Raise unless a reloaded model runs and gives the expected logits; it may have another dtype afterwards."""
    if expected is None:
        run_once(model, [*layout.changed, *layout.added_biases])
        return
    if expected.dtype is not None:
        round_buffers(model, layout.given, expected)
        model = model.to(expected.dtype)
    try:
        error = relative_error(model, expected)
    except BUILD_ERRORS as problem:
        raise CheckpointError(f"{type(model).__name__} rebuilt with {how} cannot run: {problem}") from problem
    if error > tolerance_of(model):
        raise wrong_result(model, error, how)


def _compare(model: PreTrainedModel, layout: Layout, source: Source, how: str, *, proved: bool) -> None:
    """Raise unless a reloaded model has the class and the very tensors that were given, and no others.

    Tables that the class computes itself are no weights: they may have been cast, and the class may change them while
    it runs. With `proved`, the logits say whether they are right.
    """
    classes = (stock_model_class(type(model)), stock_model_class(source.model_class))
    if classes[0] is not classes[1]:
        raise CheckpointError(f"{how} gave a {classes[0].__name__}, not a {classes[1].__name__}")
    state: dict[str, Tensor] = model.state_dict()
    computed = dict(model.named_non_persistent_buffers())
    tables = {name: table for name, table in computed.items() if name in layout.given}
    wrong = [
        name for name, tensor in layout.given.items() if name not in tables and not same_bits(state.get(name), tensor)
    ]
    for name, table in tables.items() if not proved else ():
        given = layout.given[name]
        if not same_bits(table.to(given.dtype), given):
            wrong.append(name)
    wrong += [name for name in layout.zero_biases if bool(state[name].any())]
    known = {*layout.tensors, *(name for name, owner in aliases(model).items() if owner in layout.tensors)}
    wrong += sorted(state.keys() - known)
    if wrong:
        raise CheckpointError(
            f"the checkpoint does not load back with {how}: {wrong[:8]} differ from the given tensors; nothing was "
            f"written ({type(model).__name__}, {layout.kind})"
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()
