"""Groups: what can be pruned, as records that print themselves.

A group is a set of like units (query heads of one attention, channels of one MLP). A unit is what can be removed: for
each parameter that it touches, the indices along one axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxprune.core.channel_ids import ChannelMap, IdArray, Role

__all__ = [
    "AttentionGroup",
    "ExpertGroup",
    "ExpertMlpGroup",
    "Group",
    "HiddenGroup",
    "LayerGroup",
    "MaskPlace",
    "MlpGroup",
    "UnitSlice",
    "collect_slices",
    "common_owner",
    "signatures",
]


MaskPlace = Literal["consumers", "producers", "choices", "layers"]


@dataclass(frozen=True)
class UnitSlice:
    """What every unit of a group owns along one axis of one parameter.

    Attributes:
        parameter: qualified name.
        axis: which axis.
        indices: (units, per unit) indices along the axis.
        elements: parameter elements behind one index.
        role: what the axis is to the Linear whose weight the parameter is (see `ParameterAxis`).
    """

    parameter: str
    axis: int
    indices: IdArray
    elements: int
    role: Role = ""

    @property
    def per_unit(self) -> int:
        """Indices that one unit owns."""
        return int(self.indices.shape[1])

    @property
    def produces(self) -> bool:
        """Whether these are rows of a Linear's weight."""
        return self.role == "rows"

    @property
    def consumes(self) -> bool:
        """Whether these are columns of a Linear's weight."""
        return self.role == "columns"


@dataclass(frozen=True)
class Group:
    """Like units that can be removed independently of each other.

    Attributes:
        name: qualified name of the module the units live in; a label, never a key to behaviour.
        layer: position among the groups of its kind, in graph order.
        slices: what each unit owns, one entry per parameter axis.
        shared: what several units own together (key and value rows of a KV group), indexed by sharing set.
        sharing: (units,) which sharing set each unit uses; None when nothing is shared.
        multiple: what is kept must be a multiple of this (grouped products need rows of whole 16 bytes).
        parts: (parts, units of one) int64, the units of each part of the layout: every part keeps equally many (see
            `fxprune.core.parts`); None where there are no parts.
    """

    # What kind of thing this is, what one unit is called, and where a mask of zeros removes a unit exactly.
    kind: ClassVar[str] = "group"
    unit: ClassVar[str] = "unit"
    masked: ClassVar[MaskPlace] = "consumers"

    name: str
    layer: int
    slices: tuple[UnitSlice, ...]
    shared: tuple[UnitSlice, ...] = ()
    sharing: IdArray | None = None
    multiple: int = 1
    parts: IdArray | None = None

    @property
    def units(self) -> int:
        """How many units there are."""
        return int(self.slices[0].indices.shape[0])

    @property
    def least(self) -> int:
        """How many units must stay."""
        return self.step

    @property
    def step(self) -> int:
        """What the number of units that stay is a multiple of."""
        return math.lcm(self.multiple, 1 if self.parts is None else len(self.parts))

    @property
    def producers(self) -> tuple[str, ...]:
        """Linears whose rows the units are."""
        return tuple(s.parameter.removesuffix(".weight") for s in (*self.slices, *self.shared) if s.produces)

    @property
    def consumers(self) -> tuple[UnitSlice, ...]:
        """The slices of Linears whose columns read the units; masks stand on their inputs."""
        return tuple(s for s in self.slices if s.consumes)

    @property
    def unit_parameters(self) -> int:
        """Parameters that go with one unit, without what it shares."""
        return sum(s.per_unit * s.elements for s in self.slices)

    @property
    def shared_parameters(self) -> int:
        """Parameters that go with one sharing set, once none of its units is left."""
        return sum(s.per_unit * s.elements for s in self.shared)

    def parameters_removed(self, kept: Sequence[int] | IdArray) -> int:
        """Parameters that go when only the units `kept` stay."""
        kept = np.asarray(kept, dtype=np.int64)
        removed = (self.units - len(kept)) * self.unit_parameters
        if self.sharing is not None:
            sets = len(np.unique(self.sharing)) - len(np.unique(self.sharing[kept]))
            removed += sets * self.shared_parameters
        return removed

    def describe(self) -> str:
        """One line for people."""
        return f"{self.units} {self.unit}s"

    def __str__(self) -> str:
        return f"{self.name} [{self.kind}]: {self.describe()}"


