"""Hugging Face models: a configuration, its class, the weights on disk, and mixed models as ordinary classes.

In: a directory or a hub id. Out: a loaded module with its tokenizer, or a skeleton without weights.
May read checkpoints and build modules; knows nothing of graphs.
"""

MODEL_TYPE = "fxprune"
"""`model_type` in the `config.json` of a mixed checkpoint."""
