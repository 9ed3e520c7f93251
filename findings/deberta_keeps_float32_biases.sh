#!/usr/bin/env bash
# DebertaForMaskedLM that is loaded in bfloat16 cannot run: some of its parameters stay float32.
#
# Versions: transformers 5.24.0, torch 2.13.0; Python 3.11.
# Input: a tiny random DebertaForMaskedLM, saved in bfloat16 and loaded with its default dtype.
# Expected: all floating point parameters are bfloat16, and the forward pass works, as for other classes.
# Seen: q_bias and v_bias of every layer are float32 after loading, and the forward pass raises RuntimeError.
#
#     float32 after loading: ['q_bias', 'v_bias']
#     forward: RuntimeError
#
# Ends with 0 while this is so, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers

torch.manual_seed(0)
config = transformers.DebertaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"],
)
transformers.DebertaForMaskedLM(config).to(torch.bfloat16).save_pretrained("model")
model = transformers.DebertaForMaskedLM.from_pretrained("model").eval()
kept = sorted({name.rpartition(".")[2] for name, tensor in model.named_parameters() if tensor.dtype is torch.float32})
print("float32 after loading:", kept)
try:
    with torch.no_grad():
        model(torch.arange(8)[None])
    raised = "nothing"
except RuntimeError as error:
    raised = type(error).__name__
print("forward:", raised)
sys.exit(kept != ["q_bias", "v_bias"] or raised != "RuntimeError")
PYTHON
