"""A picture of one block's graph of groups: who writes whose units, who reads them, which weights are one.

    embedding ─► hidden ─► norm     hidden ─► q, k, v ─► heads ─► o ─► hidden     gate, up ─► channels ─► down ─► hidden

Nodes are the groups that touch the block, its projections and norms, and what is tied to it or reads the same weights;
an edge goes from what writes units to their group, and from a group to what reads its units. Ties are dashed.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import networkx as nx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fxprune.channels.inspection import shared_weights, tied_weights
from fxprune.core.errors import ExportError, UsageError
from fxprune.core.groups import HiddenGroup, LayerGroup
from fxprune.tracing.lifted import is_projection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fxprune.core.groups import Group
    from fxprune.core.program import Program

__all__ = ["block_graph", "block_of", "draw_block"]

_COLOURS = {
    "attention": "#4c78a8",
    "mlp": "#f58518",
    "hidden": "#54a24b",
    "experts": "#b279a2",
    "expert_mlp": "#e45756",
    "layers": "#72b7b2",
    "linear": "#e8e8e8",
    "norm": "#fff3c4",
    "table": "#d6eaf8",
}
_COLUMNS = {"hidden": 0, "norm": 1, "table": 0}


def block_of(program: Program) -> str | None:
    """Name of the layer in the middle of the longest stack; None for a model without a stack of layers."""
    stacks = [group for group in program.groups if isinstance(group, LayerGroup)]
    longest = max(stacks, key=lambda group: group.units, default=None)
    return None if longest is None else longest.labels[longest.units // 2]


def block_graph(program: Program, block: str | None = None) -> nx.DiGraph[str]:
    """The graph of groups of one block.

    Args:
        program: a located program.
        block: qualified name of the block's module; the whole model when None.

    Returns:
        A graph whose nodes are names (of groups with their kind in brackets, of modules as they are). Nodes have
        `kind` (a group's kind, `linear`, `norm` or `table`) and `label`; edges have `relation`: `writes`, `reads`,
        `normalises`, `holds` or `tied`.

    Raises:
        UsageError: nothing of the model is in this block.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    for name, module in program.graph_module.named_modules():
        if is_projection(module) and _inside(name, block):
            graph.add_node(name, kind="linear", label=_short(name, block))
    if not graph:
        raise UsageError(f"no projection of the model is in {block or 'its graph'}; name one of its layers")
    tables = _tables(program)
    for group in program.groups:
        if isinstance(group, LayerGroup):
            continue
        _add_group(graph, group, block, tables)
    for group in program.groups:
        if isinstance(group, LayerGroup) and (block is None or block in group.labels):
            name = _node_of(group)
            graph.add_node(name, kind=group.kind, label=f"{group.kind}\n{group.describe()}")
            inner = [n for n, kind in _kinds(graph).items() if kind in {"attention", "mlp", "experts", "expert_mlp"}]
            graph.add_edges_from(((name, n) for n in inner), relation="holds")
    for first, second in _ties(program):
        if first in graph and second in graph:
            graph.add_edge(first, second, relation="tied")
    return graph


def _inside(name: str, block: str | None) -> bool:
    return block is None or name == block or name.startswith(f"{block}.")


def _short(name: str, block: str | None) -> str:
    return name if block is None else name.removeprefix(f"{block}.")


def _node_of(group: Group) -> str:
    return f"{group.name} [{group.kind}]"


def _add_group(graph: nx.DiGraph[str], group: Group, block: str | None, tables: dict[str, tuple[str, ...]]) -> None:
    """Add a group that touches the block, with the edges of its units."""
    node = _node_of(group)
    edges: list[tuple[str, str, str]] = []
    for piece in (*group.slices, *group.shared):
        owner = piece.parameter.removesuffix(".weight")
        if owner in graph:
            relation = {"rows": "writes", "columns": "reads", "experts": "holds"}.get(piece.role)
            if relation == "writes":
                edges.append((owner, node, relation))
            elif relation is not None:
                edges.append((node, owner, relation))
    norms = [name for name in group.norms if _inside(name, block)] if isinstance(group, HiddenGroup) else []
    if not edges and not norms:
        return
    graph.add_node(node, kind=group.kind, label=f"{group.kind}\n{_lines(group.describe())}")
    for name in norms:
        graph.add_node(name, kind="norm", label=_short(name, block))
        graph.add_edge(node, name, relation="normalises")
    for source, target, relation in edges:
        graph.add_edge(source, target, relation=relation)
    for piece in group.slices:  # what stands outside of the block: embeddings and the output projection
        for user in tables.get(piece.parameter, ()):
            if user not in graph:
                graph.add_node(user, kind="table", label=user)
            if not piece.consumes or user != piece.parameter.removesuffix(".weight"):
                graph.add_edge(user, node, relation="writes")
            else:
                graph.add_edge(node, user, relation="reads")


def _tables(program: Program) -> dict[str, tuple[str, ...]]:
    """The modules that use each parameter that is looked up by index or used more than once."""
    found = {weight.name: tuple(dict.fromkeys(weight.uses)) for weight in shared_weights(program)}
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and "embedding" in str(node.target) and node.args[0].op == "get_attr":
            name = str(node.args[0].target)
            found.setdefault(name, (name.removesuffix(".weight"),))
    return found


def _ties(program: Program) -> Iterator[tuple[str, str]]:
    """Pairs of modules whose weights are one tensor."""
    eager = program.references.get("eager")
    for tied in tied_weights(eager.module if eager else program.graph_module):
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in tied.names))
        yield from itertools.pairwise(owners)
    for weight in shared_weights(program):
        owners = list(dict.fromkeys(weight.uses))
        yield from itertools.pairwise(owners)


