"""Golden accounting: what pruning published architectures removes, at full width, to four decimals.

Parameters are linear in the number of layers: two depths give the full one exactly, the least two that are enough: one
and two layers, or two and three where layers are removed. The script `benchmarks/golden_accounting.py` traces all of
them at full depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.golden_accounting import GOLDEN, Golden, Removal, located, remove_layers, remove_mlp

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

    from fxprune.core.program import Program


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
    least = 2 if any(other.layers for other in GOLDEN if other.config is golden.config) else 1
    less, more = (at_depth(golden.config, layers) for layers in (least, least + 1))
    if golden.layers:
        a, b = (remove_layers(program, 1) for program in (less, more))
        assert a.removed == b.removed == b.parameters - a.parameters  # a layer is a layer
        removed = golden.layers * a.removed
    else:
        a, b = (remove_mlp(program) for program in (less, more))
        removed = a.removed + (depth - least) * (b.removed - a.removed)
    parameters = a.parameters + (depth - least) * (b.parameters - a.parameters)
    whole = Removal(a.kept_width, removed, parameters)
    assert whole.kept_width == golden.kept_width
    assert round(whole.percent, golden.decimals) == golden.percent