@dataclass(frozen=True)
class AttentionGroup(Group):
    """The heads of one attention. The unit is the query head; KV heads are what query heads share.

    Attributes:
        head_dim: value channels of one head.
        node: graph node where scores meet values.
    """

    kind: ClassVar[str] = "attention"
    unit: ClassVar[str] = "query head"

    head_dim: int = 0
    node: str = ""

    @property
    def kv_heads(self) -> int:
        """How many key/value heads there are."""
        return self.units if self.sharing is None else int(self.sharing.max()) + 1

    def kv_kept(self, kept: Sequence[int] | IdArray) -> list[int]:
        """The KV heads that stay when the query heads `kept` do."""
        if self.sharing is None:
            return [int(head) for head in kept]
        return [int(head) for head in np.unique(self.sharing[np.asarray(kept, dtype=np.int64)])]

    def heads_of(self, kv_head: int) -> list[int]:
        """The query heads that use a KV head."""
        if self.sharing is None:
            return [kv_head]
        return [int(head) for head in np.flatnonzero(self.sharing == kv_head)]

    @property
    def kv_parts(self) -> IdArray | None:
        """The KV heads of each part, (parts, KV heads of one); None where there are no parts."""
        if self.parts is None or self.sharing is None:
            return self.parts
        return np.stack([list(dict.fromkeys(self.sharing[part].tolist())) for part in self.parts])

    def describe(self) -> str:
        """Head counts and where they are read."""
        readers = ", ".join(s.parameter.removesuffix(".weight").rpartition(".")[2] for s in self.consumers)
        parts = "" if self.parts is None else f" in {len(self.parts)} parts"
        return f"{self.units} query heads on {self.kv_heads} KV heads of {self.head_dim}{parts}, read by {readers}"


@dataclass(frozen=True)
class MlpGroup(Group):
    """The intermediate channels of one MLP.

    Attributes:
        activation: name of the nonlinear operator between producers and consumer.
        gated: whether two producers meet in a product.
    """

    kind: ClassVar[str] = "mlp"
    unit: ClassVar[str] = "channel"

    activation: str = ""
    gated: bool = False

    def describe(self) -> str:
        """Width, form, and where the channels come from and go to."""
        writers = ", ".join(name.rpartition(".")[2] for name in self.producers)
        readers = ", ".join(s.parameter.removesuffix(".weight").rpartition(".")[2] for s in self.consumers)
        form = f"gated {self.activation}" if self.gated else self.activation
        return f"{self.units} channels, {form}, {writers} -> {readers}"


@dataclass(frozen=True)
class HiddenGroup(Group):
    """Channels that are normalised together: the residual stream, or a latent with a norm of its own.

    Removing one is exact when the norms are RMS norms whose weight and epsilon are rescaled (`fxprune.slimming.norms`).

    Attributes:
        norms: modules of the norms over these channels.
    """

    kind: ClassVar[str] = "hidden"
    unit: ClassVar[str] = "hidden channel"
    masked: ClassVar[MaskPlace] = "producers"

    norms: tuple[str, ...] = ()

    def describe(self) -> str:
        """Width and norms."""
        return f"{self.units} channels under {len(self.norms)} RMS norms, {len(self.producers)} Linears write them"