def _kinds(graph: nx.DiGraph[str]) -> dict[str, str]:
    return {node: str(graph.nodes[node]["kind"]) for node in graph}


def _lines(text: str) -> str:
    return re.sub(r", ", ",\n", text)


# --- drawing --------------------------------------------------------------------------------------------------------


def _positions(graph: nx.DiGraph[str]) -> dict[str, tuple[float, float]]:
    """From left to right: hidden, norms, Linears that write inner groups, inner groups and the stack, their readers."""
    columns: dict[int, list[str]] = {}
    kinds = _kinds(graph)
    for node, kind in kinds.items():
        if kind == "linear":
            inner = [s for s in graph.predecessors(node) if graph.edges[s, node]["relation"] == "reads"]
            column = 4 if any(kinds[source] != "hidden" for source in inner) else 2
        else:
            column = _COLUMNS.get(kind, 3)
        columns.setdefault(column, []).append(node)
    place: dict[str, tuple[float, float]] = {}
    for column, nodes in columns.items():
        for row, node in enumerate(nodes):
            place[node] = (float(column), -(row + 0.5) / len(nodes))
    return place


def draw_block(program: Program, path: str | Path, *, block: str | None = None) -> nx.DiGraph[str]:
    """Draw one block's graph of groups to an SVG or PNG file; the same program draws the same bytes.

    Args:
        program: a located program.
        path: file to write; its suffix, `.svg` or `.png`, chooses the format.
        block: qualified name of the block; by default the one in the middle of the longest stack of layers.

    Returns:
        The graph that was drawn.

    Raises:
        UsageError: another suffix, or nothing of the model is in the block.
        ExportError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in {".svg", ".png"}:
        raise UsageError(f"cannot draw to {path}: its name must end in .svg or .png")
    block = block_of(program) if block is None else block
    graph = block_graph(program, block)
    place = _positions(graph)
    rows = max(sum(x == column for x, _ in place.values()) for column in range(5))
    figure = Figure(figsize=(17, max(5.0, 1.1 * rows)))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.92))
    axes.set_axis_off()
    axes.set_xlim(-0.6, 4.6)
    axes.set_ylim(-1.2, 0.2)
    axes.set_title(f"{program.source.name if program.source else 'model'}: {block or 'whole model'}", loc="left")
    boxes = {}
    for node, data in graph.nodes(data=True):
        dark = data["kind"] not in {"linear", "norm", "table"}
        box = {"boxstyle": "round", "facecolor": _COLOURS[data["kind"]], "edgecolor": "#444444"}
        boxes[node] = axes.text(*place[node], data["label"], ha="center", va="center", fontsize=8,
                  color="white" if dark else "black", bbox=box)  # fmt: skip
    FigureCanvasAgg(figure).draw()  # only now the boxes have their sizes
    _draw_edges(graph, axes, place, boxes)
    try:
        with mpl.rc_context({"svg.hashsalt": "fxprune", "svg.fonttype": "none"}):
            if path.suffix.lower() == ".svg":
                FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
            else:
                FigureCanvasAgg(figure).print_png(path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}") from error
    return graph


def _draw_edges(
    graph: nx.DiGraph[str], axes: Any, place: dict[str, tuple[float, float]], boxes: dict[str, Any]
) -> None:
    """Draw arrows from box to box; those that go back, or stay in their column, in a wide bend."""
    style = {"tied": "dashed", "holds": "dotted"}
    for source, target in graph.edges:
        relation = graph.edges[source, target]["relation"]
        (x, y), back = place[source], place[source][0] - place[target][0]
        bend = 0.05 if back < 0 else (0.3 if back < 2 else 0.2) * (1 if y > -0.5 or x == 0 else -1)
        arrow = {
            "arrowstyle": "-" if relation == "tied" else "-|>",
            "linestyle": style.get(relation, "solid"),
            "color": "#888888",
            "connectionstyle": f"arc3,rad={bend}",
            "patchA": boxes[source].get_bbox_patch(),
            "patchB": boxes[target].get_bbox_patch(),
        }
        axes.annotate("", xy=place[target], xytext=place[source], arrowprops=arrow, zorder=1)
