"""Single weights: masks, by layer-wise solvers, for a whole model or a block at a time.

In: a program and statistics. Out: a program whose weights are sparse, with their masks.
"""
