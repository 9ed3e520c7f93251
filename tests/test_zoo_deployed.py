"""Every family deployed: a slim model of every kind of unit reloads bit by bit, runs in ONNX Runtime, says the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.families import onnx_error, random_plans, same_text
from fxprune import load
from fxprune.core.errors import CheckpointError
from fxprune.passes.save import Save
from fxprune.passes.verify import Verify
from fxprune.runtimes.runners import EagerRunner, GraphRunner, greedy
from fxprune.tracing.lifted_graphs import state_tensors
from tests.proof import slimmed
from tests.test_zoo import PAIRS
from tests.zoo import ZOO, kinds_of, located

if TYPE_CHECKING:
    from pathlib import Path

# What transformers' classes cannot compute, whatever a checkpoint says; the message must name it.
SLOPES = ("bloom", "mpt", "falcon (ALiBi)")  # computed once for all layers and the dense number of heads
REFUSED = {
    **{(name, kind): "ONNX, where these rows are selected" for name in SLOPES for kind in ("attention", "all")},
    ("t5", "attention"): "relative_attention_bias",  # one table for the heads of all layers
    ("t5", "all"): "relative_attention_bias",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(*pair, marks=pytest.mark.xdist_group(pair[0]), id="-".join(pair))
        for pair in PAIRS
        if ZOO[pair[0]].form != "plain"
    ],
)
def test_a_checkpoint_of_every_kind_loads_back(name: str, kind: str, tmp_path: Path) -> None:
    slim = slimmed(located(name), random_plans(located(name), kind, 1)[0])
    refused = REFUSED.get((name, kind))
    if refused is not None:
        with pytest.raises(CheckpointError, match=refused):
            Save(out=tmp_path / "slim")(slim)
        assert not (tmp_path / "slim").exists()
        return
    Save(out=tmp_path / "slim")(slim)
    Verify(checkpoint=tmp_path / "slim", graph=False)(slim)  # logits, and greedy text of the slim graph
    model = load(tmp_path / "slim")
    mine = sorted(
        t.double().sum().item() for t in {id(t): t for t in state_tensors(slim.graph_module).values()}.values()
    )
    state = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    theirs = [t.double().sum().item() for t in state.values()]
    assert all(min(abs(value - other) for other in mine) == 0 for value in theirs)
    if not slim.interface.cache:
        return
    masked = slim.references["masked"]
    prompt = torch.arange(5, 12).unsqueeze(0)
    assert isinstance(masked.module, torch.fx.GraphModule)
    expected = greedy(GraphRunner(masked.module, masked.interface), prompt, 10)
    assert torch.equal(greedy(EagerRunner(model), prompt, 10), expected)
    generated = model.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated[:, prompt.shape[1] :], expected)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name), id=name) for name in ZOO])
def test_a_plan_for_everything_runs_in_onnx_runtime(name: str) -> None:
    program = located(name)
    assert len(kinds_of(program)) >= 2
    slim = slimmed(program, random_plans(program, "all", 1)[0])
    assert onnx_error(slim) <= 1e-4
    assert same_text(slim) is not False
