"""The `Program`: the only thing that travels through the compiler.

A Program is the FX graph, how it is called, the groups found in it, the plan (which units stay) and the history of
what was done. It is frozen: a pass returns a new one. Graph modules of successive Programs share every parameter that
no pass has changed, so holding the dense and the slim form costs little more than the slim weights.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from fxprune.core.channel_ids import ChannelMap
    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan

__all__ = ["CacheEntry", "Event", "Form", "Interface", "Program", "Source"]


@dataclass(frozen=True)
class CacheEntry:
    """One key or value tensor of the cache: the graph input that brings it and the graph output that returns it.

    Attributes:
        input: name of the placeholder, shape (batch, KV heads, past length, head_dim).
        output: name of the graph output, shape (batch, KV heads, past + new length, head_dim).
        layer: index of the decoder layer, counted in graph order.
        kind: `"key"` or `"value"`.
    """

    input: str
    output: str
    layer: int
    kind: str


@dataclass(frozen=True)
class Interface:
    """How the flat graph is called: tensors in by name, a tuple of tensors out.

    Attributes:
        example_inputs: one small tensor per placeholder, in placeholder order; every dynamic axis is at least 2 long.
        dynamic_axes: for each input name, the axes whose length may change, with the name of the symbol. Two axes
            with one symbol always have the same length.
        outputs: names of the graph's outputs, in order.
        cache: the cache inputs and outputs, empty for a model without one.
        causal: whether it is a causal language model, whose logits predict the next token. Without a cache it runs
            whole sequences: models whose state is more than keys and values are traced so.
        fixed_length: the only number of tokens that the graph runs, where the model's code loops over tokens or chunks
            of them; shorter sequences are padded on the right. None for any number.
    """

    example_inputs: Mapping[str, Tensor]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    cache: tuple[CacheEntry, ...] = ()
    causal: bool = False
    fixed_length: int | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the placeholders, in order."""
        return tuple(self.example_inputs)


@dataclass(frozen=True)
class Source:
    """Where a Hugging Face model came from, with what a checkpoint needs beside the weights.

    Attributes:
        name: hub id or directory as the user gave it, or the class name.
        config: the model's `PreTrainedConfig` (dense).
        model_class: the `PreTrainedModel` subclass.
        tokenizer: its tokenizer, if there is one.
        generation_config: its generation config, if there is one.
        path: local directory that holds the checkpoint it was loaded from, if it was loaded from one.
        weight_masks: bool masks, True for kept, of weights that the checkpoint says were removed one by one, by the
            name and in the layout of the parameters of the model's class; of those that are no projection's of the
            graph once projections are lifted (`Program.weight_masks` has the others).
        unsavable: why no checkpoint can be written of this model, with what can be done; empty if one can.
    """

    name: str
    config: Any
    model_class: type[torch.nn.Module]
    tokenizer: Any = None
    generation_config: Any = None
    path: Path | None = None
    unsavable: str = ""
    weight_masks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """An earlier form of the model that verification compares with: a module and how it was called then."""

    module: torch.nn.Module
    interface: Interface


@dataclass(frozen=True)
class Event:
    """One entry of the history: which pass ran, with which options, what it changed and how long it took."""

    name: str
    options: Mapping[str, Any]
    modified: bool
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The event as JSON data; options that JSON lacks become text."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return data


@dataclass(frozen=True)
class Program:
    """A traced model on its way through the compiler.

    Attributes:
        graph_module: the FX graph with its parameters. Placeholders are flat tensors, the output is a flat tuple.
        interface: how the graph is called.
        source: the Hugging Face model it came from; None for a plain `nn.Module`.
        channels: result of channel tracing; None until a locate pass needed it, and again after slimming.
        groups: what can be pruned, as records that print themselves.
        plan: which units of each group stay; None until a pruning pass ran.
        history: what was done, oldest first.
        references: forms of the same model that verification compares with, by name (`"eager"`, `"traced"`,
            `"lifted"`, `"masked"`).
        weight_masks: bool masks of projections whose weights were pruned, in the layout of the weight, True for kept,
            by qualified name; later passes hold them.
        results: measurements that passes leave for the report, JSON-able, by section of `report.json`.
        unreached: weights of the model that the traced sample does not reach, by qualified name
            (`fxprune.tracing.unreached`); a checkpoint holds them as they are.
        shared: names of parameters of the graph that a module outside it owns too, with that module's name.
    """

    graph_module: torch.fx.GraphModule
    interface: Interface
    source: Source | None = None
    channels: ChannelMap | None = None
    groups: tuple[Group, ...] = ()
    plan: Plan | None = None
    history: tuple[Event, ...] = ()
    references: Mapping[str, Form] = field(default_factory=dict)
    weight_masks: Mapping[str, Tensor] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    unreached: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)

    def replace(self, **changes: Any) -> Program:
        """Return a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def with_results(self, **sections: Any) -> Program:
        """Return a copy whose results have the given sections set."""
        return self.replace(results={**self.results, **sections})

    def with_reference(self, name: str, module: torch.nn.Module) -> Program:
        """Return a copy that keeps `module`, as it is called now, as the reference called `name`."""
        return self.replace(references={**self.references, name: Form(module, self.interface)})

    def group(self, name: str) -> Group:
        """Return the group called `name`.

        Raises:
            KeyError: no group has this name; the message lists those there are.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; this program has {[group.name for group in self.groups]}")
