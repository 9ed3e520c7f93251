"""Stages: a traced graph cut where calibration must stop, solve and go on with the new weights.

    tokens ─ embedding ─ norm ┃ q, k, v ─ attention ┃ o ─ add ─ norm ┃ gate, up ─ product ┃ down ─ add ─ norm ┃ q, k ...
              stage 0         ┃      stage 1        ┃    stage 2     ┃      stage 3       ┃       stage 4
                        Gram of q,k,v          Gram of o       Gram of gate,up        Gram of down

Data flow decides: a projection belongs to the stage after the one in which its input is known, so one forward pass in
stages serves every projection with inputs that already carry the pruned weights (`true_sequential` of GPTQ and
SparseGPT code, at half its forwards). Parallel blocks, encoder-decoders and experts fall out of it: what is known at
the same time is solved at the same time.

Between stages only what later stages need is kept, and of that only what cheap operators cannot compute again: in a
decoder the residual stream at the ends of attention and MLP. Stages repeat as the layers do; a block is one period of
them. No name is read but for labels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Node

from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.lifted import is_projection
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Cut", "InputSite", "Stage", "cut_stages"]

aten = torch.ops.aten
_EXPENSIVE = {
    aten.scaled_dot_product_attention.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.addmm.default,
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.convolution.default,
    aten.softmax.int,
    aten._softmax.default,
}


@dataclass(frozen=True)
class InputSite:
    """A value that projections read, whose statistics are collected once for all of them.

    Attributes:
        value: name of the graph node.
        offsets: name of the node that says where each expert's rows end; None for ordinary Linears.
        linears: qualified names of the projections that read it, in graph order.
        block: index of the repeated block it belongs to.
    """

    value: str
    offsets: str | None
    linears: tuple[str, ...]
    block: int


@dataclass(frozen=True)
class Stage:
    """A piece of the graph that runs from kept values to kept values.

    Attributes:
        module: reads `inputs`, returns `outputs` and then what `sites` need (value, and offsets where there are any).
            Its projections are the very modules of the graph it was cut from.
        inputs: names of the values it reads: inputs of the graph, context, and what earlier stages kept.
        outputs: names of the values it computes that later stages need.
        drops: names of kept values that no later stage needs.
        sites: where statistics are collected when it has run.
        block: index of the repeated block whose weights it runs; -1 before the first.
    """

    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    drops: tuple[str, ...]
    sites: tuple[InputSite, ...]
    block: int

    def parameters_of(self) -> int:
        """Elements of the weights that the stage runs."""
        return sum(parameter.numel() for parameter in self.module.parameters())


@dataclass(frozen=True)
class Cut:
    """A graph in stages.

    Attributes:
        context: computes, from inputs that are the same for every sample (masks, positions, empty caches), what the
            stages need of it; `context_inputs` and `context_outputs` name what goes in and comes out.
        context_inputs: see `context`.
        context_outputs: see `context`.
        stages: in the order in which they run.
        blocks: a label for each block, from the names of its projections.
        period: how many stages make a block.
    """

    context: GraphModule
    context_inputs: tuple[str, ...]
    context_outputs: tuple[str, ...]
    stages: tuple[Stage, ...]
    blocks: tuple[str, ...]
    period: int


def cut_stages(
    graph_module: GraphModule,
    targets: Iterable[str],
    varying: Iterable[str],
    *,
    true_sequential: bool = True,
    replay: bool = True,
) -> Cut:
    """Cut a lifted graph into stages.

    Args:
        graph_module: a lifted flat graph. What does not lead to a target is left out.
        targets: qualified names of the projections that are to be solved.
        varying: names of the inputs that differ from sample to sample.
        true_sequential: whether every projection is solved on inputs that its block's earlier projections have already
            been pruned for; otherwise a block's statistics are collected first and its projections solved together.
        replay: without `true_sequential`, whether a block runs again with its new weights (pruned inputs for the next
            block) or once, with the old ones (dense inputs).

    Returns:
        The stages. Their modules share every projection and parameter with `graph_module`.

    Raises:
        ValueError: a target is not called by the graph.
    """
    return _Cutter(graph_module, tuple(targets), frozenset(varying)).cut(true_sequential=true_sequential, replay=replay)


class _Cutter:
    """Levels, what is kept between them, and the modules in between."""

    def __init__(self, graph_module: GraphModule, targets: tuple[str, ...], varying: frozenset[str]) -> None:
        self.root = graph_module
        self.nodes = [node for node in graph_module.graph.nodes if node.op != "output"]
        self.calls = {node: str(node.target) for node in self.nodes if node.op == "call_module"}
        missing = set(targets) - set(self.calls.values())
        if missing:
            raise ValueError(f"no call of {min(missing)} in the graph")
        wanted = set(targets)
        self.targets = {node: name for node, name in self.calls.items() if name in wanted}
        self.names = {node.name: node for node in self.nodes}
        needed = self._ancestors(self.targets)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.dependent: dict[Node, bool] = {}
        self.static: dict[Node, bool] = {}
        for node in self.nodes:
            sources = node.all_input_nodes
            if node.op == "placeholder":
                self.dependent[node], self.static[node] = node.name in varying, False
            else:
                self.dependent[node] = any(self.dependent[s] for s in sources) and not _is_size_of_input(node)
                self.static[node] = all(self.static[s] for s in sources)
        self.level: dict[Node, int] = {}
        for node in self.nodes:
            own = max((self.level.get(s, 0) for s in node.all_input_nodes if self.dependent[s]), default=0)
            self.level[node] = own + (node in self.targets)
        self.last = max((self.level[_source(call)] for call in self.targets), default=0)
        # The last targets themselves are not run: nobody needs what they compute.
        self.active = [
            node
            for node in self.nodes
            if node in needed and self.dependent[node] and node.op != "placeholder" and self.level[node] <= self.last
        ]
        self.latest = dict.fromkeys(self.active, 0)
        """The last level at which somebody reads a value."""
        for node in self.active:
            for source in node.all_input_nodes:
                if source in self.latest:
                    self.latest[source] = max(self.latest[source], self.level[node])

    @staticmethod
    def _ancestors(roots: Iterable[Node]) -> set[Node]:
        found: set[Node] = set()
        pending = [source for root in roots for source in root.all_input_nodes] + list(roots)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += node.all_input_nodes
        return found

    def cut(self, *, true_sequential: bool, replay: bool) -> Cut:
        sites = self._sites()
        period, first = _period([self._signature(level) for level in range(self.last + 2)])
        block_of = {level: (level - first) // period for level in range(self.last + 2)}
        blocks = block_of[self.last + 1] + 1
        labels: list[list[str]] = [[] for _ in range(max(blocks, 1))]
        placed: dict[int, list[InputSite]] = {}
        for level, group in sites.items():
            block = max(block_of[level + 1], 0)
            placed[level] = [InputSite(s.value, s.offsets, s.linears, block) for s in group]
            labels[block] += [name for s in group for name in s.linears]
        if true_sequential:
            stages = self._sequential(placed, block_of)
        else:
            stages = self._blockwise(placed, block_of, first, period, replay=replay)
        context, inputs, outputs = self._context(stages)
        return Cut(context, inputs, outputs, tuple(stages), tuple(map(_common, labels)), period)

    def _sites(self) -> dict[int, list[InputSite]]:
        """Values that targets read, by the level at which they are known."""
        readers: dict[tuple[str, str | None], dict[str, None]] = {}
        for call, name in self.targets.items():
            grouped = isinstance(get_attribute(self.root, name), GroupedLinear)
            offsets = call.args[1].name if grouped and isinstance(call.args[1], Node) else None
            readers.setdefault((_source(call).name, offsets), {})[name] = None
        found: dict[int, list[InputSite]] = {}
        for (value, offsets), names in readers.items():
            level = self.level[self.names[value]]
            found.setdefault(level, []).append(InputSite(value, offsets, tuple(names), 0))
        return found

    def _signature(self, level: int) -> tuple[Any, ...]:
        """The shapes of the projections of a level: what repeats when layers do."""
        found: Counter[tuple[Any, ...]] = Counter()
        for node, name in self.calls.items():
            module = get_attribute(self.root, name)
            if is_projection(module) and self.level[node] == level and node in self.targets:
                found[tuple(module.weight.shape)] += 1
        return tuple(sorted(found.items()))

    def _kept(self, level: int) -> dict[Node, None]:
        """What must be stored after a level: what is used later and cannot be computed again cheaply."""
        live = [node for node in self.active if self.level[node] <= level < self.latest[node]]
        kept = dict.fromkeys(live)
        for node in reversed(live):
            rest = {other: None for other in kept if other is not node}
            slice_ = self._slice([node], rest)
            if not any(n in self.targets or _expensive(n, self.root) for n in slice_):
                kept = rest
        return kept

    def _slice(self, roots: Sequence[Node], kept: Iterable[Node]) -> list[Node]:
        """Nodes to compute the roots from what is kept, graph inputs and context, in graph order."""
        known = set(kept)
        found: set[Node] = set()
        pending = [root for root in roots if root not in known]
        while pending:
            node = pending.pop()
            if node in found or node.op == "placeholder" or not (self.dependent[node] or self.static[node]):
                continue
            found.add(node)
            pending += [source for source in node.all_input_nodes if source not in known]
        return sorted(found, key=self.order.__getitem__)

    def _sequential(self, sites: dict[int, list[InputSite]], block_of: dict[int, int]) -> list[Stage]:
        stages: list[Stage] = []
        before: dict[Node, None] = {}
        for level in range(self.last + 1):
            after = self._kept(level) if level < self.last else {}
            stages.append(self._stage(before, after, sites.get(level, []), block_of[level]))
            before = after
        return stages

    def _blockwise(
        self, sites: dict[int, list[InputSite]], block_of: dict[int, int], first: int, period: int, *, replay: bool
    ) -> list[Stage]:
        """Two stages a block, one that collects and one that goes on; a single one with dense inputs."""
        stages: list[Stage] = []
        before: dict[Node, None] = {}
        boundary = first - 1
        if boundary >= 0:
            before = self._kept(boundary)
            stages.append(self._stage({}, before, [], -1))
        while boundary < self.last or (boundary == self.last and boundary in sites):
            levels = range(boundary, boundary + period)
            block = max(block_of[boundary + 1], 0)
            collected = [site for level in levels for site in sites.get(level, [])]
            after = self._kept(boundary + period) if boundary + period < self.last + 1 else {}
            if replay:
                stages.append(self._stage(before, before, collected, block))
                if after:
                    stages.append(self._stage(before, after, [], block))
            else:
                stages.append(self._stage(before, after, collected, block))
            before = after
            boundary += period
        return stages

    def _stage(
        self, before: dict[Node, None], after: dict[Node, None], sites: Sequence[InputSite], block: int
    ) -> Stage:
        new = [node for node in after if node not in before]
        wanted = [self.names[n] for site in sites for n in (site.value, site.offsets) if n is not None]
        module, inputs = self._module([*new, *wanted], before)
        drops = tuple(node.name for node in before if node not in after)
        return Stage(module, inputs, tuple(node.name for node in new), drops, tuple(sites), block)

    def _module(self, outputs: Sequence[Node], kept: Iterable[Node]) -> tuple[GraphModule, tuple[str, ...]]:
        """A graph module that computes some values from what is kept."""
        nodes = self._slice(outputs, kept)
        inside = set(nodes)
        read = {source for node in nodes for source in node.all_input_nodes} | set(outputs)
        given = sorted(read - inside, key=self.order.__getitem__)
        return self._graph(given, nodes, outputs), tuple(node.name for node in given)

    def _graph(self, given: Sequence[Node], nodes: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
        graph = Graph()
        copies: dict[Node, Node] = {node: graph.placeholder(node.name) for node in given}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in outputs))
        return GraphModule(self.root, graph)

    def _context(self, stages: Sequence[Stage]) -> tuple[GraphModule, tuple[str, ...], tuple[str, ...]]:
        """What stages read that is the same for every sample."""
        read = {self.names[name] for stage in stages for name in stage.inputs}
        outputs = [n for n in self.nodes if n in read and not self.dependent[n] and n.op != "placeholder"]
        inside: set[Node] = set()
        pending = list(outputs)
        while pending:
            node = pending.pop()
            if node not in inside and node.op != "placeholder":
                inside.add(node)
                pending += node.all_input_nodes
        nodes = sorted(inside, key=self.order.__getitem__)
        read = {source for node in nodes for source in node.all_input_nodes} - inside
        given = sorted(read, key=self.order.__getitem__)
        module = self._graph(given, nodes, outputs)
        return module, tuple(n.name for n in given), tuple(n.name for n in outputs)


def _source(call: Node) -> Node:
    source = call.args[0]
    assert isinstance(source, Node)
    return source


def _is_size_of_input(node: Node) -> bool:
    """Lengths of the graph's inputs are the same for every sample."""
    return node.target is aten.sym_size.int and node.args[0].op == "placeholder"  # type: ignore[union-attr]


def _expensive(node: Node, root: GraphModule) -> bool:
    if node.op == "call_module":
        return is_projection(get_attribute(root, str(node.target)))
    return node.target in _EXPENSIVE


def _period(signatures: Sequence[tuple[Any, ...]]) -> tuple[int, int]:
    """The period of the levels' signatures, and the first level that belongs to a block.

    The smallest period with which a run of at least half the levels repeats; where nothing repeats every level is a
    block of its own.
    """
    filled = [index for index, signature in enumerate(signatures) if signature]
    first = filled[0] if filled else 0
    levels = signatures[first : filled[-1] + 1] if filled else ()
    for period in range(1, len(levels) // 2 + 1):
        run = longest = 0
        for one, other in zip(levels, levels[period:], strict=False):
            run = run + 1 if one == other else 0
            longest = max(longest, run)
        if longest >= period and 2 * (longest + period) >= len(levels):
            return period, first
    return 1, first


def _common(names: Sequence[str]) -> str:
    """The longest module path that all names share."""
    paths = [name.split(".") for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
