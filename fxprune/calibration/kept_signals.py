"""Loss signals that are kept on disk, so that one calibration serves later runs: other budgets, other passes.

    DIR/<key>.scores.safetensors     gradients by units, and what was asked for with them
    DIR/<key>.grams.safetensors      the same with both second moments of every consumer

The key is a hash of all that the signals follow from: graph, weights, groups, calibration text, labels, seed, precision
and version of torch. Nothing else is ever served, and no file is half-written. With second moments a file has about
4 (in^2 + out^2) bytes a consumer: 0.4 GB for SmolLM2-135M.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fxprune.calibration.loss_signals import GroupSignals, SignalOptions, collect_loss_signals
from fxprune.core.errors import CheckpointError, OutputError
from fxprune.evaluation.eval_cache import digest
from fxprune.evaluation.perplexity import hash_tokens
from fxprune.models.shards import separate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fxprune.core.groups import Group
    from fxprune.core.program import Program

__all__ = ["kept_loss_signals"]

_LOGGER = logging.getLogger(__name__)
_FORMAT = "fxprune loss signals 1"


def kept_loss_signals(
    directory: str | Path | None,
    program: Program,
    groups: Sequence[Group],
    tokens: Tensor,
    **how: Unpack[SignalOptions],
) -> tuple[dict[str, GroupSignals], bool]:
    """Read the signals from a directory, or collect them and leave them there.

    Args:
        directory: where they are kept; it is made if need be. None keeps nothing.
        program: see `fxprune.calibration.loss_signals.collect_loss_signals`, as all that follows.
        groups: see there.
        tokens: see there.
        **how: see there; a file with second moments also serves where none are asked for.

    Returns:
        Signals by the name of the group, bit by bit what collecting gives, on the device of the tokens; whether they
        were read.

    Raises:
        OutputError: the directory cannot be used (told before anything runs), or not be written to.
        CheckpointError: a kept file cannot be read.
    """
    if directory is None:
        return collect_loss_signals(program, groups, tokens, **how), False
    grams, labels = how.get("grams", True), how.get("labels", "data")
    folder = _usable(Path(directory).expanduser())
    facts = {
        "format": _FORMAT,
        "torch": torch.__version__,
        "graph": hashlib.sha256(program.graph_module.code.encode()).hexdigest(),
        "weights": _hash_weights(program),
        "groups": [_facts_of(group) for group in groups],
        "text": hash_tokens(tokens),
        "labels": labels,
        "seed": None if labels == "data" else how.get("seed", 0),
        "precision": str(how.get("forward_dtype")),
        "taylor": how.get("taylor", False),
    }
    key = digest(facts)[:32]
    scores, full = folder / f"{key}.scores.safetensors", folder / f"{key}.grams.safetensors"
    for file in (full,) if grams else (scores, full):
        if file.is_file():
            _LOGGER.info("loss signals of %d samples are read from %s", len(tokens), file)
            found = _read(file, tokens.device, grams=grams)
            if (on_batch := how.get("on_batch")) is not None:
                on_batch(len(tokens))
            return found, True
    signals = collect_loss_signals(program, groups, tokens, **how)
    _write(full if grams else scores, signals, facts)
    return signals, False


def _usable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot keep loss signals in {folder}: {error}; name another directory") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot keep loss signals in {folder}: it is not writable; name another directory")
    return folder


def _hash_weights(program: Program) -> str:
    """Of all parameters and buffers, by name."""
    found = hashlib.sha256()
    for name, tensor in program.graph_module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _facts_of(group: Group) -> dict[str, Any]:
    pieces = [*group.consumers, *group.slices, *group.shared]
    indices = hashlib.sha256()
    for piece in pieces:
        indices.update(f"{piece.parameter} {piece.axis} {piece.indices.shape} ".encode())
        indices.update(piece.indices.tobytes())
    return {"name": group.name, "kind": group.kind, "units": group.units, "pieces": indices.hexdigest()}


def _write(file: Path, signals: Mapping[str, GroupSignals], facts: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    listed = {}
    for name, one in signals.items():
        tensors[f"gradients/{name}"] = one.gradients
        if one.taylor is not None:
            tensors[f"taylor/{name}"] = one.taylor
        for part in ("inputs", "outputs", "means"):
            tensors |= {f"{part}/{consumer}": value for consumer, value in getattr(one, part).items()}
        listed[name] = {"consumers": list(one.means), "tokens": one.tokens}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        # Consumers that have one weight have one sum; the file has it once for each.
        save_file(separate(tensors), temporary, metadata={"groups": json.dumps(listed), "facts": json.dumps(facts)})
        os.replace(temporary, file)  # noqa: PTH105 - what Path.replace does
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{file}: loss signals cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path, device: torch.device, *, grams: bool) -> dict[str, GroupSignals]:
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            names = set(tensors.keys())
            listed: dict[str, Any] = json.loads(tensors.metadata()["groups"])
            found = {}
            for group, own in listed.items():
                inputs, outputs, means = (
                    {
                        consumer: tensors.get_tensor(f"{part}/{consumer}")
                        for consumer in own["consumers"]
                        if f"{part}/{consumer}" in names and (grams or part == "means")
                    }
                    for part in ("inputs", "outputs", "means")
                )
                # Scores of weights are summed on the CPU, wherever the weights are.
                taylor = tensors.get_tensor(f"taylor/{group}").cpu() if f"taylor/{group}" in names else None
                gradients = tensors.get_tensor(f"gradients/{group}")
                found[group] = GroupSignals(gradients, taylor, inputs, outputs, means, own["tokens"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: kept loss signals cannot be read ({error}); remove the file") from error
    return found
