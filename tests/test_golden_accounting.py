"""Golden accounting: what pruning published architectures removes, at full width, to four decimals.

Parameters are linear in the number of layers: models of two and three layers give the full depth exactly. The script
`benchmarks/golden_accounting.py` traces all of them at full depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.golden_accounting import GOLDEN, Golden, Removal, located, remove_layers, remove_mlp

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

    from fxprune.program import Program


@pytest.fixture(scope="module")
def at_depth() -> Callable[[Callable[[], PreTrainedConfig], int], Program]:
    """Located models by configuration and depth, each traced once."""
    known: dict[tuple[Callable[[], PreTrainedConfig], int], Program] = {}

    def get(make: Callable[[], PreTrainedConfig], layers: int) -> Program:
        if (make, layers) not in known:
            config = make()
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
            known[make, layers] = located(config)
        return known[make, layers]

    return get


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_golden(golden: Golden, at_depth: Callable[[Callable[[], PreTrainedConfig], int], Program]) -> None:
    depth = golden.config().num_hidden_layers
    two, three = (at_depth(golden.config, layers) for layers in (2, 3))
    if golden.layers:
        a, b = (remove_layers(program, 1) for program in (two, three))
        assert a.removed == b.removed == b.parameters - a.parameters  # a layer is a layer
        removed = golden.layers * a.removed
    else:
        a, b = (remove_mlp(program) for program in (two, three))
        removed = a.removed + (depth - 2) * (b.removed - a.removed)
    parameters = a.parameters + (depth - 2) * (b.parameters - a.parameters)
    whole = Removal(a.kept_width, removed, parameters)
    assert whole.kept_width == golden.kept_width
    assert round(whole.percent, golden.decimals) == golden.percent
