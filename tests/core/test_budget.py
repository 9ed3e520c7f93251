"""Budgets: a ratio is a share between nothing and everything."""

from __future__ import annotations

import math

import pytest

from fxprune.core.budget import check_ratio
from fxprune.core.errors import UsageError


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_a_ratio_outside_zero_and_one_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="ratio must lie between 0 and 1"):
        check_ratio(ratio)
    check_ratio(0.5)
