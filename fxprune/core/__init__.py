"""What travels through fxprune, and what a pass is.

In: nothing. Out: `Program`, `Plan`, groups, `Pass`, `Pipeline`, the registry, errors, outputs on disk, progress.
Everything may use this room; it knows no model, no operator and no file format but its own.
"""
