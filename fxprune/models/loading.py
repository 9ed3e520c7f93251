"""Loading models, tokenizers and configurations from a directory or the hub, with bad input refused by name.

A hub repository is downloaded as a snapshot first, so both ways go through the same checks: every safetensors file is
whole, every shard of the index is there, every weight of the model is in the files. Nothing is unpickled, and no code
from a repository runs.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LoadedModel",
    "check_weights",
    "config_path",
    "expand_user",
    "load_config",
    "load_tokenizer",
    "local_snapshot",
    "max_positions",
    "model_directory",
    "quiet_transformers",
    "resolve_device",
    "resolve_dtype",
    "weight_files",
]

_LOGGER = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin.index.json")
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "tekken.json")
_CONFIG_FILES = ("*.json",)
_MODEL_FILES = (
    "*.json",
    *(f"{stem}{rest}.safetensors" for stem in ("model", "fxprune", "weight_masks") for rest in ("", "-*")),
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        model: in evaluation mode.
        tokenizer: None when the checkpoint has none.
        config: the model's configuration.
        name: hub id or path as the user gave it.
        path: the local directory it was read from; for a hub id, the snapshot in the hub cache; None of a module.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    config: PreTrainedConfig
    name: str
    path: Path | None


def load_config(name_or_path: str | Path) -> PreTrainedConfig:
    """Load a configuration alone: from a directory, a `config.json` or the hub. No weights are read.

    Raises:
        CheckpointError: there is none, it is not valid, or its model type is unknown to transformers.
    """
    path = config_path(name_or_path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        hint = "; it has an adapter_config.json: merge the adapter into its base model first"
        hint = hint if (path / "adapter_config.json").is_file() else "; name a directory with a Hugging Face model"
        raise CheckpointError(f"{path} has no config.json{hint}")
    content = _read_json(file)
    if not content.get("model_type"):
        raise CheckpointError(f"{file} has no model_type; it is not the configuration of a Hugging Face model")
    from transformers import AutoConfig  # noqa: PLC0415 - slow to import, and only loading needs it

    with _load_errors(str(file)):
        # With False transformers refuses a repository's own code; its default would ask on the terminal.
        return AutoConfig.from_pretrained(file, trust_remote_code=False, local_files_only=True)


def config_path(name_or_path: str | Path) -> Path:
    """The local directory or file of a configuration, of a hub repository the snapshot of its small files.

    Raises:
        CheckpointError: there is nothing of this name.
    """
    return _local_path(name_or_path, _CONFIG_FILES)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory or a hub repository.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = _local_path(name_or_path, (*_CONFIG_FILES, "vocab.txt", "merges.txt", "*.model", "*.jinja"))
    if not has_tokenizer(path):
        raise CheckpointError(f"{path} has no tokenizer (tokenizer.json or the files of a slow one)")
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import, and only loading needs it

    with _load_errors(f"the tokenizer in {path}"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the configuration names (`max_position_embeddings`); None when it names none."""
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def expand_user(path: str | Path) -> Path:
    """The path with a leading `~` expanded; as it is where there is no such home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Turn a name such as `"bfloat16"` or `"torch.float32"` into the floating point dtype.

    Raises:
        UsageError: there is no floating point dtype of that name.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise UsageError(f"dtype {dtype!s} is not a floating point type; use float32, bfloat16 or float16")


def resolve_device(device: torch.device | str) -> torch.device:
    """Turn a name such as `"cpu"` or `"cuda:0"` into a device that works here.

    Raises:
        UsageError: the name is unknown or there is no such device.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {device!s} cannot be used here: {str(error).splitlines()[0]}") from error
    return found


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the model in a directory: `model.safetensors` or the shards that its index names.

    Raises:
        CheckpointError: there are none, the index is damaged, or a shard is missing.
    """
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = path / _INDEX
    if not index.is_file():
        raise CheckpointError(f"{path} has no weights that can be used: {_why_no_weights(path)}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; it is damaged, copy the checkpoint again")
    names = sorted({str(name) for name in weight_map.values()})
    if strange := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its directory: {', '.join(strange)}")
    if missing := [name for name in names if not (path / name).is_file()]:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the {len(names)} shards that {_INDEX} names: {', '.join(missing)}; "
            f"copy or download the checkpoint again"
        )
    return [path / name for name in names]


def check_weights(path: Path) -> None:
    """Check that the weight files of a directory are whole, from their headers and lengths; no weights are read.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or a shard lacks a tensor of the index.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - only loading needs it

    found: set[tuple[str, str]] = set()
    for file in weight_files(path):
        with file.open("rb") as stream:
            start = stream.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` there")
        try:
            with safe_open(file, framework="pt") as tensors:
                found.update((file.name, name) for name in tensors.keys())  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file ({error}); copy or download it again"
            ) from error
    if (path / "model.safetensors").is_file():
        return
    weight_map = _read_json(path / _INDEX)["weight_map"]
    if lost := sorted(name for name, file in weight_map.items() if (file, name) not in found):
        raise CheckpointError(f"{path}: tensors that {_INDEX} names are not in their shards: {_some(lost)}")


def local_snapshot(name_or_path: str | Path) -> Path:
    """The local directory of a model's files, downloaded first if it is a hub id, with whole weights in it.

    Raises:
        CheckpointError: there is no such model, or its files are damaged or cannot be used.
    """
    path = model_directory(name_or_path)
    check_plain_checkpoint(path)
    return path


def model_directory(name_or_path: str | Path) -> Path:
    """The local directory of a model's files, downloaded first if it is a hub id; what is in it is not looked at.

    Raises:
        CheckpointError: there is no such model, or it is a file.
    """
    path = _local_path(name_or_path, _MODEL_FILES)
    if path.is_file():
        raise CheckpointError(f"{path} is a file; name the directory that holds config.json and the weights")
    return path


def _local_path(name_or_path: str | Path, patterns: tuple[str, ...]) -> Path:
    """The absolute path of a local directory or file, or of the snapshot of a hub repository's matching files."""
    text = str(name_or_path)
    path = expand_user(text)
    if text and path.exists():
        return path.resolve()
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", text, re.ASCII) and not text.endswith((".json", ".safetensors"))
    if isinstance(name_or_path, Path) or not is_hub_id:
        raise CheckpointError(f"{text} does not exist; name a directory that holds a model, or a hub id")
    import huggingface_hub  # noqa: PLC0415 - only hub ids need it

    with _load_errors(f"{text!r}: no such directory, and as a hub id it"):
        # Top level only: subfolders hold other formats of the same weights.
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=list(patterns), ignore_patterns=["*/*"]))


def check_plain_checkpoint(path: Path) -> None:
    config = load_config(path)
    check_weights(path)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{path}: config.json has a quantization_config; pruning needs the floating point weights: use the "
            f"checkpoint that this one was quantised from"
        )


def from_pretrained(path: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """Build the model with transformers and make sure that every weight came from the files."""
    from fxprune.models.model_class import class_of_config, config_of_class  # noqa: PLC0415 - slow, only loading needs it

    config = load_config(path)
    named = bool(getattr(config, "architectures", None))
    model_class: Any = class_of_config(config, str(path / "config.json"))
    with _load_errors(str(path)), quiet_transformers():
        model, info = model_class.from_pretrained(
            path,
            config=config_of_class(model_class, config),
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        model = model.to(device)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    # transformers fills what is missing with random numbers and says so in a log line only.
    if missing:
        raise CheckpointError(_of_another_class(path, type(model).__name__, missing, unexpected, named=named))
    if unexpected:
        _LOGGER.warning(
            "%s: %s has no place for %d tensors in the files; they are left out: %s",
            path,
            type(model).__name__,
            len(unexpected),
            _some(unexpected),
        )
    loaded: PreTrainedModel = model
    return loaded


def _of_another_class(path: Path, name: str, missing: list[str], unexpected: list[str], *, named: bool) -> str:
    """What to say where the files lack weights of the class: with others in their place, it has another head."""
    chosen = f"config.json names {name}" if named else f"config.json names no class, of which {name} is the first known"
    others = f", where {_some(unexpected)} stand instead" if unexpected else ""
    return (
        f"{path}: {len(missing)} weights of {name} are not in the files: {_some(missing)}{others}; config.json and the "
        f"weights do not belong together: {chosen}, the weights are of another class or head; name theirs in "
        f"`architectures`{'' if unexpected else ', or copy the files again if they are not whole'}"
    )


@contextmanager
def _load_errors(what: str) -> Iterator[None]:
    """Turn what transformers and the hub raise for bad input into a CheckpointError."""
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415 - slow to import

    try:
        yield
    except (
        OSError,  # missing files; hub and network failures
        ValueError,  # unknown model types, custom code
        RuntimeError,  # weights whose shapes differ from the configuration's
        ImportError,  # a package that this tokenizer or model needs
        KeyError,
        TypeError,
        AttributeError,  # the last three: configurations with missing or odd fields
        StrictDataclassError,
    ) as error:
        raise CheckpointError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bar and load report: what they say is raised or logged here."""
    from transformers.utils import logging as log  # noqa: PLC0415 - slow to import

    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def has_tokenizer(path: Path) -> bool:
    return any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES)


def _why_no_weights(path: Path) -> str:
    if pickled := sorted(file.name for pattern in _PICKLED for file in path.glob(pattern)):
        return (
            f"it holds pickled weights only ({_some(pickled)}), and unpickling can run any code; convert them to "
            f"safetensors with a tool that you trust"
        )
    if gguf := sorted(file.name for file in path.glob("*.gguf")):
        return f"it holds a GGUF file only ({_some(gguf)}); convert it to safetensors first"
    return f"neither model.safetensors nor {_INDEX} is there"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
