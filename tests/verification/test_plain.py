"""The ladder of models without a cache: what they are compared on, and what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.core.errors import VerificationError
from fxprune.core.program import Interface
from fxprune.tracing.outputs import named_outputs
from fxprune.verification.plain import PlainLadder, plain_cases

PAD = 3


def config(**fields: Any) -> Any:
    """A configuration of which nothing else is asked."""
    found = SimpleNamespace(vocab_size=50, pad_token_id=PAD, max_position_embeddings=64, **fields)
    found.get_text_config = lambda: found
    return found


def of_text() -> Interface:
    ids = torch.arange(6).reshape(2, 3)
    axes = {0: "s0", 1: "s1"}
    return Interface(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": axes, "attention_mask": axes},
        ("logits",),
    )


def test_text_comes_in_other_batches_lengths_and_paddings() -> None:
    cases = plain_cases(of_text(), config())
    assert [tuple(case["input_ids"].shape) for case in cases] == [(2, 3), (1, 7), (2, 4), (2, 6)]
    masks = [case["attention_mask"] for case in cases]
    assert all(mask.shape == case["input_ids"].shape for mask, case in zip(masks, cases, strict=True))
    assert bool(masks[1].all())
    assert masks[2].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert masks[3].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    for case, mask in zip(cases[1:], masks[1:], strict=True):
        assert bool((case["input_ids"][mask == 0] == PAD).all())
        assert int(case["input_ids"].max()) < 50
    again = plain_cases(of_text(), config())
    assert all(torch.equal(a[name], b[name]) for a, b in zip(cases, again, strict=True) for name in a)


def test_lengths_stay_within_the_positions_and_fixed_axes_stay() -> None:
    short = SimpleNamespace(**{**vars(config()), "max_position_embeddings": 5})
    short.get_text_config = lambda: short
    assert [case["input_ids"].shape[1] for case in plain_cases(of_text(), short)] == [3, 5, 4, 5]
    pixels = Interface({"pixel_values": torch.zeros(2, 3, 8, 8)}, {"pixel_values": {0: "s0", 2: "8"}}, ("logits",))
    cases = plain_cases(pixels, config())
    assert [tuple(case["pixel_values"].shape) for case in cases] == [(2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8)]
    assert float(cases[1]["pixel_values"].std()) > 0.5


def test_a_plain_module_keeps_its_sizes_and_gets_values_of_its_example() -> None:
    example = torch.tensor([[0.25, 0.5], [0.75, 1.0]])
    cases = plain_cases(Interface({"x": example}, {"x": {0: "s0"}}, ("output_0",)))
    assert [tuple(case["x"].shape) for case in cases] == [(2, 2), (2, 2)]
    assert set(cases[1]["x"].flatten().tolist()) <= set(example.flatten().tolist())


def right(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(batch, length, 2), as a model would give."""
    return {"logits": inputs["input_ids"].float().unsqueeze(-1).repeat(1, 1, 2)}


def off(where: Callable[[Mapping[str, Tensor]], Any], by: float = 1.0) -> Callable[..., dict[str, Tensor]]:
    """The same, wrong where it is said."""

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = right(inputs)["logits"].clone()
        logits[where(inputs)] += by
        return {"logits": logits}

    return run


@pytest.mark.parametrize(
    "wrong",
    [
        off(lambda inputs: slice(0, int(len(inputs["input_ids"]) == 1))),  # batch 1
        off(lambda inputs: slice(0, 2 * int(inputs["input_ids"].shape[1] == 4))),  # another length
        off(lambda inputs: inputs["attention_mask"].sum(1) < inputs["attention_mask"].shape[1]),  # padded rows
        off(lambda inputs: inputs["input_ids"] > 20, math.nan),  # tokens that the example lacks
        lambda inputs: {"logits": right(inputs)["logits"][:, :1]},  # another shape
        lambda _: {},  # no such output
    ],
)
def test_what_is_wrong_beyond_the_example_is_found(wrong: Callable[..., dict[str, Tensor]]) -> None:
    ladder = PlainLadder(of_text(), torch.float32, config())
    with pytest.raises(VerificationError, match="slim = masked does not hold"):
        ladder.rung("slim = masked", right, wrong)


def test_positions_that_the_mask_hides_are_left_out() -> None:
    ladder = PlainLadder(of_text(), torch.float32, config())
    rung = ladder.rung("slim = masked", right, off(lambda inputs: inputs["attention_mask"] == 0, math.nan))
    assert rung.passed
    assert rung.cases == 4


def test_outputs_are_named_as_tracing_names_them() -> None:
    one, two = torch.zeros(1), torch.ones(2)
    assert list(named_outputs(one)) == ["output_0"]
    assert list(named_outputs((one, (two, one)))) == ["output_0", "output_1_0", "output_1_1"]
    named = named_outputs({"logits": one, "hidden_states": (one, two), "loss": None})
    assert list(named) == ["logits", "hidden_states_0", "hidden_states_1"]
    assert named["hidden_states_1"] is two
