"""Prune a model's weights with SparseGPT, verify it, and load the checkpoint with plain transformers.

python examples/sparsegpt.py [MODEL] [CALIBRATION] [OUT] [SAMPLES]
"""

import sys

from transformers import AutoModelForCausalLM

import fxprune
from fxprune.checkpoints.load_model import load_model
from fxprune.models.default_model import default_model_path
from fxprune.passes.lift_linears import LiftLinears
from fxprune.passes.sparsegpt import SparseGpt
from fxprune.passes.verify import Verify

model, calibration, out, samples = [*sys.argv[1:], *["", "self", "sparse", "8"][len(sys.argv) - 1 :]]
loaded = load_model(model or str(default_model_path()))
program = fxprune.trace(loaded.model, tokenizer=loaded.tokenizer)
prune = SparseGpt(pattern="2:4", calibration=calibration, samples=int(samples), seq_len=64)
program = fxprune.Pipeline([LiftLinears(), prune, Verify(reexport=False)])(program).program
found = program.results["sparsity"]
print(f"{found['pruned_linears']} Linears, {found['removed_share']:.1%} of their weights removed")
fxprune.save(program, out)
sparse = AutoModelForCausalLM.from_pretrained(out)
print(f"zeros in the first one: {(sparse.model.layers[0].mlp.up_proj.weight == 0).float().mean():.1%}")
