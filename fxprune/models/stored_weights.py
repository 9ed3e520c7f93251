"""The weights of a model class, by the class's names, wherever and however a checkpoint stores them.

    experts.0.w1, experts.0.w3, experts.1.w1, ...  ──  transformers' conversion  ──►  experts.gate_up_proj

transformers knows for every class which stored tensors a parameter is made of; its rules are applied here to one
parameter at a time, so that no more than that one is held. A tied weight has one name, the first.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from fxprune.core.errors import CheckpointError
from fxprune.models.skeleton import aliases

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from fxprune.models.shard_reader import ShardReader

__all__ = ["StoredWeights"]


@dataclass(frozen=True)
class _Recipe:
    """What a parameter is made of.

    Attributes:
        stored: names in the files, in their natural order, each with the pattern of the converter that it matches.
        target: the parameter, the first one if the converter makes several.
        converter: how; None for a tensor that is stored as it is.
    """

    stored: list[tuple[str, str | None]]
    target: str
    converter: Any = None


class StoredWeights:
    """Reads the parameters and persistent buffers of a model class from a checkpoint.

    Args:
        reader: of the checkpoint's files.
        model: the model, on any device; its weights are not looked at.

    Raises:
        CheckpointError: weights that the model ties are stored with different values.
    """

    def __init__(self, reader: ShardReader, model: PreTrainedModel) -> None:
        self.reader = reader
        self._model = model
        self._owners = aliases(model)
        self._recipes: dict[str, _Recipe] = {}
        by_name = self._by_name()
        for name in sorted(by_name, key=dot_natural_key):
            owner = self.key(name)
            first = self._recipes.setdefault(owner, by_name[name])
            if first is not by_name[name] and not torch.equal(
                self._made(owner, first), self._made(name, by_name[name])
            ):
                raise CheckpointError(
                    f"{reader.directory}: {first.target} and {name} are one weight to config.json, and the files have "
                    "different values for them; correct tie_word_embeddings"
                )

    def _by_name(self) -> dict[str, _Recipe]:
        state = self._model.state_dict()
        prefix = self._model.base_model_prefix
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        found: dict[str, _Recipe] = {}
        for stored in sorted(self.reader.where, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
            if name not in state and stored in state:
                name, pattern = stored, None
            if name not in state:
                continue  # nothing of this model, as rotary frequencies in old checkpoints
            converter = of_pattern.get(pattern) if pattern is not None else None
            recipe = found.setdefault(name, _Recipe([], name, converter))
            if converter is not None or not recipe.stored:
                recipe.stored.append((stored, pattern))
            if converter is not None:
                first, *more = converter.target_patterns
                for target in more:
                    found.setdefault(name.replace(first, target), recipe)
        return found

    @property
    def directory(self) -> Path:
        """Of the checkpoint."""
        return self.reader.directory

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return type(self._model).__name__

    @property
    def names(self) -> list[str]:
        """What the checkpoint has of the model, by the model's names."""
        return list(self._recipes)

    def key(self, name: str) -> str:
        """The one name of a weight that may have several."""
        return self._owners.get(name, name)

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self._recipes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a weight is stored."""
        return self.reader.dtypes[self._recipes[self.key(name)].stored[0][0]]

    def read(self, name: str) -> Tensor:
        """A weight in its own memory, on the CPU.

        Raises:
            CheckpointError: the checkpoint does not have it, or its file is damaged or was changed.
        """
        key = self.key(name)
        if key not in self._recipes:
            raise CheckpointError(f"{self.reader.directory} has no tensor for {name}")
        return self._made(key, self._recipes[key])

    def _made(self, name: str, recipe: _Recipe) -> Tensor:
        if recipe.converter is None:
            return self.reader.read(recipe.stored[0][0])
        converter = copy.deepcopy(recipe.converter)
        for stored, pattern in recipe.stored:
            converter.add_tensor(recipe.target, stored, pattern, partial(self.reader.read, stored))
        try:
            made = converter.convert(recipe.target, model=self._model, config=self._model.config)[name]
        except (RuntimeError, ValueError, LookupError) as error:
            raise CheckpointError(
                f"{self.reader.directory}: {name} cannot be put together from {recipe.stored[0][0]} and the "
                f"{len(recipe.stored) - 1} like it ({error}); copy the checkpoint again"
            ) from error
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor
