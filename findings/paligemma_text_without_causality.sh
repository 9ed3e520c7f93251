#!/usr/bin/env bash
# PaliGemma without an image: whether text is read causally depends on the padding of another row.
#
# Versions: transformers 5.24.0, torch 2.13.0; Python 3.11. Attention "sdpa", its default.
# Input: a tiny random PaliGemmaForConditionalGeneration, six tokens of text, no pixels.
# Expected: the logits of a text do not depend on what lies beside it in the batch, and those of its first token not on
# its last token, as the class is used to write text.
# Seen: alone, the first token's logits change with the last token; beside a left-padded row they do not, and the logits of
# the same text are others. A graph that was traced in one of the two ways does not hold in the other.
#
#     alone:                first token sees the last one: True
#     beside a padded row:  first token sees the last one: False
#     same logits:          False
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
vision = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "projection_dim": 32,
}
text = {
    "model_type": "gemma", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8,
}
config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32, image_token_index=99)
model = transformers.PaliGemmaForConditionalGeneration(config).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.3)
tokens = torch.arange(6)[None] + 10
other = tokens.clone()
other[0, -1] = 50
alone = torch.ones_like(tokens)
beside = torch.tensor([[1] * 6, [0, 0] + [1] * 4])


@torch.no_grad()
def logits(ids, mask):
    return model(input_ids=ids.repeat(len(mask), 1), attention_mask=mask).logits[0]


found = []
for name, mask in (("alone:", alone), ("beside a padded row:", beside)):
    sees = not torch.allclose(logits(tokens, mask)[0], logits(other, mask)[0], atol=1e-4)
    print(f"{name:21s} first token sees the last one: {sees}")
    found.append(sees)
same = torch.allclose(logits(tokens, alone), logits(tokens, beside), atol=1e-4)
print(f"{'same logits:':21s} {same}")
sys.exit(found != [True, False] or same)
PYTHON
