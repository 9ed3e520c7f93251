"""Trace, prune, slim, verify, save and reload a model from Python.

python examples/quickstart.py [MODEL] [CALIBRATION] [OUT]
"""

from __future__ import annotations

import sys

import fxprune
from fxprune.checkpoints.load_model import load_model
from fxprune.models.default_model import default_model_path
from fxprune.passes.channel import ChannelPrune
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.lift_linears import LiftLinears
from fxprune.passes.locate_attention import LocateAttention
from fxprune.passes.locate_mlp import LocateMlp
from fxprune.passes.slim import Slim
from fxprune.passes.verify import Verify

model_name = sys.argv[1] if len(sys.argv) > 1 else str(default_model_path())
calibration = sys.argv[2] if len(sys.argv) > 2 else "self"
out = sys.argv[3] if len(sys.argv) > 3 else "slim"

loaded = load_model(model_name)
program = fxprune.trace(loaded.model, tokenizer=loaded.tokenizer)
program = fxprune.Pipeline([LiftLinears(), LocateAttention(), LocateMlp()])(program).program
for group in program.groups[:2]:
    print(group)

prune = ChannelPrune(ratio=0.2, calibration=calibration, samples=32, seq_len=128)
program = fxprune.Pipeline([prune, InsertMasks(), Slim(), Verify(reexport=False)])(program).program
for rung in program.results["verify"]:
    print(f"{rung['rung']}: max abs error {rung['max_abs_error']:.1e}")

fxprune.save(program, out)
slim = fxprune.load(out)
print(
    f"{sum(p.numel() for p in loaded.model.parameters()):,} -> {sum(p.numel() for p in slim.parameters()):,} parameters"
)
