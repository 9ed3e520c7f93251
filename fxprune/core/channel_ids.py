"""Channel ids and what is known about them: the ledger that channel tracing writes and plans are read from.

An id names one channel: one index of one parameter axis, one element of a graph input, or something computed from
several of them. Two relations hold between ids. *Merge*: both go or both stay. *Needs*: as long as a stays, b stays
(a is one of several users of a shared b). Edges are collected as arrays; `ChannelMap` condenses them with scipy's
connected components, so that no Python loop runs over channels.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

__all__ = [
    "ActivationSite",
    "AttentionSite",
    "ChannelLedger",
    "ChannelMap",
    "Edges",
    "IdArray",
    "IdSet",
    "NormSite",
    "ParameterAxis",
    "Pin",
    "Role",
]

IdArray = NDArray[np.int64]
Edges = NDArray[np.int32]
"""Ends of edges between ids: there are more edges than anything else, and 2^31 ids would not fit into memory."""
_CHUNK = 1 << 22
"""Edges that are condensed at a time."""
Role = Literal["", "rows", "columns", "experts"]


@dataclass(frozen=True)
class ParameterAxis:
    """One axis of one parameter, with the id of its first element; the others follow.

    Attributes:
        parameter: qualified name.
        axis: which axis.
        first: id of index 0.
        size: length of the axis.
        role: what the axis is to the Linear (or grouped Linear) whose weight this is: the `rows` that it puts out,
            the `columns` that it reads, or its `experts`; empty for any other parameter.
    """

    parameter: str
    axis: int
    first: int
    size: int
    role: Role = ""

    def ids(self) -> IdArray:
        """The ids of the axis, in order."""
        return np.arange(self.first, self.first + self.size, dtype=np.int64)


@dataclass(frozen=True)
class NormSite:
    """A reduction over channels: removing some of `ids` but not all changes what it computes.

    Attributes:
        node: name of the graph node.
        module: qualified name of the module it belongs to.
        kind: operator name, such as `mean` or `layer_norm`.
        ids: the channels reduced together.
        width: how many there were when the graph was traced.
        choice: whether the channels compete (a router's softmax and top-k): a channel that is never chosen may go.
        rows: (rows, members) the same ids where they compete inside rows, each of which stays; None otherwise.
    """

    node: str
    module: str
    kind: str
    ids: IdArray
    width: int
    choice: bool = False
    rows: IdArray | None = None


@dataclass(frozen=True)
class ActivationSite:
    """A nonlinear function applied to channels one by one."""

    op: str
    module: str
    ids: IdArray


@dataclass(frozen=True)
class AttentionSite:
    """A place where scores meet values.

    Attributes:
        node: name of the graph node.
        module: qualified name of the module it belongs to.
        heads: id of each query head's scores, in head order.
        outputs: ids of the head outputs, (query heads, value dim), flattened in head order.
    """

    node: str
    module: str
    heads: IdArray
    outputs: IdArray


@dataclass(frozen=True)
class Pin:
    """Channels that must stay, and why.

    Attributes:
        ids: the channels.
        op: operator that pins them.
        module: qualified name of the module where it happens.
        reason: what keeps them.
    """

    ids: IdArray
    op: str
    module: str
    reason: str

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.op}{where}: {self.reason}"


class IdSet:
    """A growing set of ids that can be asked for many at once: one boolean per id, doubled when it is full."""

    def __init__(self) -> None:
        self._has = np.zeros(1024, dtype=bool)

    def append(self, ids: IdArray) -> None:
        """Add ids."""
        if len(ids) and (needed := int(ids.max()) + 1) > len(self._has):
            self._has = np.concatenate([self._has, np.zeros(max(needed, len(self._has)), dtype=bool)])
        self._has[ids] = True

    def contains(self, ids: IdArray) -> NDArray[np.bool_]:
        """Which of `ids` are in the set, in their shape."""
        found: NDArray[np.bool_] = self._has[np.minimum(ids, len(self._has) - 1)] & (ids < len(self._has))
        return found


@dataclass
class ChannelLedger:
    """Everything that the rules write down while the graph is walked. Ids start at 1; 0 means no channel."""

    next_id: int = 1
    axes: dict[tuple[str, int], ParameterAxis] = field(default_factory=dict)
    merges: list[tuple[Edges, Edges]] = field(default_factory=list)
    needs: list[tuple[Edges, Edges]] = field(default_factory=list)
    consumed: list[IdArray] = field(default_factory=list)
    scores: IdSet = field(default_factory=IdSet)
    states: list[IdArray] = field(default_factory=list)
    inputs: list[Pin] = field(default_factory=list)
    outputs: list[Pin] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    norms: list[NormSite] = field(default_factory=list)
    attentions: list[AttentionSite] = field(default_factory=list)
    activations: list[ActivationSite] = field(default_factory=list)
    counts: IdSet = field(default_factory=IdSet)
    rows: list[Edges] = field(default_factory=list)

    def fresh(self, count: int) -> IdArray:
        """Hand out `count` new ids."""
        first, self.next_id = self.next_id, self.next_id + count
        return np.arange(first, self.next_id, dtype=np.int64)

    def axis(self, parameter: str, axis: int, size: int, role: Role = "") -> ParameterAxis:
        """The ids of a parameter axis, made at first use."""
        key = (parameter, axis)
        if key not in self.axes:
            self.axes[key] = ParameterAxis(parameter, axis, int(self.fresh(size)[0]), size, role)
        elif role and not self.axes[key].role:
            known = self.axes[key]
            self.axes[key] = ParameterAxis(parameter, axis, known.first, known.size, role)
        return self.axes[key]

    def merge(self, a: IdArray, b: IdArray) -> None:
        """Record that a[i] and b[i] go or stay together."""
        if len(a):
            self.merges.append((a.astype(np.int32), b.astype(np.int32)))

    def need(self, a: IdArray, b: IdArray) -> None:
        """Record that b[i] stays as long as a[i] does."""
        if len(a):
            self.needs.append((a.astype(np.int32), b.astype(np.int32)))

    def is_score(self, ids: IdArray) -> NDArray[np.bool_]:
        """Which of `ids` are attention scores."""
        return self.scores.contains(ids)

    def is_count(self, ids: IdArray) -> NDArray[np.bool_]:
        """Which of `ids` count how often a channel was chosen: 0 once it is gone."""
        return self.counts.contains(ids)


def _merged(merges: list[tuple[Edges, Edges]], size: int) -> tuple[int, Edges]:
    """Connected components of `size` ids: how many, and the component of each id.

    Components grow by hooking the larger of two roots to the smaller and shortening the paths to the roots, chunk by
    chunk (Shiloach and Vishkin, An O(log n) parallel connectivity algorithm, 1982); scipy's function needs three times
    the memory.
    """
    root = np.arange(size, dtype=np.int32)
    ends = np.cumsum([len(a) for a, _ in merges])
    first = 0
    while first < len(merges):
        last = int(np.searchsorted(ends, (ends[first - 1] if first else 0) + _CHUNK)) + 1
        a, b = (np.concatenate([pair[end] for pair in merges[first:last]]) for end in (0, 1))
        first = last
        while len(a):
            for nodes in (a, b):
                while not np.array_equal(shorter := root[root[nodes]], root[nodes]):
                    root[nodes] = shorter
            a, b = root[a], root[b]
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
    while not np.array_equal(shorter := root[root], root):
        root = shorter
    is_root = root == np.arange(size, dtype=np.int32)
    component = np.cumsum(is_root, dtype=np.int32) - 1
    return int(component[-1]) + 1, component[root]


def _graph(pairs: list[tuple[Edges, Edges]], size: int, of: Edges) -> csr_matrix:
    """The edges between `size` nodes as a matrix; `of` says which node an id is."""
    a, b = (of[np.concatenate([pair[end] for pair in pairs] or [np.zeros(0, np.int32)])] for end in (0, 1))
    return csr_matrix((np.ones(len(a), bool), (a, b)), (size, size))


class ChannelMap:
    """The condensed ledger: classes of channels, who needs whom, and what may go.

    Attributes:
        class_of: class of each id, (ids,); index 0 is unused.
        count: number of classes.
        axes: the parameter axes, in the order they were met.
        pinned: whether a class must stay, (classes,).
        source: whether a class may be removed by choice: it is not pinned, and it is not merely shared by others.
        norms, attentions, activations, pins: what the walk met, in graph order.
        rows: (rows, members) ids of every value that a view splits into rows: all rows that stay keep equally many.
    """

    def __init__(self, ledger: ChannelLedger) -> None:
        count, merged = _merged(ledger.merges, ledger.next_id)
        # Classes that need each other are one class.
        needs = _graph(ledger.needs, count, merged)
        self.count, strong = connected_components(needs, directed=True, connection="strong")
        self.class_of: IdArray = strong[merged].astype(np.int64)
        a, b = (strong[ends] for ends in needs.nonzero())
        other = a != b
        edges = (a[other], b[other])
        self.needs = csr_matrix((np.ones(len(edges[0]), bool), edges), (self.count, self.count))
        self.axes = tuple(ledger.axes.values())
        self.norms = tuple(ledger.norms)
        self.attentions = tuple(ledger.attentions)
        self.activations = tuple(ledger.activations)
        self.rows = tuple(ledger.rows)

        state = self._flag(ledger.states)
        self.pins: list[Pin] = list(ledger.pins)
        for pin in (*ledger.inputs, *ledger.outputs):
            # What a model hands out only to get it back (a cache) may shrink; other inputs and outputs may not.
            ids = pin.ids[~state[self.class_of[pin.ids]]]
            if len(ids):
                self.pins.append(Pin(ids, pin.op, pin.module, pin.reason))
        self.pinned = self._flag([pin.ids for pin in self.pins])
        needed = np.asarray(self.needs.sum(axis=0)).ravel() > 0
        self.base = self._flag(ledger.consumed) | self.pinned | ~needed
        self._pin_what_is_needed()
        self.source = self.base & ~self.pinned

    def _pin_what_is_needed(self) -> None:
        """What cannot go (it is pinned, or no parameter is its own) keeps what it needs."""
        fixed = self.pinned | (self.base & ~self._flag([axis.ids() for axis in self.axes]))
        fixed[self.class_of[0]] = False  # no channel
        reached = self._closure(fixed) & ~self.pinned & ~fixed
        if reached.any():
            ids = np.flatnonzero(reached[self.class_of]).astype(np.int64)
            self.pins.append(Pin(ids, "need", "", "something that must stay is computed from it"))
            self.pinned |= reached

    def _closure(self, classes: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """These classes and everything they need, directly or not."""
        found, frontier = classes.copy(), classes
        needs = self.needs.astype(np.int32)
        while frontier.any():
            frontier = (np.asarray(frontier.astype(np.int32) @ needs).ravel() > 0) & ~found
            found |= frontier
        return found

    def of_axis(self, axis: ParameterAxis) -> IdArray:
        """The class of each index of a parameter axis, (size,); a view."""
        return self.class_of[axis.first : axis.first + axis.size]

    def _flag(self, groups: list[IdArray]) -> NDArray[np.bool_]:
        flag = np.zeros(self.count, dtype=bool)
        for ids in groups:
            flag[self.class_of[ids]] = True
        return flag

    def keep(self, removed: IdArray) -> NDArray[np.bool_]:
        """Which ids stay when the classes `removed` go.

        A shared class stays exactly as long as one of its users does.

        Args:
            removed: classes to remove; each must be a source.

        Returns:
            One boolean per id; index 0 (no channel) is True.
        """
        keep = self.base.copy()
        keep[removed] = False
        gone = np.zeros(self.count, dtype=bool)
        gone[removed] = True
        frontier = keep
        while frontier.any():
            reached = np.asarray(frontier.astype(np.int32) @ self.needs.astype(np.int32)).ravel() > 0
            frontier = reached & ~keep & ~gone
            keep |= frontier
        result: NDArray[np.bool_] = keep[self.class_of]
        result[0] = True
        return result

    def users(self, classes: IdArray) -> IdArray:
        """The classes that need any of `classes`."""
        return np.unique(self.needs.tocsc()[:, classes].nonzero()[0]).astype(np.int64)

    def pin_reasons(self, classes: IdArray) -> list[Pin]:
        """The pins that hold any of `classes`."""
        wanted = np.zeros(self.count, dtype=bool)
        wanted[classes] = True
        return [pin for pin in self.pins if wanted[self.class_of[pin.ids]].any()]

    def axes_by_parameter(self) -> dict[str, list[ParameterAxis]]:
        """Parameter axes by qualified parameter name."""
        table: dict[str, list[ParameterAxis]] = defaultdict(list)
        for axis in self.axes:
            table[axis.parameter].append(axis)
        return dict(table)
