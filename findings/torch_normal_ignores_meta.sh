#!/usr/bin/env bash
# torch.normal makes its tensor on the CPU inside `with torch.device("meta")`, where torch.randn makes none.
#
# Versions: torch 2.13.0; Python 3.11.
# Input: both factories in a block that makes the meta device the default.
# Expected: no memory is taken in the block: every factory honours the default device.
# Seen: torch.normal with a size returns a CPU tensor with values, so a model that initialises weights with it takes
# memory while its skeleton is built, and mixes devices.
#
#     torch.randn   meta
#     torch.normal  cpu
#
# Ends with 0 while this is so, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

with torch.device("meta"):
    found = {"torch.randn": torch.randn(2, 3).device.type, "torch.normal": torch.normal(0.0, 1.0, (2, 3)).device.type}
for name, device in found.items():
    print(f"{name:13s} {device}")
sys.exit(found != {"torch.randn": "meta", "torch.normal": "cpu"})
PYTHON
