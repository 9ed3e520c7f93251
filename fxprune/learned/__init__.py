"""Gates that learn which units stay (L0, hard concrete), with LoRA and numerous teachers.

In: a program with groups and text. Out: a `Plan`, and weights with LoRA merged. Keeps its state on disk.
"""
