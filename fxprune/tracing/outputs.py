"""What a model returns: results by name, and the tensors in them under the names that the outputs of a graph have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["named_outputs", "named_results"]


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors that a model returned, under the names that the outputs of its graph have."""
    if isinstance(output, torch.Tensor):
        return {"output_0": output}
    fields = output.items() if isinstance(output, Mapping) else ((f"output_{i}", one) for i, one in enumerate(output))
    named: dict[str, Tensor] = {}
    for key, value in fields:
        if isinstance(value, torch.Tensor):
            named[str(key)] = value
        else:
            leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            named |= {f"{key}_{index}": leaf for index, leaf in enumerate(leaves)}
    return named


@contextmanager
def named_results(config: Any) -> Iterator[None]:
    """A model whose configuration asks for tuples returns results by name; its parts read the same configuration."""
    fields = {} if config is None else vars(config)
    before = fields.get("return_dict", True)
    if before is not False:
        yield
        return
    fields["return_dict"] = True
    try:
        yield
    finally:
        fields["return_dict"] = before
