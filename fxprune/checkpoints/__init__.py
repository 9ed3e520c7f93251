"""Slim models written as checkpoints that load again, and read back.

In: a slim program. Out: a directory of safetensors, `config.json` and `fxprune.json`; and from there a model.
May write to disk, through `fxprune.core.output` only. How a class spells its widths is found here.
"""
