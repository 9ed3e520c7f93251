"""Normalising products: `einsum` and `tensordot` become matrix products, which channel tracing and lifting know.

    einsum("bqhd,bkhd->bhqk", q, k)    matmul(permute(q), permute(k)),      batch axes b and h, rows q, columns k
    einsum("bshd,hd->bsh", x, w)       sum of mul(x, w) where nothing but summed axes is left
    tensordot(a, b, [1], [0])          the same with letters

Several axes of one role are flattened and unflattened. Left as they are: equations with one letter twice in an operand
(diagonals), and operands given as lists of numbers.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxprune.tracing.normalise_writes import add_node

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["lower_products"]

aten = torch.ops.aten


def lower_products(graph: Graph) -> None:
    """Rewrite every `einsum` and `tensordot` of a graph that can be."""
    for node in list(graph.nodes):
        if node.target is aten.einsum.default and isinstance(node.args[0], str):
            operands = [operand for operand in node.args[1] if isinstance(operand, Node)]
            equation = _expanded(node.args[0].replace(" ", ""), operands)
        elif node.target is aten.tensordot.default:
            operands = [operand for operand in node.args[:2] if isinstance(operand, Node)]
            equation = _tensordot(node, operands)
        else:
            continue
        if equation is not None:
            _lower(graph, node, operands, *equation)


def _dim(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _expanded(equation: str, operands: Sequence[Node]) -> tuple[list[str], str] | None:
    """The letters of every operand and of the result, dots replaced by capital letters; None when it is refused."""
    given, arrow, out = equation.partition("->")
    terms = given.split(",")
    if len(terms) != len(operands) or any(_dim(operand) < 0 for operand in operands):
        return None
    free = [letter for letter in string.ascii_uppercase if letter not in equation]
    longest = max(
        (_dim(o) - len(t.replace("...", "")) for t, o in zip(terms, operands, strict=True) if "." in t), default=0
    )
    dots = "".join(free[:longest])
    full = [
        term.replace("...", dots[longest - (_dim(operand) - len(term.replace("...", ""))) :])
        for term, operand in zip(terms, operands, strict=True)
    ]
    if not arrow:
        letters = sorted(given.replace("...", "").replace(",", ""))
        out = dots + "".join(letter for letter in letters if letters.count(letter) == 1)
    out = out.replace("...", dots)
    if any(len(set(term)) < len(term) or len(term) != _dim(o) for term, o in zip(full, operands, strict=True)):
        return None
    return full, out


def _tensordot(node: Node, operands: Sequence[Node]) -> tuple[list[str], str] | None:
    if len(operands) != 2 or any(_dim(operand) < 0 for operand in operands):
        return None
    first, second = (_dim(operand) for operand in operands)
    axes: Any = node.args[2:4]
    summed = [[axis % size for axis in listed] for listed, size in zip(axes, (first, second), strict=True)]
    a = string.ascii_lowercase[:first]
    rest = iter(string.ascii_lowercase[first:])
    b = [a[summed[0][summed[1].index(axis)]] if axis in summed[1] else next(rest) for axis in range(second)]
    out = "".join(letter for letter in (*a, *b) if not (letter in a and letter in b))
    return [a, "".join(b)], out


def _lower(graph: Graph, node: Node, operands: Sequence[Node], equation: tuple[Any, ...] | list[str], out: str) -> None:
    terms = list(equation)
    with graph.inserting_before(node):
        value, letters = operands[0], terms[0]
        if len(operands) == 1:
            value, letters = _sum_out(graph, node, value, letters, out)
        for operand, term, index in zip(operands[1:], terms[1:], range(2, len(terms) + 1), strict=True):
            needed = set(out).union(*terms[index:])
            value, letters = _multiply(graph, node, (value, letters), (operand, term), needed)
        value = _permuted(graph, node, value, letters, out)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _permuted(graph: Graph, like: Node, value: Node, letters: str, wanted: str) -> Node:
    if letters == wanted:
        return value
    return add_node(graph, aten.permute.default, (value, [letters.index(letter) for letter in wanted]), like)


def _sum_out(graph: Graph, like: Node, value: Node, letters: str, needed: str) -> tuple[Node, str]:
    """Sum over the axes whose letters nobody needs."""
    axes = [axis for axis, letter in enumerate(letters) if letter not in needed]
    if not axes:
        return value, letters
    kept = "".join(letter for letter in letters if letter in needed)
    return add_node(graph, aten.sum.dim_IntList, (value, axes), like), kept


def _multiply(
    graph: Graph, like: Node, left: tuple[Node, str], right: tuple[Node, str], needed: set[str]
) -> tuple[Node, str]:
    """The product of two operands, summed over what they share and nobody needs later."""
    a, la = _sum_out(graph, like, *left, "".join(needed | set(right[1])))
    b, lb = _sum_out(graph, like, *right, "".join(needed | set(la)))
    batch = "".join(letter for letter in la if letter in lb and letter in needed)
    summed = "".join(letter for letter in la if letter in lb and letter not in needed)
    rows = "".join(letter for letter in la if letter not in lb)
    columns = "".join(letter for letter in lb if letter not in la)
    if not summed:
        return _elementwise(graph, like, (a, la), (b, lb))
    sizes = {letter: (node, axis) for node, term in ((b, lb), (a, la)) for axis, letter in enumerate(term)}
    a = _matrix(graph, like, _permuted(graph, like, a, la, batch + rows + summed), (len(batch), len(rows), len(summed)))
    b = _matrix(
        graph, like, _permuted(graph, like, b, lb, batch + summed + columns), (len(batch), len(summed), len(columns))
    )
    value = add_node(graph, aten.matmul.default, (a, b), like)
    at = len(batch)
    for part, axis in ((columns, at + 1), (rows, at)):  # the last axis first: it does not move the others
        if not part:
            value = add_node(graph, aten.squeeze.dim, (value, axis), like)
        elif len(part) > 1:
            extents = [_size(graph, like, *sizes[letter]) for letter in part]
            value = add_node(graph, aten.unflatten.int, (value, axis, extents), like)
    return value, batch + rows + columns


def _elementwise(graph: Graph, like: Node, left: tuple[Node, str], right: tuple[Node, str]) -> tuple[Node, str]:
    (a, la), (b, lb) = left, right
    letters = la + "".join(letter for letter in lb if letter not in la)
    for _ in range(len(letters) - len(la)):
        a = add_node(graph, aten.unsqueeze.default, (a, -1), like)
    b = _permuted(graph, like, b, lb, "".join(letter for letter in letters if letter in lb))
    for axis, letter in enumerate(letters):
        if letter not in lb:
            b = add_node(graph, aten.unsqueeze.default, (b, axis), like)
    return add_node(graph, aten.mul.Tensor, (a, b), like), letters


def _matrix(graph: Graph, like: Node, value: Node, lengths: tuple[int, int, int]) -> Node:
    """Flatten axes of one role, and add an axis for a role without any: (batch..., rows, columns)."""
    batch, rows, columns = lengths
    for first, count in ((batch + rows, columns), (batch, rows)):  # the last role first
        if count > 1:
            value = add_node(graph, aten.flatten.using_ints, (value, first, first + count - 1), like)
        elif count == 0:
            value = add_node(graph, aten.unsqueeze.default, (value, first), like)
    return value


def _size(graph: Graph, like: Node, node: Node, axis: int) -> Any:
    """The length of an axis: a number, or a node where it may change."""
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else add_node(graph, aten.sym_size.int, (node, axis), like)