@dataclass(frozen=True)
class ExpertGroup(Group):
    """The experts of one mixture, with the rows of their router.

    Attributes:
        per_token: how many experts a token is sent to; as many must stay.
        choices: graph nodes that choose among the experts (softmax, top-k), or inside each part.
        per_part: how many of each part must stay: what is chosen inside it, and what a token needs of the parts that it
            is sent to.
    """

    kind: ClassVar[str] = "experts"
    unit: ClassVar[str] = "expert"
    masked: ClassVar[MaskPlace] = "choices"

    per_token: int = 1
    choices: tuple[str, ...] = ()
    per_part: int = 1

    @property
    def least(self) -> int:
        """A token needs as many experts as it is sent to, and every part as many as are chosen inside it."""
        parts = 1 if self.parts is None else len(self.parts)
        return max(-(-self.per_token // self.step) * self.step, parts * self.per_part)

    def describe(self) -> str:
        """Experts and how many a token sees."""
        parts = "" if self.parts is None else f", in {len(self.parts)} parts"
        return f"{self.units} experts, {self.per_token} a token{parts}"


@dataclass(frozen=True)
class ExpertMlpGroup(Group):
    """The intermediate channels inside the experts of one mixture.

    Unit e*width + j is channel j of expert e. Every expert keeps the same number of channels, each its own. The slices
    list the channels of one expert; all experts have the same.

    Attributes:
        experts: how many experts there are.
        activation: name of the nonlinear operator between producers and consumer.
        gated: whether two producers meet in a product.
    """

    kind: ClassVar[str] = "expert_mlp"
    unit: ClassVar[str] = "expert channel"

    experts: int = 1
    activation: str = ""
    gated: bool = False

    @property
    def width(self) -> int:
        """Channels of one expert."""
        return super().units

    @property
    def units(self) -> int:
        """Channels of all experts."""
        return self.experts * self.width

    @property
    def least(self) -> int:
        """Every expert keeps a channel, or as many as the multiple asks for."""
        return self.experts * self.multiple

    def kept_channels(self, kept: Sequence[int] | IdArray) -> IdArray:
        """Which channels each expert keeps, (experts, kept width); `kept` holds as many units of every expert."""
        units = np.sort(np.asarray(kept, dtype=np.int64))
        return (units % self.width).reshape(self.experts, -1)

    def describe(self) -> str:
        """Width, form, and where the channels come from and go to."""
        form = f"gated {self.activation}" if self.gated else self.activation
        return f"{self.width} channels in each of {self.experts} experts, {form}"


@dataclass(frozen=True)
class LayerGroup(Group):
    """The layers of one stack, each of which can be left out.

    Attributes:
        entries: for each layer the graph node of what it reads from the residual stream.
        exits: for each layer the graph node of what it hands on.
        members: for each layer the qualified names of the parameters that only it uses.
        sizes: for each layer how many parameters these hold.
        labels: qualified name of each layer's module.
        caches: for each layer the names of the graph outputs that hold its cache.
        others: how many layers of the stack cannot be left out.
    """

    kind: ClassVar[str] = "layers"
    unit: ClassVar[str] = "layer"
    masked: ClassVar[MaskPlace] = "layers"

    entries: tuple[str, ...] = ()
    exits: tuple[str, ...] = ()
    members: tuple[tuple[str, ...], ...] = ()
    sizes: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    caches: tuple[tuple[str, ...], ...] = ()
    others: int = 0

    @property
    def least(self) -> int:
        """One layer, unless others stay anyway."""
        return 0 if self.others else 1

    @property
    def units(self) -> int:
        """How many layers there are."""
        return len(self.exits)

    @property
    def unit_parameters(self) -> int:
        """Parameters of the average layer."""
        return sum(self.sizes) // max(1, len(self.sizes))

    def parameters_removed(self, kept: Sequence[int] | IdArray) -> int:
        """Parameters that go when only the layers `kept` stay."""
        return sum(self.sizes) - sum(self.sizes[int(layer)] for layer in kept)


def signatures(channels: ChannelMap) -> IdArray:
    """A number per class that says which parameter axes it touches and how often; like units share it, (classes,)."""
    random = np.random.default_rng(0)
    total = np.zeros(channels.count, dtype=np.uint64)
    for axis in channels.axes:
        weight = random.integers(1, 2**63, dtype=np.uint64)
        np.add.at(total, channels.of_axis(axis), weight)
    return total.view(np.int64)


def collect_slices(
    channels: ChannelMap,
    groups: Sequence[IdArray],
    elements: Mapping[str, Mapping[int, int]],
    units: Sequence[IdArray] | None = None,
) -> list[tuple[UnitSlice, ...] | None]:
    """What each unit of each group owns.

    Args:
        channels: the channel map.
        groups: for each group the classes of its units, in unit order; no class is in two groups.
        elements: for each parameter and axis, how many elements stand behind one index.
        units: for each group which unit each of its classes belongs to; without it every class is a unit.

    Returns:
        The slices of each group, or None for a group whose units own different numbers of indices of one axis.
    """
    group_of = np.full(channels.count, -1, dtype=np.int64)
    unit_of = np.zeros(channels.count, dtype=np.int64)
    counts = [len(classes) for classes in groups] if units is None else [int(u.max()) + 1 for u in units]
    for index, classes in enumerate(groups):
        group_of[classes], unit_of[classes] = index, np.arange(len(classes)) if units is None else units[index]
    slices: list[list[UnitSlice]] = [[] for _ in groups]
    uneven: set[int] = set()
    for axis in channels.axes:
        classes = channels.of_axis(axis)
        owners = group_of[classes]
        if owners.max() < 0:
            continue
        for index in np.unique(owners[owners >= 0]):
            positions = np.flatnonzero(owners == index)
            owned = unit_of[classes[positions]]
            count = np.bincount(owned, minlength=counts[index])
            if (count != count[0]).any():
                uneven.add(int(index))
                continue
            order = np.argsort(owned, kind="stable")
            indices = positions[order].reshape(len(count), int(count[0]))
            size = elements[axis.parameter][axis.axis]
            slices[index].append(UnitSlice(axis.parameter, axis.axis, indices, size, axis.role))
    return [None if index in uneven else tuple(found) for index, found in enumerate(slices)]


def common_owner(names: Sequence[str]) -> str:
    """The module that holds all of `names` (qualified parameter names)."""
    parts = [name.split(".")[:-2] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)
