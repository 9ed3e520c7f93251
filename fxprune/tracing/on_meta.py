"""What tracing on the meta device needs besides: there neither tokens nor lists of positions have values."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["ListsAsSlices", "without_padding"]


@contextmanager
def without_padding(config: Any) -> Iterator[None]:
    """Without a mask some models look for padding among the tokens: here there is no such token.

    The field is set behind the back of configurations that check what they are given, and set back.
    """
    fields = vars(config)
    padding = fields.get("pad_token_id")
    if padding is not None:
        fields["pad_token_id"] = None
    try:
        yield
    finally:
        if padding is not None:
            fields["pad_token_id"] = padding


class ListsAsSlices(TorchFunctionMode):
    """Takes `x[:, [-2]]` for `x[:, -2:-1]`: what torch makes of a list for a meta tensor has lost its values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        if func is torch.Tensor.__getitem__:
            args = (args[0], _lists_as_slices(args[1]))
        return func(*args, **(kwargs or {}))


def _lists_as_slices(index: Any) -> Any:
    """The same index with its only list, if that is a run of positions and the rest are slices, as a slice."""
    items = index if isinstance(index, tuple) else (index,)
    lists = [item for item in items if isinstance(item, list)]
    rest = all(item is None or item is Ellipsis or isinstance(item, (slice, list)) for item in items)
    if len(lists) != 1 or not rest or not all(type(position) is int for position in lists[0]) or not lists[0]:
        return index
    start, end = lists[0][0], lists[0][-1] + 1
    if lists[0] != list(range(start, end)) or start < 0 < end:
        return index
    return tuple(slice(start, end or None) if item is lists[0] else item for item in items)
