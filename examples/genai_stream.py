"""Text of an exported model as it is made, with onnxruntime-genai.

fxprune export slim/ --to genai --int4 --out slim-genai/
python examples/genai_stream.py slim-genai/ ["a prompt"] [NEW_TOKENS]
"""

from __future__ import annotations

import sys
import time

from fxprune.exporters.genai import GenaiRunner

directory = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "A compiler is"
new_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 64

runner = GenaiRunner(directory)
print(prompt, end="", flush=True)
start, pieces = time.perf_counter(), 0
for piece in runner.stream(prompt, new_tokens):
    print(piece, end="", flush=True)
    pieces += 1
print(f"\n\n{pieces} tokens, {pieces / (time.perf_counter() - start):.0f} a second")
