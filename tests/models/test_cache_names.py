"""The name of a cache: as the class's own signature has it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Cache

from fxprune.models.cache_names import cache_argument, cache_of, name_among, named_as_taken


class New:
    def forward(self, input_ids: Any, cache: Any = None, use_cache: Any = None) -> None: ...


class Declared:
    def forward(self, input_ids: Any, cache: Cache | None = None, **kwargs: Any) -> None: ...


class Old:
    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


class Neither:
    def forward(self, input_ids: Any, cache: dict[str, Any] | None = None, **kwargs: Any) -> None: ...


def free(input_ids: Any, past_key_values: Any = None) -> None: ...


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (New(), "cache"),
        (Declared(), "cache"),
        (Old(), "past_key_values"),
        (Neither(), None),
        (free, "past_key_values"),
    ],
)
def test_the_argument_that_takes_the_cache(model: Any, name: str | None) -> None:
    assert cache_argument(model) == name


@pytest.mark.smoke
@pytest.mark.parametrize("given", ["cache", "past_key_values"])
def test_inputs_are_named_as_the_class_takes_them(given: str) -> None:
    inputs = {"input_ids": 1, given: 2}
    assert named_as_taken(New(), inputs) == {"input_ids": 1, "cache": 2}
    assert named_as_taken(Old(), inputs) == {"input_ids": 1, "past_key_values": 2}
    assert named_as_taken(Neither(), inputs) == inputs
    assert cache_of(inputs) == 2
    assert cache_of({"input_ids": 1}) is None


@pytest.mark.smoke
def test_what_comes_out_is_named_after_what_goes_in() -> None:
    assert name_among({"input_ids", "past_key_values"}, "cache") == "past_key_values"
    assert name_among({"cache"}, "past_key_values") == "cache"
    assert name_among({"cache", "past_key_values"}, "cache") == "cache"
    assert name_among({"input_ids"}, "cache") == "cache"
    assert name_among({"cache"}, "logits") == "logits"
