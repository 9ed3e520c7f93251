"""Finds stacks of layers that can be left out one by one.

    x ─┬───────── add ─┬─────── add ─ y          y may be replaced by x: the layer's own nodes then feed nothing
       └ attention ┘   └── mlp ┘

A candidate is a module of a list (`layers.3`); data flow decides: outside of it only one value that it computes may be
used, besides caches of its own, and that value must have the shape of the one value it reads from before it. Names
come from the module that a node belongs to; they group nodes and label the result, nothing else.

Refused, and listed in the details with the reason:
 1. a layer that hands on more than one value (an attention bias that later layers use);
 2. a layer whose output is shaped like none, or several, of the values it reads;
 3. a stack with a single layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from fxprune.channels.locate import LocatePass, unique_name
from fxprune.core.groups import LayerGroup

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.core.groups import Group
    from fxprune.core.program import Program

__all__ = ["LocateLayers", "layer_nodes"]

_LAYER = re.compile(r"(.*?)\.(\d+)(\..*)?")


def _layer_of(node: Node) -> tuple[str, int] | None:
    """The outermost list of modules that a node belongs to, with the position in it."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        match = _LAYER.fullmatch(str(path))
        if match is not None:
            return match[1], int(match[2])
    return None


def layer_nodes(program: Program) -> dict[str, dict[int, list[Node]]]:
    """The nodes of every layer of every stack, in graph order."""
    stacks: dict[str, dict[int, list[Node]]] = defaultdict(lambda: defaultdict(list))
    for node in program.graph_module.graph.nodes:
        found = _layer_of(node) if node.op not in {"placeholder", "get_attr", "output"} else None
        if found is not None:
            stacks[found[0]][found[1]].append(node)
    return {name: dict(layers) for name, layers in stacks.items()}


def _cache_nodes(program: Program) -> dict[str, Node]:
    """The node behind every cache output, by the output's name."""
    output = next(node for node in program.graph_module.graph.nodes if node.op == "output")
    caches = [entry.output for entry in program.interface.cache]
    values = output.args[0] if isinstance(output.args[0], (tuple, list)) else ()
    named = dict(zip(program.interface.outputs, values, strict=False))
    return {name: named[name] for name in caches if isinstance(named.get(name), Node)}


def _shape(node: Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return (*map(str, value.shape), value.dtype) if isinstance(value, torch.Tensor) else None


def _ends(nodes: list[Node], output: Node, returned: set[Node]) -> tuple[str, str] | str:
    """Entry and exit of a layer, or why it cannot be left out; `returned` are the nodes of the cache."""
    mine = set(nodes)
    exits = [
        node
        for node in nodes
        if _shape(node) is not None
        and any(user not in mine and not (user is output and node in returned) for user in node.users)
    ]
    if len(exits) != 1:
        listed = ", ".join(node.name for node in exits[:4])
        return f"it hands on {len(exits)} values ({listed})"  # refusal 1
    read = {source for node in nodes for source in node.all_input_nodes if source not in mine}
    entries = [node for node in read if node.op != "get_attr" and _shape(node) == _shape(exits[0])]
    if len(entries) != 1:
        return f"{len(entries)} of the values it reads are shaped like what it hands on"  # refusal 2
    return entries[0].name, exits[0].name


def _caches(caches: Mapping[str, Node], layers: Mapping[int, list[Node]]) -> dict[int, tuple[str, ...]]:
    """Names of the cache outputs that each layer computes, in their order."""
    layer_of = {node: index for index, nodes in layers.items() for node in nodes}
    found: dict[int, list[str]] = {index: [] for index in layers}
    for name, node in caches.items():
        if node in layer_of:
            found[layer_of[node]].append(name)
    return {index: tuple(names) for index, names in found.items()}


def _members(program: Program, layers: Mapping[int, list[Node]]) -> dict[int, dict[str, int]]:
    """Parameters that only one layer uses, with their sizes."""
    users: dict[str, set[int | None]] = defaultdict(set)
    sizes: dict[str, int] = {}
    layer_of = {node: index for index, nodes in layers.items() for node in nodes}
    tensors = program.graph_module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    for node in program.graph_module.graph.nodes:
        if node.op == "get_attr":
            read, by = [str(node.target)], {layer_of.get(user) for user in node.users}
        elif node.op == "call_module":
            module = program.graph_module.get_submodule(str(node.target))
            read, by = [f"{node.target}.{name}" for name, _ in module.named_parameters()], {layer_of.get(node)}
        else:
            continue
        for name in read:
            if isinstance(tensors.get(name), torch.nn.Parameter):
                owner = first[id(tensors[name])]
                users[owner] |= by
                sizes[owner] = tensors[name].numel()
    found: dict[int, dict[str, int]] = {index: {} for index in layers}
    for name, by in users.items():
        if len(by) == 1 and (index := next(iter(by))) is not None:
            found[index][name] = sizes[name]
    return found


class LocateLayers(LocatePass):
    """Name the layers of every stack (see the module's docstring for the graph and the refusals)."""

    name = "locate_layers"
    finds = (LayerGroup,)
    reads_channels = False

    def locate(self, program: Program, kept: tuple[Group, ...], refused: dict[str, str]) -> list[LayerGroup]:
        """A `LayerGroup` for every stack; layers that must stay are listed with reasons."""
        groups: list[LayerGroup] = []
        output = next(node for node in program.graph_module.graph.nodes if node.op == "output")
        caches = _cache_nodes(program)
        returned = set(caches.values())
        for name, layers in layer_nodes(program).items():
            ends = {index: _ends(nodes, output, returned) for index, nodes in sorted(layers.items())}
            refused |= {f"{name}.{index}": why for index, why in ends.items() if isinstance(why, str)}
            found = {index: pair for index, pair in ends.items() if not isinstance(pair, str)}
            if len(layers) < 2 or not found:
                refused |= {f"{name}.{index}": "it is the only layer" for index in found}  # refusal 3
                continue
            members = _members(program, {index: layers[index] for index in found})
            cached = _caches(caches, layers)
            groups.append(
                LayerGroup(
                    unique_name(name, LayerGroup.kind, (*kept, *groups)),
                    len(groups),
                    (),
                    entries=tuple(pair[0] for pair in found.values()),
                    exits=tuple(pair[1] for pair in found.values()),
                    members=tuple(tuple(members[index]) for index in found),
                    sizes=tuple(sum(members[index].values()) for index in found),
                    labels=tuple(f"{name}.{index}" for index in found),
                    others=len(layers) - len(found),
                    caches=tuple(cached[index] for index in found),
                )
            )
        return groups
