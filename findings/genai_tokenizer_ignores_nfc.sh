#!/usr/bin/env bash
# onnxruntime-genai's tokenizer leaves out the NFC normaliser of a tokenizer.json.
#
# Versions: onnxruntime-genai 0.18.0, onnxruntime 1.31.1, tokenizers 0.23.3, onnx 1.22.0, numpy 2.3.5; Python 3.11.
# Input: a byte-level BPE tokenizer with `"normalizer": {"type": "NFC"}`, as Qwen2 has it, beside a tiny decoder.
# Expected: "cafe" + U+0301 is composed to "café" and gets the ids of that text, as the library `tokenizers` gives them.
# Seen: the text is not composed; its ids are those of "cafe" and of the two bytes of U+0301. Composed text is the same.
#
#     tokenizers   composed [70, 68, 73, 131, 106]  decomposed [70, 68, 73, 131, 106]
#     genai        composed [70, 68, 73, 131, 106]  decomposed [70, 68, 73, 72, 140, 227]
#
# Ends with 0 while this is so, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime-genai==0.18.0 onnxruntime==1.31.1 tokenizers==0.23.3 onnx==1.22.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

special = ["<unk>", "<s>", "</s>", "<pad>"]
vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
tokenizer = Tokenizer(models.BPE(vocabulary, []))
tokenizer.normalizer = normalizers.NFC()
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(special)

# The tokenizer needs a model: one layer whose logits are a table and whose cache goes through.
size, floats = len(vocabulary), TensorProto.FLOAT
cache = [1, 1, "past", 8]
graph = helper.make_graph(
    [
        helper.make_node("Gather", ["table", "input_ids"], ["logits"]),
        helper.make_node("Identity", ["past_key_values.0.key"], ["present.0.key"]),
        helper.make_node("Identity", ["past_key_values.0.value"], ["present.0.value"]),
    ],
    "tiny",
    [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "length"]),
        helper.make_tensor_value_info("past_key_values.0.key", floats, cache),
        helper.make_tensor_value_info("past_key_values.0.value", floats, cache),
    ],
    [
        helper.make_tensor_value_info("logits", floats, [1, "length", size]),
        helper.make_tensor_value_info("present.0.key", floats, cache),
        helper.make_tensor_value_info("present.0.value", floats, cache),
    ],
    [numpy_helper.from_array(np.zeros((size, size), dtype=np.float32), "table")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), "model.onnx")
names = {
    "inputs": {
        "input_ids": "input_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    },
}
sizes = {"hidden_size": 8, "head_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
decoder = {"filename": "model.onnx", "session_options": {"provider_options": []}, **sizes, **names}
model = {"type": "decoder", "vocab_size": size, "context_length": 64, "decoder": decoder}
model |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
Path("genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 64}}))
tokenizer.save("tokenizer.json")
Path("tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
)

theirs = og.Tokenizer(og.Model("."))
composed, decomposed = "caf\u00e9", "cafe\u0301"
expected = [tokenizer.encode(text).ids for text in (composed, decomposed)]
seen = [[int(token) for token in theirs.encode(text)] for text in (composed, decomposed)]
print("tokenizers   composed", expected[0], " decomposed", expected[1])
print("genai        composed", seen[0], " decomposed", seen[1])
as_described = expected[0] == expected[1] == seen[0] and seen[1] != expected[1]
sys.exit(0 if as_described else 1)
PYTHON
